"""tests/benchmarks/: each still runs, at its smallest size; peers that are not installed are left out."""

import importlib
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name, flags",
    [
        ("deep_exploration", "--states 5 --games 4"),
        ("farming", "--games Pong --steps 10"),
        ("overlay_speed", "--frames 1 --rounds 1"),
        ("replay_memory", "--transitions 2000 --samples 1 --rounds 1"),
        ("visual_speed", "--only speed --frames 1 --rounds 1"),
        ("visual_speed", "--record 20 --saliency none"),
    ],
)
def test_benchmark_runs(name, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    importlib.import_module(name).main()
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"\d|not installed|no Stable-Baselines3|no EnvPool", last_line)


def test_parts_of_a_step_are_measured(capsys):
    import dqn_speed

    dqn_speed.print_parts(calls=1, rounds=1)
    assert len(capsys.readouterr().out.strip().splitlines()) == 8
