"""Milliseconds a frame of the visual laboratory on one core, by saliency method, and memory of a long recording.

    python tests/benchmarks/visual_speed.py
    python tests/benchmarks/visual_speed.py --only speed --rounds 3
    python tests/benchmarks/visual_speed.py --only memory --steps 1000 20000

Speed: all panels, Breakout, 4 and 18 actions, full traces. A frame is the saliency map, Overlay.note and
Overlay.render, with one thread; "CPU" is the processor's time for it, which a busy machine stretches less than the
wall clock. "Recorder.write" is the drawing, without saliency, and the encoding: ffmpeg encodes in a process of its
own, but writing waits for it.

Memory: `evaluate` plays one game of ElevatorAction, which random play does not end, for so many steps, and records it
to its end; each length in a process of its own, whose peak (without ffmpeg's) is shown.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from common import play_rounds, print_machine, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dqn_atari_visual  # noqa: E402
from dqn_atari_visual import SALIENCY, TRACE_STEPS, Agent, Args, Atari, Overlay, Recorder, Tracker  # noqa: E402

CPU = torch.device("cpu")
rng = np.random.default_rng(1)


class Player:
    """A random game with an overlay; Q-values that differ in all their digits, every 8th action explores."""

    def __init__(self, saliency: str, full_action_space: bool):
        args = Args(env_id="Breakout", full_action_space=full_action_space, saliency=saliency)
        self.overlay = Overlay(Atari(args), "dqn_atari_visual \u2022 trained 1,250,000 steps", args)
        self.overlay.env.recording = True
        self.overlay.reset(seed=1)
        self.agent = Agent(args, int(self.overlay.action_space.n), CPU)
        while len(self.overlay.steps) < TRACE_STEPS:  # a trace starts anew with every game
            self.think()
            self.step()

    def think(self, saliency: np.ndarray | None = None) -> None:
        q_values = (2 + rng.normal(scale=0.1, size=self.overlay.action_space.n)).astype(np.float32)
        action = int(rng.integers(len(q_values)) if rng.random() < 1 / 8 else q_values.argmax())
        self.overlay.note(q_values, action, saliency)

    def step(self) -> None:
        _, _, terminated, truncated, _ = self.overlay.step(self.overlay.action)
        if terminated or truncated:
            self.overlay.env.reset()  # not the overlay's own: that would empty the trace
            self.overlay.last_return = 0.0

    def frame(self) -> None:
        method, saliency = self.overlay.args.saliency, None
        if method != "none":
            observation = dqn_atari_visual.upload(self.overlay.env.stack, CPU)
            saliency = SALIENCY[method](self.agent.q_network, observation, 0)
        self.think(saliency)
        self.overlay.render()

    def record(self, recorder: Recorder) -> None:
        self.think()
        recorder.write(self.overlay)


def milliseconds(player: Player, draw: Callable[[], None], frames: int) -> tuple[float, float]:
    """Of wall clock and of this process's CPU time, a frame."""
    clocks = np.zeros(2)
    for _ in range(frames):
        start = time.perf_counter(), time.process_time()
        draw()
        clocks += time.perf_counter() - start[0], time.process_time() - start[1]
        player.step()
    return tuple(1000 * clocks / frames)


def measure_speed(frames: int, rounds: int) -> None:
    torch.set_num_threads(1)
    contestants, recorders = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for num_actions in (4, 18):
            for method in ("none", *SALIENCY):
                player = Player(method, full_action_space=num_actions == 18)
                draws = {f"saliency {method}": player.frame}
                if method == "none":
                    recorders.append(Recorder(Path(folder) / f"{num_actions}.mp4", sys.maxsize))
                    draws["Recorder.write"] = partial(player.record, recorders[-1])
                for name, draw in draws.items():
                    milliseconds(player, draw, 10)  # fonts, masks and ffmpeg are loaded by the first frames
                    contestants[name, num_actions] = partial(milliseconds, player, draw, frames)
        figures = play_rounds(contestants, rounds)
        for recorder in recorders:
            recorder.close()
    rows = []
    for name in dict.fromkeys(name for name, _ in figures):
        medians = [statistics.median(pair[i] for pair in figures[name, n]) for n in (4, 18) for i in (0, 1)]
        rows.append((name, *(f"{median:.2f}" for median in medians)))
    precision = dqn_atari_visual.find_precision("auto", CPU)
    header = (f"ms a frame, {precision}, {rounds} rounds", "4 actions", "CPU", "18 actions", "CPU")
    print_table(header, rows)


def record(steps: int, saliency: str) -> None:
    """Prints the peak of this process's memory in MB and the pictures in the video of a game of so many steps."""
    torch.set_num_threads(1)
    args = Args(env_id="ElevatorAction", eval_episodes=1, eval_epsilon=1.0, episodic_life=False, saliency=saliency)
    args.max_episode_frames, args.video_length = 4 * steps + 40, steps  # 40: the idle frames at the start
    agent = Agent(args, int(Atari(args).action_space.n), CPU)
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(Args(wandb_mode="disabled"), Path(folder))
        dqn_atari_visual.evaluate(args, agent, 0, Path(folder), tracker)
        (video,) = Path(folder).glob("videos/*.mp4")
        pictures, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, pictures)


def measure_memory(lengths: list[int], saliency: str) -> None:
    rows = []
    for steps in lengths:
        command = [sys.executable, __file__, "--record", str(steps), "--saliency", saliency]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak, pictures = output.splitlines()[-1].split()
        rows.append((f"{steps:,} steps", f"{int(pictures):,}", f"{float(peak):.0f}"))
    print_table((f"one game, saliency {saliency}", "pictures", "peak MB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "memory"), help="one of the two measurements")
    parser.add_argument("--frames", type=int, default=50, help="frames of each contestant a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all contestants (%(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 20_000], help="lengths recorded (%(default)s)")
    parser.add_argument("--saliency", choices=("none", *SALIENCY), default="perturbation", help="(%(default)s)")
    parser.add_argument("--record", type=int, metavar="STEPS", help="record in this process and print its peak")
    args = parser.parse_args()
    if args.record:
        return record(args.record, args.saliency)
    print_machine()
    if args.only != "memory":
        measure_speed(args.frames, args.rounds)
    if args.only != "speed":
        measure_memory(args.steps, args.saliency)


if __name__ == "__main__":
    main()
