"""Who finds a reward that is far away? Bootstrapped DQN with and without priors, and epsilon-greedy DQN, on a chain.

    python tests/benchmarks/deep_exploration.py
    python tests/benchmarks/deep_exploration.py --seeds 1 2 3

The chain of Osband et al. 2016, shown as pictures: a game starts in the second of 20 states and lasts 29 steps; each of
them leads one state to the left or right. The left end pays 0.001, the right end 1. Which action leads to the right is
another one in each state, drawn by the seed, so that no habit helps. Where random play gets there in one of 1,651
games, a learner has to try, game after game, what it does not know yet.

All use their own script's network, replay and update: 4 games side by side, an update of 32 for every 4 steps, Adam
at 5e-4, the target every 50 steps. DQN's epsilon falls from 1 to 0.05 in the first half of the games; bootstrapped DQN
has 9 heads, masks of 0.9, epsilon 0 and 3-step returns (--n-step). A contestant that got there in half of its last 40
games has solved the chain and stops.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import print_machine, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bootstrapped_dqn_atari  # noqa: E402
import dqn_atari  # noqa: E402
from dqn_atari import SIZE, STACK, linear_schedule  # noqa: E402

NUM_ENVS, BATCH_SIZE = 4, 32
TRAIN_FREQUENCY, TARGET_FREQUENCY, LEARNING_STARTS = 4, 50, 100
CPU = torch.device("cpu")
CONTESTANTS = {"DQN, epsilon-greedy": None, "bootstrapped, no prior": 0.0, "bootstrapped, prior x 10": 10.0}


class Chain:
    """``NUM_ENVS`` games on one chain, which start and end together."""

    def __init__(self, num_states: int, seed: int):
        self.num_states, self.num_steps = num_states, num_states + 9
        self.right = np.random.default_rng(seed).integers(2, size=num_states)  # the action that leads there
        edges = np.linspace(0, SIZE, num_states + 1).round().astype(int)
        self.pictures = np.zeros((num_states, SIZE, SIZE), np.uint8)
        for picture, left, right in zip(self.pictures, edges, edges[1:]):
            picture[10:74, left:right] = 255
        self.reset()

    def reset(self) -> None:
        self.states, self.step_number = np.ones(NUM_ENVS, int), 0
        self.stack = np.zeros((NUM_ENVS, STACK, SIZE, SIZE), np.uint8)
        self.stack[:, -1] = self.pictures[self.states]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        """Rewards, float32 [NUM_ENVS], and whether the games are over."""
        self.states = (self.states + np.where(actions == self.right[self.states], 1, -1)).clip(0, self.num_states - 1)
        self.stack[:, :-1] = self.stack[:, 1:].copy()
        self.stack[:, -1] = self.pictures[self.states]
        self.step_number += 1
        rewards = np.where(self.states == self.num_states - 1, 1.0, np.where(self.states == 0, 0.001, 0.0))
        return rewards.astype(np.float32), self.step_number == self.num_steps


def play(prior_scale: float | None, n_step: int, num_states: int, num_games: int, seed: int) -> tuple:
    """The game in which the right end was first reached, in how many, the number of games, the farthest state."""
    torch.manual_seed(seed)
    chain = Chain(num_states, seed)
    capacity = (num_games + NUM_ENVS) * chain.num_steps
    flags = {"learning_rate": 5e-4, "num_envs": NUM_ENVS, "buffer_size": capacity}
    bootstrapped = prior_scale is not None
    if bootstrapped:
        args = bootstrapped_dqn_atari.Args(prior_scale=prior_scale, n_step=n_step, **flags)
        agent = bootstrapped_dqn_atari.Agent(args, 2, CPU)
        replay = bootstrapped_dqn_atari.Replay(args, CPU)
    else:
        agent = dqn_atari.Agent(dqn_atari.Args(**flags), 2, CPU)
        replay = dqn_atari.Replay(capacity, NUM_ENVS, CPU)
    no_end, global_step, farthest, reached = torch.zeros(NUM_ENVS, dtype=torch.bool), 0, 1, []
    while len(reached) < num_games and sum(reached[-40:]) < 20:
        chain.reset()
        heads = (torch.randint(args.num_heads, (NUM_ENVS,)),) if bootstrapped else ()
        epsilon = 0.0 if bootstrapped else linear_schedule(1, 0.05, num_games / 2, len(reached))
        got_there, over = np.zeros(NUM_ENVS, bool), False
        while not over:
            observations = torch.from_numpy(chain.stack.copy())
            actions = agent.act(observations, torch.tensor(epsilon), *heads)
            rewards, over = chain.step(actions.numpy())
            # the limit is no part of the picture, so that it cuts a game off and does not end it
            replay.add(observations[:, -1], actions, torch.from_numpy(rewards), no_end, no_end | over)
            got_there |= rewards == 1
            farthest = max(farthest, int(chain.states.max()))
            global_step += NUM_ENVS
            if global_step > LEARNING_STARTS:
                for _ in range(NUM_ENVS // TRAIN_FREQUENCY):
                    agent.update(*replay.sample(BATCH_SIZE))
            if global_step % TARGET_FREQUENCY < NUM_ENVS:
                agent.update_target()
        reached += got_there.tolist()
    first = reached.index(True) + 1 if any(reached) else None
    return first, sum(reached), len(reached), farthest + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=20, help="length of the chain, at most 84 (%(default)s)")
    parser.add_argument("--games", type=int, default=400, help="most games of a contestant (%(default)s)")
    parser.add_argument("--n-step", type=int, default=3, help="of bootstrapped DQN (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="(%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    rows = []
    for seed in args.seeds:
        for name, prior_scale in CONTESTANTS.items():
            start = time.process_time()
            first, count, games, farthest = play(prior_scale, args.n_step, args.states, args.games, seed)
            seconds = f"{time.process_time() - start:.0f}"
            rows.append((name, seed, first or "never", f"{count} of {games}", f"{farthest} of {args.states}", seconds))
            print(f"{name}, seed {seed}: {seconds} s", flush=True)
    header = (f"chain of {args.states} states", "seed", "first reached in game", "reached in", "farthest", "CPU s")
    print()
    print_table(header, rows)


if __name__ == "__main__":
    main()
