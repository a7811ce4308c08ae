"""Agent steps per second of PPO on Breakout: ppo_atari.py against Stable-Baselines3, by number of games.

    python tests/benchmarks/ppo_speed.py
    python tests/benchmarks/ppo_speed.py --num-envs 8 --iterations 10 --rounds 1
    python tests/benchmarks/ppo_speed.py --only sb3-8-subproc

Both with the same hyperparameters, those of ppo_atari.py: 128 steps of each game an iteration, 4 passes over 4
minibatches, Adam at 2.5e-4. Stable-Baselines3 plays its games in its own process or in processes of theirs; a ratio is
to the faster of the two with as many games. The first two iterations are left out. Every contestant has a process of
its own; ppo_atari.py is started as from the shell and its charts/SPS are read from the W&B file.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from common import MISSING, ROOT, median_ratio, play_rounds, print_machine, print_table, run, script_speed

NUM_STEPS = 128


def ours(num_envs: int, precision: str, iterations: int) -> float:
    rollout = NUM_STEPS * num_envs
    return script_speed(
        "ppo_atari.py", f"--num-envs {num_envs} --precision {precision}", 2 * rollout, iterations * rollout
    )


def sb3(num_envs: int, kind: str, iterations: int) -> float:
    from sb3 import make_envs, make_ppo
    from stable_baselines3.common.callbacks import BaseCallback

    starts = []  # of the iterations

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            starts.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

    envs = make_envs("Breakout", num_envs, kind, seed=1)
    agent = make_ppo(envs, seed=1)
    rollout = NUM_STEPS * num_envs
    agent.learn((2 + iterations + 1) * rollout, callback=Clock())
    envs.close()
    return iterations * rollout / (starts[2 + iterations] - starts[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", nargs="+", type=int, default=[8, 16, 32, 64], help="games (%(default)s)")
    parser.add_argument("--iterations", type=int, default=10, help="iterations on the clock (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all contestants (%(default)s)")
    parser.add_argument("--only", metavar="NAME", help="run one contestant once and print its steps a second")
    args = parser.parse_args()
    contestants = {f"ours-{args.num_envs[0]}-float32": partial(ours, args.num_envs[0], "float32", args.iterations)}
    for n in args.num_envs:
        contestants[f"ours-{n}-auto"] = partial(ours, n, "auto", args.iterations)
        if importlib.util.find_spec("stable_baselines3"):
            contestants |= {f"sb3-{n}-{kind}": partial(sb3, n, kind, args.iterations) for kind in ("dummy", "subproc")}
    if not importlib.util.find_spec("stable_baselines3"):
        print(f"Stable-Baselines3: {MISSING}")
    if args.only:
        if args.only not in contestants:
            parser.error(f"--only {args.only} is none of {', '.join(contestants)}")
        print(contestants[args.only]())
        return
    print_machine()

    def only(name: str) -> float:
        flags = ["--only", name, "--iterations", args.iterations, "--num-envs", *args.num_envs]
        return float(run([sys.executable, Path(__file__).resolve(), *flags], ROOT).split()[-1])

    figures = play_rounds({name: partial(only, name) for name in contestants}, args.rounds)
    rows = []
    for name, rates in figures.items():
        peers = [rates for peer, rates in figures.items() if peer.startswith(f"sb3-{name.split('-')[1]}-")]
        ratio = f"{median_ratio(rates, max(peers, key=statistics.median)):.2f} x" if peers else "-"
        rows.append((name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", ratio))
    print_table((f"{args.iterations} iterations, {args.rounds} rounds", "steps/s", "range", "of the faster sb3"), rows)


if __name__ == "__main__":
    main()
