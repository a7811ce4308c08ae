"""Shared by all tests: the repository root on the path, no W&B account, no GPU needed, one thread a process."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for variable in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(variable, None)
os.environ["WANDB_SILENT"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # processes that share cores and have several threads each wait for each other
# a suite that nohup or a script has put into the background ignores these, and so would the runs that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, lambda *_: None)  # in a run that is started: what the system does by default


def pytest_xdist_auto_num_workers(config) -> int:
    """One process more than there are cores: a test that waits for a run or a server leaves its core to another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores + 1


LONGEST = ("test_scripts", "test_apex_runs")  # begun first: else one process works on them when the others are done


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.module.__name__ not in LONGEST)
    import torch  # not before OMP_NUM_THREADS is set

    torch.backends.cudnn.deterministic = True  # as it is in the scripts
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_run_is_left_behind():
    """A run that outlives its test, because that failed, would slow down all others."""
    yield
    from helpers import STARTED

    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
