"""What every script does alike, from the shell on a real game; test_command_line.py looks closer at the template."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import (
    LEARNING,
    NO_EXTRAS,
    OFTEN,
    SHORT,
    assert_group_is_gone,
    children,
    read_video,
    run,
    run_folder,
    saved_step,
    start,
    wait_for,
    wandb_records,
)

pytestmark = pytest.mark.slow

SCRIPTS = sorted(path.name for path in ROOT.glob("*_atari*.py") if path.name != "dqn_atari.py")
# flags of the template that a script has others for
INSTEAD = {
    "dqn_atari_visual.py": {"--eval-episodes 1": "--eval-episodes 1 --saliency gradient"},  # the default takes longer
    "ppo_atari.py": {LEARNING: "--num-steps 100 --num-minibatches 2 --update-epochs 1"},
    "apex_dqn_atari.py": {
        "--num-envs 4": "--num-actors 1 --envs-per-actor 4",
        "--train-frequency 16": "--steps-per-update 40",
    },
}


def adapt(flags: str, script: str) -> str:
    """The template's flags with those exchanged that the script has others for."""
    for old, new in INSTEAD.get(script, {}).items():
        assert old in flags
        flags = flags.replace(old, new)
    return flags


@pytest.fixture(scope="module", params=SCRIPTS)
def recorded(request, tmp_path_factory):
    """One run with everything on, evaluated twice: the script, its folder, what it printed."""
    folder = tmp_path_factory.mktemp("recorded")
    flags = SHORT + " --total-timesteps 1600 --eval-frequency 8000 --seed 3"
    result = run(folder, adapt(flags, request.param), request.param)
    assert result.returncode == 0, result.stderr
    return request.param, folder, result


def test_run_is_complete(recorded):
    """Its files; the W&B record with code, model, charts, losses, evaluations and videos; each video decodes."""
    script, folder, result = recorded
    files = run_folder(folder)
    assert files.name.startswith(f"Breakout__{script[:-3]}__3__")
    names = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    assert names >= {"checkpoint.pt", "model.pt", "videos/0000000800.mp4", "videos/0000001600.mp4"}
    assert "step 1,600: return" in result.stdout and "Traceback" not in result.stderr

    records = wandb_records(folder)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert all("global_step" in item for item in history)
    logged = {key.split(".")[0] for item in history for key in item}
    charts = {"episodic_return", "episodic_length", "repeated_rewards", "SPS"}
    evaluation = {"episodic_return", "episodic_return_std", "episodic_length", "repeated_rewards"}
    wanted = {f"charts/{name}" for name in charts} | {f"eval/{name}" for name in evaluation}
    assert wanted | {"videos/eval", "images/eval"} <= logged
    losses = [value for item in history for key, value in item.items() if key.startswith("losses/")]
    assert losses and all(float(value) == pytest.approx(float(value)) for value in losses)  # none is nan
    artifacts = {record["artifact"]["type"]: record["artifact"] for record in records if record["type"] == "artifact"}
    assert [entry["path"] for entry in artifacts["model"]["manifest"]["contents"]] == ["model.pt"]
    assert list(folder.glob(f"wandb/offline-run-*/files/code/{script}"))

    meta, frames = read_video(files / "videos" / "0000001600.mp4")
    length = [item["eval/episodic_length"] for item in history if "eval/episodic_length" in item][-1]
    # one a step and one of the end, but none after the FIRE of each life
    assert min(meta["size"]) >= 630 and len(frames) == length - 4


def test_evaluate_plays_the_model_again(recorded, tmp_path):
    script, folder, result = recorded
    flags = f"--evaluate {run_folder(folder) / 'model.pt'} --wandb-mode disabled --eval-episodes 1 --no-capture-video"
    again = run(tmp_path, flags, script)
    assert again.returncode == 0, again.stderr
    line = "step 1,600: return"
    assert [x for x in again.stdout.splitlines() if line in x] == [x for x in result.stdout.splitlines() if line in x]
    assert not [path for path in run_folder(tmp_path).rglob("*") if path.is_file()]


def test_checkpoint_of_another_network_is_refused(recorded, tmp_path, monkeypatch):
    """One sentence says what does not fit, as after a change of layers in a copy of the script."""
    script, folder, _ = recorded
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(module, "start_ray", lambda args: None, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    checkpoint = torch.load(run_folder(folder) / "checkpoint.pt", weights_only=True)
    parts = checkpoint["agent"]
    parts["network" if "network" in parts else "q_network"].popitem()
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    args = module.Args(**checkpoint["args"])
    args.num_workers = 0
    with pytest.raises(SystemExit, match="error: .*checkpoint.pt does not fit this script, or is damaged: Missing key"):
        module.train(args, torch.device("cpu"), tmp_path, tmp_path / "checkpoint.pt")


def test_resumed_run_lets_go_of_the_checkpoint(recorded, tmp_path):
    """No process keeps the file, and with it the disk space, once the next checkpoint has replaced it."""
    script, folder, _ = recorded
    checkpoint = Path(shutil.copytree(run_folder(folder), tmp_path / "run")) / "checkpoint.pt"
    replaced = checkpoint.stat().st_ino
    flags = f"--resume {tmp_path / 'run'} --total-timesteps 1000000 --wandb-mode disabled" + OFTEN
    process = start(tmp_path, flags, script)
    wait_for(lambda: checkpoint.stat().st_ino != replaced, process)
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in [process.pid, *children(process.pid)]}
    process.terminate()
    assert "stopped at step" in process.communicate()[0]
    assert len(maps) > 2 and not [pid for pid, text in maps.items() if "checkpoint.pt" in text]


def test_resumed_run_ends_bit_identical(recorded, tmp_path):
    """Killed after some updates and resumed, a run ends as one that was left alone, and evaluated on the way."""
    script, whole, _ = recorded
    if script == "apex_dqn_atari.py":
        pytest.skip("its actors race")
    process = start(tmp_path, adapt(NO_EXTRAS + OFTEN, script) + " --total-timesteps 1600 --seed 3", script)
    wait_for(lambda: saved_step(tmp_path) > 700, process)
    process.kill()
    process.communicate()
    assert_group_is_gone(process.pid)
    result = run(tmp_path, f"--resume {run_folder(tmp_path)} --wandb-mode disabled", script)
    assert result.returncode == 0, result.stderr
    ends = [torch.load(run_folder(folder) / "checkpoint.pt", weights_only=True) for folder in (whole, tmp_path)]
    for name in ("args", "wandb_run_id"):
        assert ends[0].pop(name) != ends[1].pop(name)
    assert_same(*ends)


def assert_same(a, b) -> None:
    """Of two states of nested dictionaries, lists, tensors and plain values, every bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_are_one_sentence(script, tmp_path, monkeypatch):
    foreign, text = tmp_path / "foreign.pt", tmp_path / "text.pt"
    torch.save({"algorithm": "SARSA"}, foreign)
    text.write_text("hello")
    main = importlib.import_module(script.removesuffix(".py")).main
    for flags, message in (
        ("--env-id Breakot", "error: --env-id Breakot is no game here: Environment `Breakot` doesn't exist"),
        ("--gamma 1.5", "error: --gamma is 1.5: it must be between 0 and 1"),
        (f"--resume {foreign}", "was written by SARSA, not by"),
        (f"--evaluate {text}", "is damaged or no checkpoint"),
        ("--device tpu", "error: --device tpu is"),
    ):
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        with pytest.raises(SystemExit, match=re.escape(message)) as error:
            main()
        assert "\n" not in str(error.value)
    result = run(tmp_path, flags, script)
    assert result.returncode == 1 and result.stderr == f"{error.value}\n"
