"""dqn_atari.py from the shell: runs, W&B record, video, resume, faults and errors, on real games."""

import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import (
    NO_EXTRAS,
    OFTEN,
    SHORT,
    assert_group_is_gone,
    assert_same_end,
    children,
    read_video,
    run,
    run_folder,
    saved_step,
    start,
    wait_for,
    wandb_records,
)

import dqn_atari
from dqn_atari import Agent, Args, Run, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """One run with everything on: 1,600 steps, evaluated at 80, at 800 and at the end."""
    folder = tmp_path_factory.mktemp("recorded")
    result = run(folder, SHORT + " --total-timesteps 1600 --eval-frequency 800 --seed 3", cold=True)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_run_leaves_its_files(recorded):
    folder, result = recorded
    files = run_folder(folder)
    assert files.name.startswith("Breakout__dqn_atari__3__")
    names = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    assert names == {"checkpoint.pt", "model.pt", *(f"videos/000000{step}.mp4" for step in ("0080", "0800", "1600"))}
    assert "wandb leet" in result.stdout and "wandb sync" in result.stdout
    assert "step 1,600: return" in result.stdout
    assert "it/s" not in result.stderr and "step/s" not in result.stderr  # no progress bar where there is no terminal


def test_wandb_record_is_complete(recorded):
    folder, _ = recorded
    records = wandb_records(folder)
    of_type = {kind: [r[kind] for r in records if r["type"] == kind] for kind in {r["type"] for r in records}}
    config = of_type["run"][0]["config"]["update"]
    assert (config["game"], config["algorithm"]) == ("Breakout", "DQN")
    assert (config["env_id"], config["seed"], config["gamma"], config["num_envs"]) == ("Breakout", 3, 0.99, 4)
    assert {metric.get("step_metric") for metric in of_type["metric"] if "glob_name" in metric} == {"global_step"}
    history = [item["item"] for item in of_type["history"]]
    assert all("global_step" in item for item in history)
    logged = {key.split(".")[0] for item in history for key in item}
    charts = {"episodic_return", "episodic_length", "repeated_rewards", "SPS", "epsilon"}
    evaluation = {"episodic_return", "episodic_return_std", "episodic_length", "repeated_rewards"}
    wanted = {f"charts/{name}" for name in charts} | {f"eval/{name}" for name in evaluation}
    assert wanted | {"losses/td_loss", "losses/q_values", "videos/eval", "images/eval"} <= logged
    assert {item["global_step"] for item in history if "eval/episodic_return" in item} == {80, 800, 1600}
    (model,) = of_type["artifact"]
    assert [entry["path"] for entry in model["manifest"]["contents"]] == ["model.pt"]
    (wandb_folder,) = (folder / "wandb").glob("offline-run-*")
    (staged,) = (wandb_folder / "artifacts/staging").iterdir()
    assert staged.read_bytes() == (run_folder(folder) / "model.pt").read_bytes()
    media = wandb_folder / "files"
    assert (media / "code/dqn_atari.py").read_bytes() == (ROOT / "dqn_atari.py").read_bytes()
    files = {file["path"] for record in of_type["files"] for file in record["files"]}
    videos = [file for file in files if file.endswith(".mp4")]
    assert len(videos) == 3 and all((media / video).stat().st_size > 1000 for video in videos)
    assert len([file for file in files if file.startswith("media/images/images/eval")]) == 3


def test_video_of_the_run_decodes(recorded):
    folder, _ = recorded
    meta, frames = read_video(run_folder(folder) / "videos" / "0000001600.mp4")
    history = [r["history"]["item"] for r in wandb_records(folder) if r["type"] == "history"]
    length = [item["eval/episodic_length"] for item in history if "eval/episodic_length" in item][-1]
    assert meta["size"] == (960, 630)
    # a picture for every step: not for the FIRE that starts each of the five lives, which nobody chose
    assert len(frames) == length - 4


def test_evaluate_plays_the_model_and_trains_nothing(recorded, tmp_path):
    folder, result = recorded
    model = run_folder(folder) / "model.pt"
    again = run(tmp_path, f"--evaluate {model} --wandb-mode disabled --eval-episodes 1")
    assert again.returncode == 0, again.stderr
    line = "step 1,600: return"
    assert [x for x in again.stdout.splitlines() if line in x] == [x for x in result.stdout.splitlines() if line in x]
    names = {path.name for path in run_folder(tmp_path).rglob("*") if path.is_file()}
    assert names == {"0000001600.mp4"}


def test_disabled_imports_neither_wandb_nor_moviepy(tmp_path):
    for name in ("wandb", "moviepy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = run(tmp_path, NO_EXTRAS + " --total-timesteps 500 --num-workers 0", env=environment, cold=True)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "wandb").exists()


# ---------------------------------------------------------------------------------------- kill and resume

STOPS = [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, -2)]  # exit codes


def test_run_that_is_stopped_three_times_ends_bit_identical(recorded, tmp_path):
    """With the replay wrapped round and lives lost; as a run that was left alone, and evaluated on the way."""
    flags = NO_EXTRAS + " --total-timesteps 1600 --seed 3 --checkpoint-minutes 0.002"
    stopped = 1020
    for number, exit_code in STOPS:
        process = start(tmp_path, flags)
        wait_for(lambda step=stopped: saved_step(tmp_path) > step, process)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.kill(process.pid, number)
            time.sleep(0.05)
            os.killpg(process.pid, number)  # as timeout and job schedulers do, so that the workers get it too
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == exit_code, stderr
        assert_group_is_gone(process.pid)
        folder = run_folder(tmp_path)
        assert not (folder / "model.pt").exists()
        stopped = saved_step(tmp_path)
        if number != signal.SIGKILL:
            assert f"stopped at step {stopped:,}; go on with" in stdout
        flags = f"--resume {folder} --wandb-mode disabled"
    result = run(tmp_path, flags)
    assert result.returncode == 0, result.stderr
    assert_same_end(recorded[0], tmp_path)


@pytest.fixture
def copied(recorded, tmp_path) -> Path:
    """A folder with the recorded run, to go on with."""
    return Path(shutil.copytree(recorded[0], tmp_path / "copy"))


def test_resume_goes_on_with_the_same_wandb_run(copied):
    result = run(copied, f"--resume {run_folder(copied)}/checkpoint.pt --total-timesteps 1800 --no-capture-video")
    assert result.returncode == 0, result.stderr
    records = list((copied / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.stem for path in records] == [f"run-{run_folder(copied).name}"] * 2


def test_killed_worker_ends_the_run(tmp_path):
    process = start(tmp_path, NO_EXTRAS + OFTEN + " --total-timesteps 1000000 --num-workers 2")
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    worker = children(process.pid)[0]
    os.kill(worker, signal.SIGKILL)
    _, stderr = process.communicate(timeout=15)
    assert process.returncode == 1
    assert f"error: environment worker (process {worker}) died with exit code -9" in stderr
    assert_group_is_gone(process.pid)


def test_full_disk_keeps_the_previous_checkpoint(copied):
    """Files may not grow past 9 MB: the first checkpoints fail, training goes on, nothing old is destroyed."""
    checkpoint = run_folder(copied) / "checkpoint.pt"
    before = checkpoint.read_bytes()

    flags = f"--resume {run_folder(copied)} --total-timesteps 1800 --wandb-mode disabled --no-capture-video"
    process = start(copied, flags)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (9_000_000, 9_000_000))
    stdout, stderr = process.communicate(timeout=300)
    assert "was not written" in stderr
    assert "step 1,800: return" in stdout and process.returncode == 0  # the model is small enough
    assert checkpoint.read_bytes() == before
    assert not list(copied.rglob("*.tmp"))


@pytest.mark.parametrize("due, message", [(25, "td_loss became nan"), (20, "a weight is infinite or nan")])
def test_diverging_run_ends_and_keeps_the_checkpoint(tmp_path, monkeypatch, due, message):
    """The parameters become nan at the 20th update: the checkpoint due after it is not written over the good one."""
    updates, update = [], Agent.update

    def diverge(self, *batch):
        update(self, *batch)
        updates.append(None)
        if len(updates) == 20:
            self.q_network.head.bias.data.fill_(float("nan"))

    monkeypatch.setattr(Agent, "update", diverge)
    args = Args(env_id="Breakout", num_envs=2, num_workers=0, learning_starts=400, buffer_size=1000)
    args.precision, args.batch_size = "float32", 8
    args.total_timesteps, args.wandb_mode = 3000, "disabled"
    monkeypatch.setattr(Run, "checkpoint_is_due", lambda run: len(updates) in (12, due))
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train(args, torch.device("cpu"), tmp_path, None)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 450 and len(updates) == due
    assert all(value.isfinite().all() for value in checkpoint["agent"]["q_network"].values())


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--gamma 1.5", "error: --gamma is 1.5: it must be between 0 and 1"),
        ("--resume a --evaluate b", "error: --resume trains and --evaluate does not: give one of them"),
        ("--device cuda:99", "error: --device cuda:99 is not there: this machine has"),
        ("--device tpu", "error: --device tpu is"),
        ("--buffer-size 1e9 --num-workers 0", "error: --buffer-size 1000000000 needs 7062.0 GB and cpu has"),
        ("--resume no/such/run", "error: there is no file no/such/run"),
        ("--evaluate no/such/model.pt", "error: there is no file no/such/model.pt"),
        ("--run-dir /dev/null/runs", "cannot be made: Not a directory"),
    ],
)
def test_bad_flags_end_with_one_sentence(tmp_path, monkeypatch, flags, message):
    """What a start finds out; test_flags.py looks closer at the flags themselves."""
    assert message in last_words(flags, tmp_path, monkeypatch)


def last_words(flags: str, folder: Path, monkeypatch) -> str:
    """The sentence with which ``main`` ends, in this process; test_scripts.py starts scripts from the shell."""
    monkeypatch.setattr(sys, "argv", ["dqn_atari.py", *flags.split(), "--wandb-mode", "disabled"])
    monkeypatch.setattr(dqn_atari, "keep_freed_memory", lambda: None)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as error:
        dqn_atari.main()
    sentence = str(error.value)
    assert sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def test_bad_checkpoints_end_with_one_sentence(recorded, tmp_path, monkeypatch):
    folder, _ = recorded
    files = run_folder(folder)
    truncated, foreign, text = (tmp_path / name for name in ("truncated.pt", "foreign.pt", "text.pt"))
    truncated.write_bytes((files / "checkpoint.pt").read_bytes()[:1_000_000])
    torch.save({"algorithm": "C51"}, foreign)
    text.write_text("hello")
    for flags, message in (
        (f"--resume {truncated}", "is damaged, no checkpoint, or too large"),
        (f"--evaluate {text}", "is damaged, no checkpoint, or too large"),
        (f"--resume {foreign}", "was written by C51, not by DQN"),
        (f"--resume {files / 'model.pt'}", "is no checkpoint: --resume needs a checkpoint.pt"),
        (f"--resume {files} --num-envs 8", "error: --num-envs cannot change on --resume: it was 4"),
        (f"--evaluate {files / 'model.pt'} --env-id Pong", "does not fit this script, or is damaged: size mismatch"),
    ):
        assert message in last_words(flags, tmp_path, monkeypatch)
