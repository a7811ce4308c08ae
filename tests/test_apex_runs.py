"""apex_dqn_atari.py from the shell: killed actors, nodes and learners, ends and errors, on real games."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import OFTEN, run, run_folder, saved_step, start, wait_for, wait_for_next_checkpoint

from apex_dqn_atari import CHUNK, REQUESTS

pytestmark = pytest.mark.slow

SHORT = "--device cpu --env-id Breakout --num-actors 1 --envs-per-actor 4 --learning-starts 400"
SHORT += " --buffer-size 1000 --batch-size 8"
NO_EXTRAS = SHORT + " --eval-episodes 1 --eval-frequency 0 --no-capture-video --wandb-mode disabled"


def descendants(pid: int) -> dict[int, str]:
    """Process numbers and titles of all that ``pid`` and its children have started."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {process: titles[process] for process in found - {pid} if titles[process]}


def actor_processes(pid: int) -> list[int]:
    return sorted(process for process, title in descendants(pid).items() if title.startswith("ray::Actor"))


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_all_gone(processes, seconds=20) -> None:
    deadline, processes = time.monotonic() + seconds, list(processes)
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("runs/*/checkpoint.pt"))


def stored(folder: Path) -> list[int]:
    """Steps of each actor in the last checkpoint."""
    return torch.load(checkpoints(folder)[0], weights_only=True, mmap=True)["replay"]["num_steps"]


def test_killed_actor_learner_and_raylet(tmp_path):
    """kill -9 of an actor: Ray starts it again. Of the learner: it goes on where it was. Of Ray: one sentence."""
    flags = NO_EXTRAS.replace("--num-actors 1 --envs-per-actor 4", "--num-actors 2 --envs-per-actor 2")
    process = start(tmp_path, flags + " --total-timesteps 1000000 --steps-per-update 40" + OFTEN, "apex_dqn_atari.py")
    wait_for(lambda: checkpoints(tmp_path) and min(stored(tmp_path)) > 0, process)
    started = descendants(process.pid)
    actors, before = actor_processes(process.pid), stored(tmp_path)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in (process.pid, *actors)] == [0, 0, 0]
    os.kill(actors[0], signal.SIGKILL)
    # both went on after it: more than the chunks that the killed one may have sent before
    wait_for(lambda: min(stored(tmp_path)) > max(before) + (REQUESTS + 1) * CHUNK, process)
    process.kill()
    _, stderr = process.communicate(timeout=60)
    assert re.match(r"actor [01] died and has been started again\n", stderr)
    # Ray's agents of the runtime need a minute to notice that the learner was killed
    assert_all_gone(pid for pid, title in started.items() if "Agent" not in title)

    before = torch.load(checkpoints(tmp_path)[0], weights_only=True)
    flags = f"--resume {run_folder(tmp_path)} --wandb-mode disabled"
    process = start(tmp_path, flags, "apex_dqn_atari.py")
    wait_for(lambda: min(stored(tmp_path)) > max(before["replay"]["num_steps"]) + CHUNK, process)
    started = descendants(process.pid)
    (raylet,) = [pid for pid, title in started.items() if "raylet/raylet" in title.split()[0]]
    os.kill(raylet, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: the raylet, Ray's process on this machine, has died: go on with --resume\n" in stderr
    assert "(raylet)" not in stdout and "Traceback" not in stderr
    assert_all_gone(started)
    last = torch.load(checkpoints(tmp_path)[0], weights_only=True)
    assert min(last["replay"]["num_steps"]) > max(before["replay"]["num_steps"])
    assert last["agent"]["updates"] > before["agent"]["updates"] > 0
    assert (last["replay"]["priorities"] > 0).sum() > 500


def test_actor_that_raises_ends_the_run_with_its_traceback(tmp_path):
    script = (ROOT / "apex_dqn_atari.py").read_text()
    line = "        called = time.perf_counter()\n"
    assert script.count(line) == 1
    broken = script.replace(line, line + "        assert self.num_steps < 150, 'the joystick fell off'\n")
    (tmp_path / "broken.py").write_text(broken)
    process = start(tmp_path, NO_EXTRAS + " --total-timesteps 100000", script=tmp_path / "broken.py")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: actor 0 failed:" in stderr and "AssertionError: the joystick fell off" in stderr
    assert "in play" in stderr


def test_stopped_learner_resumes(tmp_path):
    """Signalled as a terminal or a job scheduler does: the replay, its priorities and counters go on to the end."""
    process = start(
        tmp_path, NO_EXTRAS + " --steps-per-update 40 --total-timesteps 100000" + OFTEN, "apex_dqn_atari.py"
    )
    wait_for(lambda: saved_step(tmp_path) > 1400, process)
    before = descendants(process.pid)
    assert len(actor_processes(process.pid)) == 1
    assert not [title for pid, title in before.items() if os.getpgid(pid) == process.pid]  # the signal is not for them
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, stderr
    assert_all_gone(before)
    checkpoint = torch.load(checkpoints(tmp_path)[0], weights_only=True)
    stopped, updates = checkpoint["global_step"], checkpoint["agent"]["updates"]
    assert updates > 0 and (checkpoint["replay"]["priorities"] > 0).sum() > 500
    assert "--resume" in stdout and "Traceback" not in stderr
    flags = f"--resume {run_folder(tmp_path)} --total-timesteps {stopped + 1000} --wandb-mode disabled"
    process = start(tmp_path, flags, "apex_dqn_atari.py")
    wait_for_next_checkpoint(checkpoints(tmp_path)[0], process)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    checkpoint = torch.load(checkpoints(tmp_path)[0], weights_only=True)
    assert stopped + 1000 <= checkpoint["global_step"] <= stopped + 2000
    assert checkpoint["agent"]["updates"] > updates
    assert checkpoint["replay"]["num_steps"][0] == checkpoint["global_step"] // 4


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Starts nodes of a Ray cluster here, one CPU each, by the commands that docs/usage.md gives; ends them all."""
    port = 20_000 + os.getpid() % 10_000
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)

    def raylets() -> set[int]:
        return {pid for pid, title in descendants(1).items() if "raylet/raylet" in title and f":{port}" in title}

    def start_node(flags: str) -> int:
        """Returns the process number of its raylet."""
        before, command = raylets(), [Path(sys.executable).parent / "ray", "start", *flags.split()]
        command += ["--disable-usage-stats", "--num-cpus", "1", "--object-store-memory", str(2**28)]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=120)
        (raylet,) = raylets() - before
        return raylet

    start_node(f"--head --port {port} --include-dashboard false")
    yield f"127.0.0.1:{port}", start_node
    for pid in [pid for pid, title in descendants(1).items() if f":{port}" in title or f"port={port}" in title]:
        os.kill(pid, signal.SIGKILL)


def test_cluster_of_two_nodes_loses_one(tmp_path, cluster):
    """The actor of the lost node is gone, the other goes on; when a node joins, the lost one is started there."""
    address, start_node = cluster
    node = start_node(f"--address {address}")
    flags = NO_EXTRAS.replace("--num-actors 1 --envs-per-actor 4", "--num-actors 2 --envs-per-actor 2")
    flags += f" --total-timesteps 1000000 --steps-per-update 40 --ray-address {address}" + OFTEN
    process = start(tmp_path, flags, "apex_dqn_atari.py")
    wait_for(lambda: checkpoints(tmp_path) and min(stored(tmp_path)) > 150, process)
    os.kill(node, signal.SIGKILL)
    time.sleep(1)
    before = stored(tmp_path)
    wait_for(lambda: max(stored(tmp_path)) > max(before) + 6 * CHUNK, process)
    survivor = int(np.argmax(stored(tmp_path)))
    left = stored(tmp_path)[1 - survivor]
    assert left <= before[1 - survivor] + 4 * CHUNK
    start_node(f"--address {address}")
    wait_for(lambda: stored(tmp_path)[1 - survivor] > left, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and "Traceback" not in stderr, stderr
    assert f"actor {1 - survivor} died and has been started again" in stdout + stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_cluster_that_is_not_there_is_one_sentence(tmp_path, address):
    result = run(tmp_path, NO_EXTRAS + f" --total-timesteps 100 --ray-address {address}", "apex_dqn_atari.py")
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"error: --ray-address {address} is no running cluster")


def test_small_buffer_is_one_sentence(tmp_path):
    result = run(tmp_path, NO_EXTRAS.replace("--buffer-size 1000", "--buffer-size 200"), "apex_dqn_atari.py")
    assert result.returncode == 1 and "error: --buffer-size 200 is too small" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("replay_device", ["cuda", "cpu"])
def test_training_runs_and_resumes_on_cuda(tmp_path, replay_device):
    flags = NO_EXTRAS + f" --device cuda --replay-device {replay_device} --total-timesteps 3000"
    assert run(tmp_path, flags, "apex_dqn_atari.py").returncode == 0
    flags = f"--resume {run_folder(tmp_path)} --total-timesteps 4000 --wandb-mode disabled"
    resumed = run(tmp_path, flags, "apex_dqn_atari.py")
    assert resumed.returncode == 0, resumed.stderr
