"""What several test files use: runs of the scripts and what they leave, random batches, a replay to compare with."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from warm import Run

from dqn_atari import SIZE, STACK

HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
# for tests that train: where the CPU has no instructions for it, they would take ten times as long
IN_BFLOAT16 = pytest.param(
    "bfloat16", marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="needs a CPU with bfloat16 instructions")
)
LEARNING = "--learning-starts 400 --buffer-size 1000 --batch-size 8 --train-frequency 16"
SHORT = f"--env-id Breakout --num-envs 4 {LEARNING} --eval-episodes 1 --device cpu"
OFTEN = " --checkpoint-minutes 0.01"  # each takes a fifth of a second
NO_EXTRAS = SHORT + " --eval-frequency 0 --no-capture-video --wandb-mode disabled"


STARTED = []  # the runs that ``start`` has started: conftest.py ends what a failed test has left behind


def start(folder: Path, flags: str, script="dqn_atari.py", env=None, cold=False, **options) -> Run | subprocess.Popen:
    """Starts a script: by its command if ``cold`` or with ``options`` of ``Popen``, else faster, see warm.py."""
    command = [str(ROOT / script), *flags.split()]
    if cold or options or sys.platform != "linux":
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=env, **piped | options)
    else:
        process = Run(folder, command, dict(os.environ if env is None else env))
    STARTED.append(process)
    return process


def run(folder: Path, flags: str, script="dqn_atari.py", **options) -> subprocess.CompletedProcess:
    process = start(folder, flags, script, **options)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(flags, process.returncode, stdout, stderr)


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def saved_step(folder: Path) -> int:
    """The step of the checkpoint of the run in ``folder``; 0 while there is none."""
    checkpoints = list(folder.glob("runs/*/checkpoint.pt"))
    return torch.load(checkpoints[0], weights_only=True, mmap=True)["global_step"] if checkpoints else 0


def wait_for(condition, process: subprocess.Popen, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_group_is_gone(pid: int) -> None:
    """No process of the run is left within 10 seconds (W&B's own service ends by itself too)."""
    deadline = time.monotonic() + 10
    while True:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "processes are left behind"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_next_checkpoint(checkpoint: Path, process) -> None:
    """... and looks whether a process of the run still has the old one open, which would keep its disk space."""
    replaced = checkpoint.stat().st_ino
    wait_for(lambda: checkpoint.stat().st_ino != replaced, process)
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in [process.pid, *children(process.pid)]}
    assert len(maps) > 2 and not [pid for pid, text in maps.items() if "checkpoint.pt" in text]


def assert_same_end(one: Path, other: Path) -> None:
    """The runs in both folders have ended with the same checkpoint, to the bit."""
    ends = [torch.load(run_folder(folder) / "checkpoint.pt", weights_only=True) for folder in (one, other)]
    for name in ("args", "wandb_run_id"):
        assert ends[0].pop(name) != ends[1].pop(name)
    assert_same(*ends)


def assert_same(a, b) -> None:
    """Of two states of nested dictionaries, lists, tensors and plain values, every bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def wandb_records(folder: Path) -> list[dict]:
    (record,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def read_video(path):
    frames = imageio_ffmpeg.read_frames(str(path))
    meta = next(frames)
    return meta, [np.frombuffer(frame, np.uint8).reshape(meta["size"][1], meta["size"][0], 3) for frame in frames]


def drawn_texts(env, monkeypatch) -> list[str]:
    """All that ``render`` writes on the picture, which it leaves without them."""
    texts = []
    with monkeypatch.context() as patch:
        patch.setattr(env, "text", lambda text, x, *rest, **more: texts.append(text) or x)
        env.render()
    return texts


def random_batch(size=32, num_actions=2):
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (size, 5, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    actions = torch.randint(num_actions, (size,), generator=generator)
    rewards = torch.randn(size, generator=generator)
    terminated = torch.rand(size, generator=generator) >= 0.8
    return frames[:, :STACK], actions, rewards, frames[:, 1:], terminated


def state_frame(state: int) -> torch.Tensor:
    frame = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    frame[20:64, 16 * state : 16 * state + 16] = 255
    return frame


class SmallTrunk(nn.Sequential):
    """Stands in for a network's convolutions where a test trains its heads: it sees the newest frame, coarsely."""

    def __init__(self, features=512):
        super().__init__(nn.AvgPool2d(12), nn.Flatten(), nn.Linear(7 * 7, features), nn.ReLU())

    def forward(self, pixels):
        return super().forward(pixels[:, -1:])


def with_small_trunk(network: type, features=512) -> type:
    class SmallNetwork(network):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.trunk = SmallTrunk(features)

    return SmallNetwork


class Naive:
    """Follows one environment and keeps every transition as whole stacks, in the plainest way."""

    def __init__(self, n_step, gamma):
        self.n_step, self.gamma = n_step, gamma
        self.stacks, self.steps = [], []  # stack, action, reward, terminated and truncated of every step
        self.stack = np.zeros((STACK, SIZE, SIZE), np.uint8)

    def add(self, frame, action, reward, terminated, truncated):
        self.stack = np.concatenate([self.stack[1:], frame[None]])
        self.stacks.append(self.stack)
        self.steps.append((action, reward, terminated, truncated))
        if terminated or truncated:
            self.stack = np.zeros_like(self.stack)

    def transition(self, t):
        """(stack, action, return, next stack or None, discount) of step ``t``, or None if truncation cuts it off."""
        total = 0.0
        for k in range(self.n_step):
            _, reward, terminated, truncated = self.steps[t + k]
            total += self.gamma**k * reward
            if terminated:
                return self.stacks[t], self.steps[t][0], total, None, 0.0
            if truncated:
                return None
        return self.stacks[t], self.steps[t][0], total, self.stacks[t + self.n_step], self.gamma**self.n_step
