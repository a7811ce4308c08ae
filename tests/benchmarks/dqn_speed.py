"""Agent steps per second of DQN on Breakout while it learns: dqn_atari.py against Stable-Baselines3.

    python tests/benchmarks/dqn_speed.py
    python tests/benchmarks/dqn_speed.py --steps 2000 --rounds 1
    python tests/benchmarks/dqn_speed.py --only sb3-8-dummy

Both with the same hyperparameters: batches of 32, an update for every 4 steps, 20,000 transitions, learning from step
1,600, the target every 1,000 steps, Adam at 1e-4, 4 frames stacked, epsilon from 1 to 0.01 in the first tenth of the
run. Stable-Baselines3 plays 1 game, or 8 of them in its own process or in processes of theirs; the fastest counts.
The clock runs from step 2,000 to the end. Every contestant has a process of its own, so that none disturbs the next;
dqn_atari.py is started as from the shell and its charts/SPS are read from the W&B file.

Then the parts of a step of dqn_atari.py: 8 games advance by one while the learner makes 2 updates.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import MISSING, ROOT, median_ratio, play_rounds, print_machine, print_table, run, script_speed

sys.path.insert(0, str(ROOT))
import dqn_atari  # noqa: E402

LEARNING_STARTS, BUFFER_SIZE = 1600, 20_000
FIRST_STEP = 2000  # the clock starts here: the first updates, which are slower, are over


# ------------------------------------------------------------------------------------- contestants: steps per second


def ours(precision: str, steps: int) -> float:
    flags = f"--precision {precision} --learning-starts {LEARNING_STARTS} --buffer-size {BUFFER_SIZE}"
    return script_speed("dqn_atari.py", flags, FIRST_STEP, steps)


def sb3(num_envs: int, kind: str, steps: int) -> float:
    from sb3 import make_dqn, make_envs
    from stable_baselines3.common.callbacks import BaseCallback

    clock = []

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps >= (FIRST_STEP if not clock else FIRST_STEP + steps):
                clock.append((self.num_timesteps, time.perf_counter()))
            return len(clock) < 2

    envs = make_envs("Breakout", num_envs, kind, seed=1)
    schedule = {"learning_starts": LEARNING_STARTS, "exploration_fraction": 0.10}
    agent = make_dqn(envs, seed=1, buffer_size=BUFFER_SIZE, **schedule)
    agent.learn(FIRST_STEP + steps, callback=Clock())
    envs.close()
    (first_step, start), (last_step, end) = clock
    return (last_step - first_step) / (end - start)


CONTESTANTS = {
    "ours-float32": partial(ours, "float32"),
    "ours-bfloat16": partial(ours, "bfloat16"),
    "sb3-1-dummy": partial(sb3, 1, "dummy"),
    "sb3-8-dummy": partial(sb3, 8, "dummy"),
    "sb3-8-subproc": partial(sb3, 8, "subproc"),
}


def compare(steps: int, rounds: int) -> str:
    """Prints the first table; returns the line with the ratios."""
    names = list(CONTESTANTS)
    if importlib.util.find_spec("stable_baselines3") is None:
        print(f"Stable-Baselines3: {MISSING}")
        names = [name for name in names if not name.startswith("sb3")]

    def only(name: str) -> float:
        output = run([sys.executable, Path(__file__).resolve(), "--only", name, "--steps", steps], ROOT)
        return float(output.split()[-1])

    figures = play_rounds({name: partial(only, name) for name in names}, rounds)
    rows = []
    for name, rates in figures.items():
        rows.append((name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"))
    print_table((f"Breakout, {steps:,} steps, {rounds} rounds", "steps/s", "range"), rows)
    peers = [name for name in names if name.startswith("sb3")]
    if not peers:
        return "ratio: no Stable-Baselines3"
    fastest = max(peers, key=lambda name: statistics.median(figures[name]))
    float32, bfloat16 = (median_ratio(figures[name], figures[fastest]) for name in names[:2])
    return f"ratio: {float32:.2f} x Stable-Baselines3 ({fastest}) in float32, {bfloat16:.2f} x in bfloat16"


# --------------------------------------------------------------------------------------------- where the time goes


def milliseconds(function: Callable, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def print_parts(calls: int, rounds: int) -> None:
    """Prints the second table: each part alone, with the whole machine to itself."""
    args = dqn_atari.Args(env_id="Breakout", buffer_size=BUFFER_SIZE)
    envs = dqn_atari.AtariVector(args)  # first, since it forks
    envs.reset(1)
    observations = torch.from_numpy(envs.observations.copy())
    device = dqn_atari.find_device("auto")
    graph = dqn_atari.CudaGraph if device.type == "cuda" else lambda function: function
    replay = dqn_atari.Replay(BUFFER_SIZE, args.num_envs, device)
    observations, epsilon = observations.to(device), torch.zeros((), device=device)
    actions = torch.zeros(args.num_envs, dtype=torch.int64, device=device)
    idle = actions.cpu().numpy()
    rewards, ends = idle.astype("float32"), idle > 0

    def add():
        replay.add(observations[:, -1], actions, rewards, ends, ends)

    for _ in range(replay.max_steps):
        add()

    def step_games():
        envs.send(idle)
        envs.recv()

    # the function of each part and how often a step calls it
    parts = {"games: a step of 8": (step_games, 1), "learner: add 8 to the replay": (add, 1)}
    parts["learner: sample 32"] = (graph(partial(replay.sample, args.batch_size)), 2)
    for precision in ("float32", "bfloat16"):
        args.precision = precision
        agent, batch = dqn_atari.Agent(args, envs.num_actions, device), replay.sample(args.batch_size)
        parts[f"learner: act for 8, {precision}"] = (partial(graph(agent.act), observations, epsilon), 1)
        parts[f"learner: update, {precision}"] = (partial(graph(agent.update), *batch), 2)
    for function, _ in parts.values():
        milliseconds(function, 5)
    figures = play_rounds({name: partial(milliseconds, part[0], calls) for name, part in parts.items()}, rounds)
    envs.close()
    rows = []
    for name, times in figures.items():
        once, count = statistics.median(times), parts[name][1]
        rows.append((name, f"{once:.2f}", count, f"{once * count:.2f}"))
    print_table(("part of a step of 8 games", "ms", "times", "ms a step"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="steps on the clock, in thousands (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all contestants (%(default)s)")
    parser.add_argument("--only", choices=CONTESTANTS, help="run one contestant once and print its steps a second")
    args = parser.parse_args()
    if args.steps < 1000 or args.steps % 1000:
        parser.error("--steps must be a multiple of 1000: dqn_atari.py logs its speed that often")
    if args.only:
        print(CONTESTANTS[args.only](args.steps))
        return
    print_machine()
    ratios = compare(args.steps, args.rounds)
    print_parts(calls=50, rounds=2 * args.rounds + 1)
    print(ratios)


if __name__ == "__main__":
    main()
