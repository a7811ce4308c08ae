"""Agent steps per second of each script on Breakout while it learns, beside dqn_atari.py's in the same run.

    python tests/benchmarks/scripts_speed.py
    python tests/benchmarks/scripts_speed.py --scripts dqn_atari c51_atari --num-envs 8 32 --steps 20000
    python tests/benchmarks/scripts_speed.py --flags "--precision float32"

Every script is started as from the shell, with its defaults but for learning from step 1,600 on with 20,000
transitions where it has a replay; charts/SPS are read from its W&B file. The first 2,000 steps are left out.
"""

import argparse
import statistics
from functools import partial

from common import median_ratio, play_rounds, print_machine, print_table, script_speed

REPLAY = "--learning-starts 1600 --buffer-size 20000"
FIRST_STEP = 2000
# the flags of each script; dqn_atari.py is what the others are compared with
SCRIPTS = {
    "dqn_atari": REPLAY,
    "dqn_atari_visual": REPLAY,
    "c51_atari": REPLAY,
    "bootstrapped_dqn_atari": REPLAY,
    "ppo_atari": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="(default: all)")
    parser.add_argument("--num-envs", nargs="+", type=int, default=[8], help="games side by side (%(default)s)")
    parser.add_argument("--flags", default="", help="further flags for every script")
    parser.add_argument("--steps", type=int, default=4000, help="steps on the clock, in thousands (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all contestants (%(default)s)")
    args = parser.parse_args()
    if args.steps < 1000 or args.steps % 1000:
        parser.error("--steps must be a multiple of 1000: the scripts log their speed that often")
    print_machine()
    contestants = {}
    for num_envs in args.num_envs:
        for script in dict.fromkeys(["dqn_atari", *args.scripts]):
            flags = f"{SCRIPTS[script]} --num-envs {num_envs} {args.flags}"
            contestants[script, num_envs] = partial(script_speed, f"{script}.py", flags, FIRST_STEP, args.steps)
    figures = play_rounds(contestants, args.rounds)
    rows = []
    for (script, num_envs), rates in figures.items():
        ratio = median_ratio(rates, figures["dqn_atari", num_envs])
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows.append((script, num_envs, f"{statistics.median(rates):,.0f}", spread, f"{ratio:.2f} x"))
    header = (f"{args.steps:,} steps, {args.rounds} rounds", "games", "steps/s", "range", "dqn_atari's")
    print_table(header, rows)


if __name__ == "__main__":
    main()
