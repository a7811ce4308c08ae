"""What every script does alike, from the shell on a real game; test_command_line.py looks closer at the template."""

import importlib
import os
import re
import sys

import pytest
import torch
from conftest import ROOT
from helpers import (
    LEARNING,
    NO_EXTRAS,
    OFTEN,
    SHORT,
    assert_group_is_gone,
    assert_same_end,
    read_video,
    run,
    run_folder,
    saved_step,
    start,
    wait_for,
    wait_for_next_checkpoint,
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


APEX = "apex_dqn_atari.py"
STEPS = {APEX: 4000}  # of the recorded run; 1,600 of the others


@pytest.fixture(scope="module", params=SCRIPTS)
def recorded(request, tmp_path_factory):
    """One run with everything on, evaluated twice: the script, its folder, what it printed.

    Ape-X finds a TMPDIR that is too long a path for Ray's sockets.
    """
    script, folder = request.param, tmp_path_factory.mktemp("recorded")
    temporary = folder / ("t" * 80)
    temporary.mkdir()
    environment = os.environ | ({"TMPDIR": str(temporary)} if script == APEX else {})
    flags = SHORT + f" --total-timesteps {STEPS.get(script, 1600)} --eval-frequency 8000 --seed 3"
    result = run(folder, adapt(flags, script), script, env=environment)
    assert result.returncode == 0, result.stderr
    return script, folder, result


def history(records: list[dict]) -> list[dict]:
    """What a run has logged, from its W&B record."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_run_is_complete(recorded):
    """Its files; the W&B record with code, model, charts, losses, evaluations and videos; each video decodes."""
    script, folder, result = recorded
    files = run_folder(folder)
    assert files.name.startswith(f"Breakout__{script[:-3]}__3__")
    names = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    last_step = STEPS.get(script, 1600)
    assert names >= {"checkpoint.pt", "model.pt", "videos/0000000800.mp4", f"videos/{last_step:010}.mp4"}
    assert f"step {last_step:,}: return" in result.stdout and "Traceback" not in result.stderr

    records = wandb_records(folder)
    rows = history(records)
    assert all("global_step" in row for row in rows)
    logged = {key.split(".")[0] for row in rows for key in row}
    charts = {"episodic_return", "episodic_length", "repeated_rewards", "SPS"}
    evaluation = {"episodic_return", "episodic_return_std", "episodic_length", "repeated_rewards"}
    wanted = {f"charts/{name}" for name in charts} | {f"eval/{name}" for name in evaluation}
    assert wanted | {"videos/eval", "images/eval"} <= logged
    losses = [value for row in rows for key, value in row.items() if key.startswith("losses/")]
    assert losses and all(float(value) == pytest.approx(float(value)) for value in losses)  # none is nan
    artifacts = {record["artifact"]["type"]: record["artifact"] for record in records if record["type"] == "artifact"}
    assert [entry["path"] for entry in artifacts["model"]["manifest"]["contents"]] == ["model.pt"]
    assert list(folder.glob(f"wandb/offline-run-*/files/code/{script}"))

    meta, frames = read_video(files / f"videos/{last_step:010}.mp4")
    length = [row["eval/episodic_length"] for row in rows if "eval/episodic_length" in row][-1]
    # one a step and one of the end, but none after the FIRE of each life
    assert min(meta["size"]) >= 630 and len(frames) == length - 4


def test_evaluate_plays_the_model_again(recorded, tmp_path):
    script, folder, result = recorded
    flags = f"--evaluate {run_folder(folder) / 'model.pt'} --wandb-mode disabled --eval-episodes 1 --no-capture-video"
    again = run(tmp_path, flags, script)
    assert again.returncode == 0, again.stderr
    line = f"step {STEPS.get(script, 1600):,}: return"
    assert [x for x in again.stdout.splitlines() if line in x] == [x for x in result.stdout.splitlines() if line in x]
    assert not list(tmp_path.glob("runs/*"))  # without a video nothing is left


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


def test_resumed_run_ends_bit_identical(recorded, tmp_path):
    """Killed after some updates and resumed, a run ends as one that was left alone, and evaluated on the way."""
    script, whole, _ = recorded
    if script == APEX:
        pytest.skip("its actors race")
    process = start(tmp_path, adapt(NO_EXTRAS + OFTEN, script) + " --total-timesteps 1600 --seed 3", script)
    wait_for(lambda: saved_step(tmp_path) > 700, process)
    process.kill()
    process.communicate()
    assert_group_is_gone(process.pid)
    process = start(tmp_path, f"--resume {run_folder(tmp_path)} --wandb-mode disabled", script)
    wait_for_next_checkpoint(run_folder(tmp_path) / "checkpoint.pt", process)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert_same_end(whole, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_are_one_sentence(script, tmp_path, monkeypatch):
    foreign, text = tmp_path / "foreign.pt", tmp_path / "text.pt"
    torch.save({"algorithm": "SARSA"}, foreign)
    text.write_text("hello")
    main = importlib.import_module(script.removesuffix(".py")).main
    for flags, message in (
        ("--env-id Breakot", "error: --env-id Breakot is no Atari game: Environment `Breakot` doesn't exist"),
        ("--gamma 1.5", "error: --gamma is 1.5: it must be between 0 and 1"),
        (f"--resume {foreign}", "was written by SARSA, not by"),
        (f"--evaluate {text}", "is damaged, no checkpoint, or too large"),
        ("--device tpu", "error: --device tpu is"),
    ):
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        with pytest.raises(SystemExit, match=re.escape(message)) as error:
            main()
        assert "\n" not in str(error.value)
    result = run(tmp_path, flags, script)
    assert result.returncode == 1 and result.stderr == f"{error.value}\n"


START_METHOD = '"fork" if sys.platform == "linux" else "spawn"'


@pytest.mark.parametrize("script", ["dqn_atari.py", "ppo_atari.py"])
def test_spawned_workers_play_as_forked_ones(script, tmp_path):
    """As on macOS and Windows, where each worker imports the script: both runs end alike."""
    source = (ROOT / script).read_text()
    assert source.count(START_METHOD) == 1
    for start_method in ("fork", "spawn"):
        folder = tmp_path / start_method
        folder.mkdir()
        (folder / script).write_text(source.replace(START_METHOD, f'"{start_method}"'))
        flags = adapt(NO_EXTRAS, script) + f" --num-workers 1 --total-timesteps 480 --exp-name {start_method}"
        result = run(folder, flags, folder / script)
        assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "fork", tmp_path / "spawn")


# ------------------------------------------------------------------------------------------------------- Ape-X

of_apex = pytest.mark.parametrize("recorded", [APEX], indirect=True)


@of_apex
def test_steps_per_update_bounds_the_ratio(recorded):
    """Exactly one update for each 40 steps after the first 400, however fast the actors are."""
    _, folder, _ = recorded
    checkpoint = torch.load(run_folder(folder) / "checkpoint.pt", weights_only=True)
    learned = checkpoint["global_step"] - 400
    assert checkpoint["agent"]["updates"] == pytest.approx(learned / 40, abs=1)


@of_apex
def test_charts_of_apex(recorded):
    """Those of the greediest actor beside those of the explorers, the replay's size, the age of the weights.

    When a chunk of 50 steps of 4 games arrives its weights are those of 100 or 150 steps before it: 10 to 15 updates.
    """
    _, folder, result = recorded
    assert "ray" not in result.stdout + result.stderr.lower()  # Ray itself has nothing to say
    rows = history(wandb_records(folder))
    games = [row for row in rows if "charts/episodic_return" in row]
    kinds = [("charts/episodic_return_greediest" in game, "charts/episodic_return_explorers" in game) for game in games]
    assert (False, False) not in kinds and any(explorers for _, explorers in kinds)
    charts = [row for row in rows if "charts/SPS" in row]
    names = {"updates_per_second", "replay_size", "weights_age", "actors_waiting"}
    assert all({f"charts/{name}" for name in names} <= set(row) for row in charts)
    assert [row["charts/replay_size"] for row in charts] == [min(row["global_step"], 1000) for row in charts]
    assert "losses/abs_td_error" in charts[-1] and charts[-1]["charts/updates_per_second"] > 0
    ages = [row["charts/weights_age"] for row in rows if row.get("charts/weights_age")]
    assert len(ages) > 2 and all(10 < age < 15 for age in ages[1:])
