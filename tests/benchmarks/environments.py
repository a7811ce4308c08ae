"""Agent steps per second of 8 Atari games with random actions: AtariVector against EnvPool, ALE and Gymnasium.

    python tests/benchmarks/environments.py
    python tests/benchmarks/environments.py --env-id Pong --rounds 15

All have the same settings: 4 frames a step, the maximum of the last two in gray at 84x84, 4 of them stacked, up to 30
idle frames at the start of a game, no sticky actions, rewards clipped, a lost life ends the episode, then FIRE is
pressed; 2 threads or processes; every step waits for all games. What the peers offer no setting for is left:
- a reset is a step of its own to them, and is counted; AtariVector resets within the step;
- EnvPool also idles up to 29 frames after each lost life;
- Gymnasium starts a new game after each lost life, presses no FIRE, and has 8 processes (Async) or none (Sync).

The bare emulator is one process that plays one game and reads no screen: the most that one core can do.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
from ale_py import roms
from common import MISSING, median_ratio, play_rounds, print_machine, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dqn_atari  # noqa: E402

NUM_ENVS, NUM_WORKERS = 8, 2


# Each contestant is a function of the game's name ("Breakout") that returns how it makes one step with the actions
# (int64 [8]) and how it is closed.


def atari_vector(game: str, num_workers: int) -> tuple[Callable, Callable]:
    envs = dqn_atari.AtariVector(dqn_atari.Args(env_id=game, num_envs=NUM_ENVS, num_workers=num_workers))
    envs.reset(1)

    def step(actions):
        envs.send(actions)
        envs.recv()

    return step, envs.close


def env_pool(game: str) -> tuple[Callable, Callable]:
    import envpool

    envs = envpool.make(
        f"{game}-v5",
        env_type="gymnasium",
        num_envs=NUM_ENVS,
        num_threads=NUM_WORKERS,
        seed=1,
        frame_skip=4,
        stack_num=4,
        noop_max=30,
        repeat_action_probability=0.0,
        reward_clip=True,
        episodic_life=True,
        use_fire_reset=True,
    )  # the rest is its default: 84x84, gray, resized by area
    envs.reset()
    return lambda actions: envs.step(actions.astype(np.int32)), envs.close


def ale_vector(game: str) -> tuple[Callable, Callable]:
    from ale_py.vector_env import AtariVectorEnv

    envs = AtariVectorEnv(
        gym.spec(f"ALE/{game}-v5").kwargs["game"],
        NUM_ENVS,
        num_threads=NUM_WORKERS,
        frameskip=4,
        stack_num=4,
        noop_max=30,
        repeat_action_probability=0.0,
        reward_clipping=True,
        episodic_life=True,
        use_fire_reset=True,
    )  # the rest is its default: 84x84, gray, the maximum of two frames
    envs.reset(seed=1)
    return envs.step, envs.close


def gymnasium_vector(game: str, vector_class: type) -> tuple[Callable, Callable]:
    def make():
        # gray observations: the wrapper reads the screen itself and drops these, so the cheapest ones serve it best
        env = gym.make(f"ALE/{game}-v5", obs_type="grayscale", frameskip=1, repeat_action_probability=0.0)
        env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, terminal_on_life_loss=True)
        return gym.wrappers.FrameStackObservation(gym.wrappers.ClipReward(env, -1, 1), 4)

    envs = vector_class([make] * NUM_ENVS)
    envs.reset(seed=1)
    return envs.step, envs.close


def emulator(game: str) -> tuple[Callable, Callable]:
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(gym.spec(f"ALE/{game}-v5").kwargs["game"]))
    emulator_actions = ale.getMinimalActionSet()

    def step(actions):  # as many steps of one game as the others make with one in each of 8
        for action in actions.tolist():
            for _ in range(4):
                ale.act(emulator_actions[action])
                if ale.game_over():
                    ale.reset_game()

    return step, lambda: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="Breakout", help="the game (%(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="agent steps of each contestant a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all contestants (%(default)s)")
    args = parser.parse_args()
    print_machine()
    game = dqn_atari.Atari.find_game(args.env_id)
    makers = {  # those that fork come first: a fork does not take threads along
        "AtariVector, 2 processes": partial(atari_vector, game, NUM_WORKERS),
        "AtariVector, this process": partial(atari_vector, game, 0),
        "Gymnasium AsyncVectorEnv": partial(gymnasium_vector, game, gym.vector.AsyncVectorEnv),
        "Gymnasium SyncVectorEnv": partial(gymnasium_vector, game, gym.vector.SyncVectorEnv),
        "EnvPool, 2 threads": partial(env_pool, game),
        "ALE AtariVectorEnv, 2 threads": partial(ale_vector, game),
        "bare emulator, one core": partial(emulator, game),
    }
    ours, peer = "AtariVector, 2 processes", "EnvPool, 2 threads"
    num_actions = int(dqn_atari.Atari(dqn_atari.Args(env_id=game)).action_space.n)
    rng = np.random.default_rng(1)

    def steps_per_second(step: Callable, steps: int) -> float:
        actions = rng.integers(num_actions, size=(max(steps // NUM_ENVS, 1), NUM_ENVS))
        start = time.perf_counter()
        for row in actions:
            step(row)
        return actions.size / (time.perf_counter() - start)

    contestants, closers = {}, []
    for name, make in makers.items():
        try:
            step, close = make()
        except ImportError:
            print(f"{name}: {MISSING}")
            continue
        steps_per_second(step, 800)  # the first steps are slower
        contestants[name] = partial(steps_per_second, step, args.steps)
        closers.append(close)

    figures = play_rounds(contestants, args.rounds)
    for close in closers:
        close()
    rows = []
    for name, rates in figures.items():
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows.append((name, f"{statistics.median(rates):,.0f}", spread, f"{median_ratio(figures[ours], rates):.2f} x"))
    print_table((f"{game}, {args.rounds} rounds", "steps/s", "range", "AtariVector is"), rows)
    ratio = f"{median_ratio(figures[ours], figures[peer]):.2f} x" if peer in figures else "no"
    print(f"ratio: {ratio} EnvPool")


if __name__ == "__main__":
    main()
