"""What the benchmarks share: the line about the machine, a script's speed, rounds, ratios and a table."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MISSING = 'not installed: pip install ".[bench]"'


def print_machine() -> None:
    """One line without which no figure below it means anything."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{cpu}, {cores} cores{gpu}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n", flush=True)


def run(command: list, folder: str | Path) -> str:
    """Standard output of a command; ends the program with what it said if it fails."""
    environment = os.environ | {"WANDB_SILENT": "true"}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=environment, text=True, capture_output=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def script_metrics(script: str, flags: str, first_step: int, steps: int) -> list[dict]:
    """What a script logs with charts/SPS on Breakout, started as from the shell, in the ``steps`` after ``first_step``.

    Read from the W&B file; both numbers are multiples of the script's LOG_FREQUENCY. A record is of the steps since the
    one before it: those that begin before ``first_step`` are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags += f" --env-id Breakout --total-timesteps {first_step + steps} --eval-episodes 1 --eval-frequency 0"
        flags += " --no-capture-video --checkpoint-minutes 0 --wandb-mode offline"
        run([sys.executable, ROOT / script, *flags.split()], folder)
        (file,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
        lines = run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", file], folder).splitlines()
    records = [json.loads(line).get("history", {}).get("item", {}) for line in lines]
    records = [record for record in records if "charts/SPS" in record]
    starts = [0, *(record["global_step"] for record in records)]
    kept = [record for start, record in zip(starts, records) if start >= first_step]
    return kept or sys.exit(f"error: {script} has logged no speed from step {first_step:,} on: give more --steps")


def script_speed(script: str, flags: str, first_step: int, steps: int) -> float:
    """Agent steps per second of a script in the ``steps`` after ``first_step``: the mean of its charts/SPS."""
    # each is the mean over the steps since the one before it, so that the mean over all is the harmonic one
    return statistics.harmonic_mean(
        [record["charts/SPS"] for record in script_metrics(script, flags, first_step, steps)]
    )


def play_rounds(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The figure of every contestant in every round, one after another, so that a busy minute hits them all."""
    figures = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            figures[name].append(contestant())
    return figures


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios within each round, which vary less than the figures do."""
    return statistics.median(a / b for a, b in zip(above, below))


def print_table(header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Columns as wide as they need; the first to the left, the others to the right."""
    table = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])), sep="  ")
    print(flush=True)
