"""tests/benchmarks/: each still runs, at its smallest size; peers that are not installed are left out."""

import importlib
import re
import sys
from functools import partial

import pytest
from conftest import ROOT

import dqn_atari

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
    benchmark = importlib.import_module(name)
    if name == "visual_speed":  # a trace that is not full, and no frames before those on the clock
        monkeypatch.setattr(benchmark, "TRACE_STEPS", 2)
        measure = benchmark.milliseconds
        monkeypatch.setattr(benchmark, "milliseconds", lambda player, draw, frames: measure(player, draw, 1))
    benchmark.main()
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"\d|not installed|no Stable-Baselines3|no EnvPool", last_line)


def test_parts_of_a_step_are_measured(monkeypatch, capsys):
    import dqn_speed

    monkeypatch.setattr(dqn_speed, "BUFFER_SIZE", 1000)
    monkeypatch.setattr(dqn_atari, "Args", partial(dqn_atari.Args, num_envs=2, batch_size=4))
    dqn_speed.print_parts(calls=1, rounds=1)
    assert len(capsys.readouterr().out.strip().splitlines()) == 8
