"""Learning curves: the scripts beside Stable-Baselines3 at equal settings, and beside each other.

    python tests/benchmarks/study.py ppo
    python tests/benchmarks/study.py dqn --seeds 1 2 --games Breakout --jobs 2
    python tests/benchmarks/study.py all
    python docs/compare.py study/ppo/runs --metric charts/episodic_return

A queue of runs in a folder under study/. Stop it with Ctrl-C or kill it: started again with the same flags, it goes on
with each run from its last checkpoint. With --jobs 2, two runs share the cores, one thread each.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SHORT = "--total-timesteps 300000 --learning-starts 10000 --exploration-fraction 0.33 --buffer-size 100000"
PPO_SHORT = "--total-timesteps 1000000"
# C51 and Bootstrapped DQN copy the target network more often than in their papers, for so short a run
ALL = "--total-timesteps 500000 --eval-frequency 100000"
ALL_REPLAY = f"{ALL} --learning-starts 10000 --buffer-size 500000"
ALL_DQN = f"{ALL_REPLAY} --exploration-fraction 0.2"


class Kind(NamedTuple):
    """What is run with each game and seed."""

    exp_name: str
    command: str  # a file and its flags


STUDIES = {
    "ppo": [
        Kind("ppo_atari", f"ppo_atari.py {PPO_SHORT} --eval-frequency 250000"),
        Kind("sb3_ppo", f"tests/benchmarks/sb3.py ppo {PPO_SHORT}"),
    ],
    "dqn": [
        Kind("dqn_bfloat16", f"dqn_atari.py {SHORT} --eval-frequency 100000 --precision bfloat16"),
        Kind("dqn_float32", f"dqn_atari.py {SHORT} --eval-frequency 100000 --precision float32"),
        Kind("sb3_dqn", f"tests/benchmarks/sb3.py dqn {SHORT}"),
    ],
    "all": [
        Kind("dqn_atari", f"dqn_atari.py {ALL_DQN}"),
        Kind("c51_atari", f"c51_atari.py {ALL_DQN} --target-network-frequency 2000"),
        Kind("bootstrapped_dqn_atari", f"bootstrapped_dqn_atari.py {ALL_REPLAY} --target-network-frequency 2000"),
        Kind("apex_dqn_atari", f"apex_dqn_atari.py {ALL_REPLAY} --steps-per-update 20 --batch-size 32"),
        Kind("ppo_atari", f"ppo_atari.py {ALL}"),
    ],
}
GAMES = {
    "ppo": ["Breakout", "Pong"],
    "dqn": ["Breakout", "Boxing"],
    "all": ["MsPacman", "YarsRevenge", "Frostbite"],
}


class Job(NamedTuple):
    kind: Kind
    game: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.game}__{self.kind.exp_name}__{self.seed}"

    def command(self, folder: Path) -> list[str] | None:
        """What starts the run or goes on with it; None if it has ended."""
        file, *flags = self.kind.command.split()
        command = [sys.executable, str(ROOT / file)]
        of_the_run = [*flags, "--env-id", self.game, "--seed", str(self.seed)]
        is_peer = self.kind.exp_name.startswith("sb3")
        if not is_peer:
            of_the_run += ["--exp-name", self.kind.exp_name, "--wandb-mode", "offline"]
        for run_dir in (folder / "runs").glob(f"{self.name}__*"):
            if (run_dir / "model.pt").exists():
                return None
            if (run_dir / "checkpoint.pt").exists():
                return command + (of_the_run if is_peer else ["--wandb-mode", "offline"]) + ["--resume", str(run_dir)]
            shutil.rmtree(run_dir)  # it was killed before its first checkpoint
        return command + of_the_run

    def start(self, command: list[str], folder: Path, jobs: int) -> subprocess.Popen:
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
        tell(f"{self.name}: {' '.join(command[1:])}")
        with open(folder / f"{self.name}.log", "a") as log:
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def play(queue: list[Job], folder: Path, jobs: int) -> None:
    """Keeps ``jobs`` runs going until all have ended."""
    running = []
    try:
        while queue or running:
            while queue and len(running) < jobs:
                job = queue.pop(0)
                command = job.command(folder)
                if command:
                    running.append((job, job.start(command, folder, jobs)))
            time.sleep(1)
            for job, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((job, process))
                tell(f"{job.name}: exit code {process.returncode}")
    except KeyboardInterrupt:
        for _, process in running:
            process.terminate()  # each saves a checkpoint
        for _, process in running:
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--games", nargs="+", help="instead of the study's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="experiments of the study, all by default")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--folder", type=Path, default="study", help="of all studies (%(default)s)")
    args = parser.parse_args()
    folder = (args.folder / args.study).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    kinds = [kind for kind in STUDIES[args.study] if not args.only or kind.exp_name in args.only]
    games = args.games or GAMES[args.study]
    queue = [Job(kind, game, seed) for game in games for seed in args.seeds for kind in kinds]
    play(queue, folder, args.jobs)


if __name__ == "__main__":
    main()
