"""What a GPU user asks, as one table: do the GPU tests pass, how fast is each script, what memory and extras cost.

    python tests/benchmarks/gpu_report.py                          about ten minutes on a GPU
    python tests/benchmarks/gpu_report.py --skip-tests --steps 2000 --buffer-size 100000     on a CPU, slowly

Every script is started as from the shell on Breakout, 8 games if nothing else is said; its speed is the mean of its
charts/SPS after the first 4,000 steps and its first update. "GPU memory" is the most that was in use while it ran, less
what was in use before; "main memory" is the same of this machine, so let nothing else run. The last table says what
evaluations and checkpoints take of a run of DQN with its defaults.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import MISSING, ROOT, print_machine, run, script_metrics

sys.path.insert(0, str(ROOT))
import dqn_atari  # noqa: E402

BENCHMARKS = Path(__file__).resolve().parent
FIRST_STEP = 4000
REPLAY = "--learning-starts 1600 --buffer-size 20000"
SCRIPTS = {
    "dqn_atari.py": ("dqn_atari.py", REPLAY),
    "dqn_atari.py, 32 games": ("dqn_atari.py", f"{REPLAY} --num-envs 32"),
    "dqn_atari.py, 1M transitions": ("dqn_atari.py", "--learning-starts 1600"),
    "dqn_atari_visual.py": ("dqn_atari_visual.py", REPLAY),
    "c51_atari.py": ("c51_atari.py", REPLAY),
    "bootstrapped_dqn_atari.py": ("bootstrapped_dqn_atari.py", REPLAY),
    "ppo_atari.py": ("ppo_atari.py", ""),
    "ppo_atari.py, 64 games": ("ppo_atari.py", "--num-envs 64"),
    "apex_dqn_atari.py": ("apex_dqn_atari.py", "--learning-starts 3000 --buffer-size 200000"),
}
PEERS = {
    "Stable-Baselines3 DQN": ("dqn_speed.py", "--only sb3-8-subproc --steps 3000"),
    "Stable-Baselines3 PPO": ("ppo_speed.py", "--only sb3-8-subproc --iterations 5 --num-envs 8"),
}


class PeakMemory:
    """The most GPU and main memory, in GB, that was taken inside a ``with``."""

    def __enter__(self):
        self.before = self.used()
        self.most = self.before
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.gpu, self.main = (most - before for most, before in zip(self.most, self.before))

    def watch(self) -> None:
        while not self.done.wait(0.1):
            self.most = [max(pair) for pair in zip(self.most, self.used())]

    @staticmethod
    def used() -> list[float]:
        gpu = 0.0
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            gpu = (total - free) / 1e9
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        kilobytes = [int(meminfo[name].split()[0]) for name in ("MemTotal", "MemAvailable")]
        return [gpu, (kilobytes[0] - kilobytes[1]) / 1e6]


def print_markdown(header: list[str], rows: list[list]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(map(str, row)), "|")
    print(flush=True)


def print_tests() -> None:
    """The last line of all tests that need a GPU; what failed goes to stderr."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if result.returncode:
        print(result.stdout, file=sys.stderr)
    print(f"GPU tests: {result.stdout.strip().splitlines()[-1]}\n", flush=True)


def measure(script: str, flags: str, steps: int) -> list[str]:
    """A row of the table of speeds; what fails says so in its row."""
    with PeakMemory() as memory:
        try:
            records = script_metrics(script, flags, FIRST_STEP, steps)
        except SystemExit as error:
            print(error, file=sys.stderr)
            return ["failed", "", "", "", ""]
    speed = statistics.harmonic_mean([record["charts/SPS"] for record in records])
    updates = [record["charts/updates_per_second"] for record in records if "charts/updates_per_second" in record]
    updates = f"{statistics.mean(updates):.1f}" if updates else ""
    hours = 1e7 / speed / 3600
    return [f"{speed:,.0f}", f"{hours:.1f}", updates, f"{memory.gpu:.1f}", f"{memory.main:.1f}"]


def measure_peer(script: str, flags: str) -> list[str]:
    if not importlib.util.find_spec("stable_baselines3"):
        return [MISSING, "", "", "", ""]
    speed = float(run([sys.executable, BENCHMARKS / script, *flags.split()], ROOT).split()[-1])
    return [f"{speed:,.0f}", f"{1e7 / speed / 3600:.1f}", "", "", ""]


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def print_extras(speed: float, buffer_size: int) -> None:
    """What an evaluation and a checkpoint take, and their share of 10 million steps at ``speed``."""
    device = dqn_atari.find_device("auto")
    args = dqn_atari.Args(env_id="Pong", buffer_size=buffer_size, wandb_mode="disabled", eval_episodes=1)
    dqn_atari.set_up_torch(args, device)
    agent = dqn_atari.Agent(args, 6, device)
    replay = dqn_atari.Replay(buffer_size, args.num_envs, dqn_atari.find_replay_device(args, device))
    replay.num_steps = replay.max_steps  # as if full
    replay.frames.fill_(1)  # pages that were never written take no time
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder)
        tracker = dqn_atari.Tracker(args, folder)

        def play(frames: int, video: bool) -> float:
            """Seconds of an evaluation of one game of Pong, which is cut off after so many frames."""
            flags = replace(args, max_episode_frames=frames, capture_video=video)
            return seconds(dqn_atari.evaluate, flags, agent, 0, folder, tracker)

        # no game of Pong is over after 2,000 frames; the difference leaves out what starting a game takes
        recorded, unrecorded = ((play(2000, video) - play(1000, video)) / 250 for video in (True, False))
        checkpoint = seconds(lambda: dqn_atari.save(folder / "checkpoint.pt", {"replay": replay.state_dict()}))
    training = 1e7 / speed
    evaluation = 1500 * (recorded + 4 * unrecorded)
    evaluations = 11 * evaluation
    checkpoints = training / (60 * args.checkpoint_minutes) * checkpoint
    print_markdown(
        ["DQN's defaults", ""],
        [
            ["a step of an evaluation, recorded", f"{1000 * recorded:.2f} ms"],
            ["a step of an evaluation, not recorded", f"{1000 * unrecorded:.2f} ms"],
            ["an evaluation of 5 games of 1,500 steps", f"{evaluation:.1f} s"],
            [f"a checkpoint with {replay.capacity:,} transitions", f"{checkpoint:.1f} s"],
            ["11 evaluations in 10M steps, share of the time", f"{evaluations / training:.1%}"],
            ["checkpoints, share of the time", f"{checkpoints / training:.1%}"],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = 40_000 if torch.cuda.is_available() else 3000
    parser.add_argument("--steps", type=int, default=default, help="steps on the clock, in thousands (%(default)s)")
    parser.add_argument("--buffer-size", type=int, default=1_000_000, help="of the checkpoint (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, *PEERS], help="these rows only")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the GPU tests")
    args = parser.parse_args()
    if args.steps < 1000 or args.steps % 1000:
        parser.error("--steps must be a multiple of 1000: the scripts log their speed that often")
    print_machine()
    if not args.skip_tests:
        print_tests()
    rows = []
    for name in args.only or [*SCRIPTS, *PEERS]:
        figures = measure(*SCRIPTS[name], args.steps) if name in SCRIPTS else measure_peer(*PEERS[name])
        rows.append([name, *figures])
        print(*rows[-1], file=sys.stderr, flush=True)
    header = ["", "steps/s", "hours for 10M", "updates/s", "GPU memory, GB", "main memory, GB"]
    print_markdown(header, rows)
    speeds = [row[1] for row in rows if row[0] == "dqn_atari.py" and row[1] != "failed"]
    if speeds:
        print_extras(float(speeds[0].replace(",", "")), args.buffer_size)


if __name__ == "__main__":
    main()
