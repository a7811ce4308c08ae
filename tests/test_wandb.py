"""W&B: what arrives at a server, what lies on disk without one, and faults that a run has to outlive."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from check_copies import definitions
from conftest import ROOT
from helpers import SHORT, children, run_folder, start, wait_for
from wandb_server import WandbServer

from dqn_atari import slug

pytestmark = pytest.mark.slow

# the tracker alone, without the rest of the script, so that a process of a test starts at once
HEADER = """
import os, re, signal, sys, textwrap, threading, time, unicodedata
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
import numpy as np
from tqdm import tqdm

@dataclass
class Args:
    env_id: str = "Game"
    exp_name: str = "x"
    wandb_mode: str = "auto"
    wandb_project_name: str = "watchrl"
    wandb_entity: str | None = None
    wandb_group: str | None = None

"""
PARTS = "\n\n".join(
    definitions((ROOT / "dqn_atari.py").read_text())[name] for name in ("ALGORITHM", "say", "slug", "Tracker")
)
START = """
from tracker import *
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: signals.append(number))

def pause(word):
    "Tells the test where this is and waits for its answer."
    print(word, flush=True)
    input()

def steps(first, last):
    for step in range(first, last, 8):
        tracker.log({"charts/step": step}, step)

run_dir = Path("runs/Game__x__1")
run_dir.mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def launch(folder: Path, code: str, environment: dict, **options) -> subprocess.Popen:
    (folder / "tracker.py").write_text(HEADER + PARTS)
    command = [sys.executable, "-c", START + code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes, **options)


def wait_for_line(process: subprocess.Popen, word: str) -> str:
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(process.communicate())


def go_on(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen) -> tuple[str, str]:
    """The rest of what is printed; the process has to end by itself, with 0 and without a traceback."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, (stdout, stderr)
    assert "Traceback" not in stderr, stderr
    return stdout, stderr


def warnings(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("warning: W&B:")]


def steps_of(server: WandbServer, run_id="Game__x__1") -> list[int]:
    history = server.runs[run_id].history
    assert [row["_step"] for row in history] == [row["global_step"] for row in history]
    return [row["global_step"] for row in history]


def sync(arguments: str, folder: Path, environment: dict) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *arguments.split()]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


WHOLE = """
tracker = Tracker(Args(), run_dir)
steps(0, 80)
video = run_dir / "video.mp4"
video.write_bytes(b"a video")
tracker.log_video(video, np.zeros((8, 8, 3), np.uint8), 80)
tracker.log({"eval/episodic_return": 7.0}, 80)
(run_dir / "model.pt").write_bytes(b"a model")
tracker.log_model(run_dir / "model.pt")
tracker.finish()
"""


def assert_whole(server: WandbServer) -> None:
    assert steps_of(server) == list(range(0, 88, 8))
    run = server.runs["Game__x__1"]
    assert run.history[-1]["eval/episodic_return"] == 7 and {"videos/eval", "images/eval"} <= run.history[-1].keys()
    assert b"a video" in run.files.values()
    assert b"class Tracker" in run.files["code/tracker.py"]
    assert run.exit_code == 0 and run.fields["displayName"] == "Game__x__1" and run.fields["jobType"] == "train"
    assert run.fields["groupName"] == "Game__x"
    (model,) = [artifact for artifact in server.artifacts if artifact["type"] == "model"]
    assert model["collection"] == "Game__x__1-model" and model["files"]["model.pt"] == b"a model"
    assert model["state"] == "COMMITTED"


def test_online_run_arrives_whole(server, tmp_path):
    home = tmp_path / "home"
    end(launch(tmp_path, WHOLE, server.environment(home)))
    assert_whole(server)
    files = [path for path in home.rglob("*") if path.is_file()]
    assert all(path.name.endswith(".log") for path in files), "copies in the home add up"


def test_offline_record_is_whole_and_syncs(server, tmp_path):
    environment = server.environment(tmp_path / "home") | {"WANDB_MODE": "offline"}
    stdout, _ = end(launch(tmp_path, WHOLE, environment))
    assert "wandb leet" in stdout and "wandb sync" in stdout and "no login" not in stdout
    assert not server.runs
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "home")
    sync("--yes", tmp_path, environment | {"WANDB_MODE": "online"})
    assert_whole(server)


def test_killed_and_resumed_is_one_run_with_one_row_a_step(server, tmp_path):
    environment = server.environment(tmp_path) | {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
    environment["WANDB_SILENT"] = "false"  # W&B says it when it drops a row
    code = "tracker = Tracker(Args(), run_dir, run_id={})\nsteps({})\npause('logged')\ntracker.finish()"
    killed = launch(tmp_path, code.format(None, "0, 160"), environment)
    wait_for_line(killed, "logged")
    wait_for(lambda: len(server.runs["Game__x__1"].history) >= 19, killed)  # the 20th row waits for more of its step
    killed.kill()
    killed.communicate()
    (tmp_path / "runs/Game__x__1").rename(tmp_path / "runs/moved to é")
    code = code.replace("run_dir", "Path('runs/moved to é')")
    resumed = launch(tmp_path, code.format("'Game__x__1'", "80, 240"), environment)  # from the last checkpoint
    go_on(resumed)
    _, stderr = end(resumed)
    assert "less than the current step" not in stderr
    assert list(server.runs) == ["Game__x__1"] and steps_of(server) == list(range(0, 240, 8))


def test_server_goes_away_and_comes_back(server, tmp_path):
    environment = server.environment(tmp_path) | {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
    code = "tracker = Tracker(Args(), run_dir)\nsteps(0, 80)\npause('begun')\nsteps(80, 160)\npause('away')\n"
    process = launch(tmp_path, code + "steps(160, 240)\ntracker.finish()", environment)
    wait_for_line(process, "begun")
    server.stop()
    go_on(process)
    wait_for_line(process, "away")
    server.start()
    go_on(process)
    assert not warnings(end(process)[1])
    assert steps_of(server) == list(range(0, 240, 8)) and server.runs["Game__x__1"].exit_code == 0


NETWORK_FAILS = """
tracker = Tracker(Args(), run_dir)
steps(0, 80)
pause("logged")
steps(80, 160)
tracker.finish(stopped=lambda: signals)
"""


@pytest.mark.parametrize("answer, number", [("hang", signal.SIGINT), ("gone", signal.SIGTERM)])
def test_one_signal_ends_the_waiting_for_a_server(answer, number, server, tmp_path):
    environment = server.environment(tmp_path)
    process = launch(tmp_path, NETWORK_FAILS, environment)
    wait_for_line(process, "logged")
    if answer == "gone":
        server.stop()
    server.answer = answer
    go_on(process)
    line = wait_for_line(process, "W&B: waiting")
    process.send_signal(number)
    stdout, stderr = end(process)
    assert "on disk" in stdout and not stderr
    (command,) = re.findall("wandb sync (.*)", line)
    if answer == "gone":
        server.start()
    server.answer = "ok"
    server.runs.clear()
    sync(command, tmp_path, environment)
    assert steps_of(server) == list(range(0, 160, 8))


def test_a_stop_by_signal_does_not_wait_for_a_dead_network(server, tmp_path):
    process = launch(tmp_path, NETWORK_FAILS, server.environment(tmp_path))
    wait_for_line(process, "logged")
    server.answer = "500"
    process.send_signal(signal.SIGTERM)
    go_on(process)
    stdout, stderr = end(process)
    assert "W&B: not all was uploaded" in stdout and "waiting" not in stdout and not stderr


def test_server_refuses_the_key_in_the_middle(server, tmp_path):
    environment = server.environment(tmp_path)
    process = launch(tmp_path, NETWORK_FAILS, environment)
    wait_for_line(process, "logged")
    server.answer = "401"
    go_on(process)
    end(process)
    server.answer = "ok"
    (folder,) = tmp_path.glob("wandb/run-*")
    sync(f"--include-online {folder}", tmp_path, environment)
    assert steps_of(server) == list(range(0, 160, 8))


def test_its_service_is_killed(server, tmp_path):
    process = launch(tmp_path, NETWORK_FAILS + "print('went on')", server.environment(tmp_path))
    wait_for_line(process, "logged")
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    go_on(process)
    stdout, stderr = end(process)
    assert "went on" in stdout and len(warnings(stderr)) == 1


GOES_ON = """
tracker = Tracker(Args(), run_dir)
steps(0, 4000)
tracker.log_model(Path("model.pt"))
tracker.finish()
print("went on")
"""


def goes_on(folder: Path, environment: dict, code=GOES_ON, **options) -> tuple[str, list[str]]:
    """What it prints, and the warnings."""
    (folder / "model.pt").write_bytes(bytes(10**6))
    stdout, stderr = end(launch(folder, code, environment, **options))
    assert "went on" in stdout
    return stdout, warnings(stderr)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"WANDB_MODE": "nonsense"}, "nonsense"),
        ({"WANDB_API_KEY": f" {'k' * 40}"}, "whitespace"),
        ({"PYTHONPATH": "broken"}, "no such wandb"),
    ],
)
def test_what_it_raises_is_one_warning(changes, reason, server, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/wandb.py").write_text("raise ImportError('no such wandb')")
    stdout, (warning,) = goes_on(tmp_path, server.environment(tmp_path) | changes)
    assert reason in warning and "offline" not in stdout


@pytest.mark.parametrize("key, answer, reason", [("short", "ok", "40+ characters"), ("k" * 40, "401", "401")])
def test_recorded_offline_where_online_fails(key, answer, reason, server, tmp_path):
    server.answer = answer
    stdout, found = goes_on(tmp_path, server.environment(tmp_path) | {"WANDB_API_KEY": key})
    assert reason in stdout and "recorded offline" in stdout and not found
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_online_needs_a_login(server, tmp_path):
    environment = server.environment(tmp_path) | {"WANDB_API_KEY": ""}
    process = launch(tmp_path, "Tracker(Args(wandb_mode='online'), run_dir)", environment)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and re.fullmatch("error: .*needs a login.*\n", stderr)


def test_no_home(server, tmp_path):
    _, found = goes_on(tmp_path, server.environment(Path("/proc/none")))
    assert not found and server.artifacts[0]["state"] == "COMMITTED"


def test_full_disk(server, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))  # a file that grows further fails
    _, (warning,) = goes_on(tmp_path, server.environment(tmp_path), preexec_fn=limit)
    assert "too large" in warning


def test_no_memory_for_its_service(server, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (600 << 20, 600 << 20))
    _, (warning,) = goes_on(tmp_path, server.environment(tmp_path), preexec_fn=limit)
    assert "wandb-core" in warning


def test_closed_streams(server, tmp_path):
    code = "os.dup2(2, 3); [os.close(stream) for stream in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None\n"
    code += GOES_ON.replace('print("went on")', 'Path("went on").touch()')
    (tmp_path / "model.pt").write_bytes(b"a model")
    end(launch(tmp_path, code, server.environment(tmp_path)))
    assert (tmp_path / "went on").exists() and server.runs["Game__x__1"].exit_code == 0


def test_mode_of_the_environment_and_of_the_flag(server, tmp_path):
    environment = server.environment(tmp_path)
    code = GOES_ON + "assert 'wandb' not in sys.modules and tracker.run_id == 'Game__x__1'"
    assert not goes_on(tmp_path, environment | {"WANDB_MODE": "disabled"}, code)[1]
    code = GOES_ON.replace("Args()", "Args(wandb_mode='offline')") + "assert tracker.run.offline"
    assert not goes_on(tmp_path, environment | {"WANDB_MODE": "nonsense"}, code)[1]
    assert not server.runs


@pytest.mark.parametrize(
    "text, name",
    [
        ("Breakout__dqn_atari__1__20260131-120000", "Breakout__dqn_atari__1__20260131-120000"),
        ("my run", "my-run"),
        ("a:b/c\\d", "a-b-c-d"),
        ("\u00e9t\u00e9", "ete"),
        ("\u65e5\u672c", "-"),
        ("..hidden", "hidden"),
        ("...", "run"),
        ("", "run"),
        ("dqn+noise", "dqn-noise"),
        (f"first{'x' * 100}last", f"first{'x' * 26}--{'x' * 27}last"),
    ],
)
def test_slug(text, name):
    assert slug(text) == name and len(name) <= 64


def test_script_with_an_odd_name_is_killed_moved_and_resumed_from_inside(server, tmp_path):
    """The whole script: each step arrives once, the model under the run's name."""
    script = tmp_path / "my dqn (1).py"
    shutil.copy(ROOT / "dqn_atari.py", script)
    environment = server.environment(tmp_path / "home") | {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
    flags = SHORT + " --total-timesteps 1000000 --batch-size 4 --train-frequency 40 --checkpoint-minutes 0.01"
    flags += " --eval-frequency 600 --video-length 5 --wandb-project-name a/b"
    process = start(tmp_path, flags, script, env=environment)
    wait_for(lambda: any(run.history for run in server.runs.values()), process)
    folder = run_folder(tmp_path)
    wait_for((folder / "checkpoint.pt").exists, process)
    process.kill()
    process.communicate()
    (name,) = server.runs
    assert name == slug(folder.name)
    folder = folder.rename(tmp_path / "my moved run")
    last = torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] + 800
    flags = f"--resume . --total-timesteps {last} --wandb-project-name a/b"
    stdout, stderr = end(start(folder, flags, script, env=environment))
    steps = [row["global_step"] for row in server.runs[name].history]
    assert list(server.runs) == [name] and steps == sorted(set(steps)) and steps[-1] == last
    assert "eval/episodic_return" in server.runs[name].history[-1]
    assert "code/my dqn (1).py" in server.runs[name].files
    assert [artifact["collection"] for artifact in server.artifacts] == [f"{name}-model"]
    assert not warnings(stderr)
