"""What the benchmarks share: the line about the machine, rounds, ratios and a table."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

MISSING = 'not installed: pip install ".[bench]"'


def print_machine() -> None:
    """One line without which no figure below it means anything."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{cpu}, {cores} cores{gpu}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n", flush=True)


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
