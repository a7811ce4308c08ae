"""Memory of a million transitions and time of a sample: Replay against Stable-Baselines3's ReplayBuffer.

    python tests/benchmarks/replay_memory.py
    python tests/benchmarks/replay_memory.py --transitions 20000 --rounds 3

Replay keeps one frame a transition; ReplayBuffer keeps two stacks of four, or one with optimize_memory_usage. "By
arithmetic" adds up the bytes of one transition, "allocated" is the nbytes of the arrays for --transitions of 8 games,
and "resident" is how far VmRSS in /proc/self/status grows while Replay is made and filled; all three per million
transitions. ReplayBuffer's arrays are not filled (100,000 transitions would take 5.7 GB), except for the samples, which
are drawn from buffers of at most 20,000 transitions.
"""

import argparse
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from common import MISSING, median_ratio, play_rounds, print_machine, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dqn_atari  # noqa: E402

MILLION, NUM_ENVS, BATCH_SIZE = 1_000_000, 8, 32
FRAME, STACK = 84 * 84, 4 * 84 * 84  # bytes
OURS, DEFAULT, OPTIMIZED = "Replay", "ReplayBuffer", "ReplayBuffer, optimize_memory_usage"
BYTES = {  # of one transition
    OURS: FRAME + 1 + 4 + 1,  # frame, action uint8, reward float32, end uint8
    DEFAULT: 2 * STACK + 8 + 4 + 4 + 4,  # two stacks, action int64; reward, done and timeout float32
    OPTIMIZED: STACK + 8 + 4 + 4 + 4,
}


def make_replay(transitions: int, device: str = "cpu") -> dqn_atari.Replay:
    return dqn_atari.Replay(transitions, NUM_ENVS, torch.device(device))


def fill_replay(replay: dqn_atari.Replay) -> None:
    frames = torch.randint(256, (NUM_ENVS, 84, 84), dtype=torch.uint8)
    zeros = torch.zeros(NUM_ENVS)
    for _ in range(replay.max_steps):
        replay.add(frames, zeros.byte(), zeros, zeros > 0, zeros > 0)


def make_buffer(transitions: int, optimized: bool):
    from stable_baselines3.common.buffers import ReplayBuffer

    spaces = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4)
    with warnings.catch_warnings():  # that the memory is short: it is not touched
        warnings.simplefilter("ignore")
        options = {"optimize_memory_usage": optimized, "handle_timeout_termination": not optimized}
        return ReplayBuffer(transitions, *spaces, device="cpu", n_envs=NUM_ENVS, **options)


def fill_buffer(buffer) -> None:
    stacks = np.random.default_rng(1).integers(256, size=(NUM_ENVS, 4, 84, 84), dtype=np.uint8)
    zeros = np.zeros(NUM_ENVS)
    for _ in range(buffer.buffer_size):
        buffer.add(stacks, stacks, zeros.astype(np.int64), zeros, zeros, [{}] * NUM_ENVS)


def allocated(memory) -> int:
    """Bytes of all arrays or tensors of an object."""
    return sum(value.nbytes for value in vars(memory).values() if isinstance(value, (np.ndarray, torch.Tensor)))


def resident() -> float:
    """Bytes that this process occupies in main memory; nan where there is no /proc."""
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) if status.exists() else float("nan")


def microseconds(sample: Callable, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        sample(BATCH_SIZE)
    return 1e6 * (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=100_000, help="transitions measured (%(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="samples of 32 of each a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of all contestants (%(default)s)")
    args = parser.parse_args()
    print_machine()
    scale = MILLION / args.transitions

    fill_replay(make_replay(800))  # torch takes some memory of its own at the first calls
    before = resident()
    replay = make_replay(args.transitions)
    fill_replay(replay)
    occupied = {OURS: (resident() - before) * scale}
    bytes_allocated = {OURS: allocated(replay) * scale}
    del replay
    print(f"a Replay of 1,000,000 transitions allocates {allocated(make_replay(MILLION, 'meta')):,} bytes\n")

    small = min(args.transitions, 20_000)
    makers = {OURS: partial(make_replay, small)}
    try:
        for name in (DEFAULT, OPTIMIZED):
            bytes_allocated[name] = allocated(make_buffer(args.transitions, name == OPTIMIZED)) * scale
            makers[name] = partial(make_buffer, small, name == OPTIMIZED)
    except ImportError:
        print(f"Stable-Baselines3: {MISSING}")

    contestants = {}
    for name, make in makers.items():
        memory = make()
        (fill_replay if name == OURS else fill_buffer)(memory)
        microseconds(memory.sample, 10)
        contestants[name] = partial(microseconds, memory.sample, args.samples)
    figures = play_rounds(contestants, args.rounds)
    rows = []
    for name, times in figures.items():
        sizes = (BYTES[name] * MILLION, bytes_allocated[name], occupied.get(name))
        gigabytes = (f"{size / 1e9:.2f}" if size else "" for size in sizes)
        rows.append((name, *gigabytes, f"{statistics.median(times):,.0f}"))
    print_table(("GB a million transitions", "by arithmetic", "allocated", "resident", "us a sample of 32"), rows)
    if DEFAULT not in figures:
        print("ratio: no Stable-Baselines3")
        return
    print(f"speed of a sample: {median_ratio(figures[DEFAULT], figures[OURS]):.2f} x ReplayBuffer")
    default, optimized = (bytes_allocated[name] / bytes_allocated[OURS] for name in (DEFAULT, OPTIMIZED))
    print(f"ratio: {default:.2f} x fewer bytes than Stable-Baselines3, {optimized:.2f} x with optimize_memory_usage")


if __name__ == "__main__":
    main()
