"""tests/benchmarks/study.py: what its queue starts, goes on with and leaves alone."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/benchmarks"))
import study
from study import Job, Kind

SCRIPT = """
import sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in flags:
    run_dir = Path(flags["--resume"])
else:
    run_dir = Path("runs", "__".join((flags["--env-id"], flags["--exp-name"], flags["--seed"], "time")))
    run_dir.mkdir(parents=True)
with open("order", "a") as file:
    print(run_dir.name, *flags, file=file)
(run_dir / "checkpoint.pt").touch()
time.sleep(float(flags.get("--seconds", 0)))
(run_dir / "model.pt").touch()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return tmp_path


def test_each_run_is_started_or_resumed_or_has_ended(folder):
    job = Job(Kind("idea", "script.py --total-timesteps 5"), "Pong", 2)
    of_the_run = ["--total-timesteps", "5", "--env-id", "Pong", "--seed", "2", "--exp-name", "idea"]
    command = [sys.executable, str(folder / "script.py"), *of_the_run, "--wandb-mode", "offline"]
    assert job.command(folder) == command
    run_dir = folder / "runs/Pong__idea__2__20260131-120000"
    run_dir.mkdir(parents=True)
    of_another_seed = folder / "runs/Pong__idea__21__20260131-120000"
    of_another_seed.mkdir()
    (of_another_seed / "model.pt").touch()
    assert job.command(folder) == command and not run_dir.exists()  # killed before its first checkpoint
    run_dir.mkdir()
    (run_dir / "checkpoint.pt").touch()
    assert job.command(folder)[2:] == ["--wandb-mode", "offline", "--resume", str(run_dir)]
    (run_dir / "model.pt").touch()
    assert job.command(folder) is None


def test_peer_gets_its_flags_again(folder):
    job = Job(Kind("sb3_ppo", "sb3.py ppo --total-timesteps 5"), "Pong", 1)
    of_the_run = ["ppo", "--total-timesteps", "5", "--env-id", "Pong", "--seed", "1"]
    assert job.command(folder)[2:] == of_the_run
    run_dir = folder / "runs/Pong__sb3_ppo__1__20260131-120000"
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoint.pt").touch()
    assert job.command(folder)[2:] == [*of_the_run, "--resume", str(run_dir)]


def test_queue_that_is_stopped_goes_on(folder, monkeypatch):
    """Ctrl-C ends the runs, and a second start resumes them before it begins others."""
    jobs = [Job(Kind("idea", "script.py --seconds 30"), "Pong", 1), Job(Kind("idea", "script.py"), "Pong", 2)]
    sleep = study.time.sleep

    def stop_when_it_runs(seconds):
        sleep(0.1)
        if (folder / "runs").exists() and list(folder.glob("runs/*/checkpoint.pt")):
            raise KeyboardInterrupt

    monkeypatch.setattr(study.time, "sleep", stop_when_it_runs)
    study.play(jobs.copy(), folder, jobs=1)
    assert not list(folder.glob("runs/*/model.pt"))
    monkeypatch.setattr(study.time, "sleep", lambda seconds: sleep(0.1))
    study.play(jobs.copy(), folder, jobs=1)
    order = (folder / "order").read_text().splitlines()
    assert [line.split()[0] for line in order] == 2 * ["Pong__idea__1__time"] + ["Pong__idea__2__time"]
    assert ["--resume" in line for line in order] == [False, True, False]
    assert len(list(folder.glob("runs/*/model.pt"))) == 2
