"""Checkpoints: whole or refused with one sentence, never half written, written by one process, trusted with nothing."""

import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NO_EXTRAS, OFTEN, run, run_folder, start, wait_for, with_small_trunk

import apex_dqn_atari
import dqn_atari

pytestmark = pytest.mark.slow

SERIAL = ["dqn_atari", "c51_atari", "bootstrapped_dqn_atari", "ppo_atari"]
FLAGS = (
    "--env-id Breakout --num-workers 0 --eval-frequency 0 --eval-episodes 1 --no-capture-video --wandb-mode disabled"
    " --device cpu"
)
OFF_POLICY = " --num-envs 2 --learning-starts 64 --buffer-size 100 --total-timesteps 80 --batch-size 8"
ON_POLICY = " --num-envs 2 --num-steps 10 --num-minibatches 2 --update-epochs 1 --total-timesteps 80"


def no_evaluation(*args, **kwargs):
    pass


class KeptGames:
    """Stands in for ``Game``: the three of a start are made once for all, since a reset or a restore leaves nothing."""

    def __init__(self, game: type):
        self.find_game = game.find_game
        self.games = itertools.cycle([game(dqn_atari.Args()) for _ in range(3)])

    def __call__(self, args):
        game = next(self.games)
        game.game_ended = True  # as in one that has just been made
        return game


@functools.cache
def stand_ins(script: str) -> dict:
    """By name, what a script is given to be fast."""
    module = importlib.import_module(script)
    network = "ActorCritic" if script == "ppo_atari" else "QNetwork"
    return {"Game": KeptGames(module.Game), network: with_small_trunk(getattr(module, network))}


def call_main(monkeypatch, folder: Path, flags: str, script="dqn_atari", evaluate=no_evaluation) -> int:
    """``main`` of a script in this process, as from the shell; small, and without evaluations: they take the time."""
    module = importlib.import_module(script)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *flags.split()])
    for name, stand_in in stand_ins(script).items():
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "keep_freed_memory", no_evaluation)
    monkeypatch.setattr(torch, "set_num_threads", no_evaluation)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return module.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text.startswith("error: ") and len(text.splitlines()) == 1, text
    return text


@pytest.fixture(scope="module", params=SERIAL)
def trained(request, tmp_path_factory):
    """A script and the folder of a short run of it, with updates."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = FLAGS + (ON_POLICY if request.param == "ppo_atari" else OFF_POLICY)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call_main(monkeypatch, folder, flags, request.param) == 0
    return request.param, run_folder(folder)


@pytest.fixture(scope="module")
def dqn_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dqn")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call_main(monkeypatch, folder, FLAGS + OFF_POLICY) == 0
    return run_folder(folder)


# ------------------------------------------------------------------------------------------ what is not whole


def games_of(contents: dict) -> list[dict]:
    return contents["envs"] if "envs" in contents else contents["ranks"][0]["envs"]


def set_key(*keys):
    """A change of one entry of a checkpoint: the last of ``keys`` is its value; ``...`` removes it."""

    def change(contents: dict) -> None:
        *path, name, value = keys
        for key in path:
            contents = contents[key]
        if value is ...:
            del contents[name]
        else:
            contents[name] = value

    return change


def garbage_emulator(contents: dict) -> None:
    games_of(contents)[1]["emulator"] = b"garbage"


def fewer_games(contents: dict) -> None:
    games_of(contents).pop()


def short_stack(contents: dict) -> None:
    game = games_of(contents)[0]
    game["stack"] = game["stack"][:84]


def other_random_state(contents: dict) -> None:
    owner = contents if "random" in contents else contents["ranks"][0]
    owner["random"]["cpu"] = torch.zeros(16, dtype=torch.uint8)


def other_layers(contents: dict) -> None:
    """As in a copy of the script with other layers."""
    agent = contents["agent"]
    agent["network" if "network" in agent else "q_network"].popitem()


def moments_of_other_shape(contents: dict) -> None:
    moments = next(iter(contents["agent"]["optimizer"]["state"].values()))
    moments["exp_avg"] = moments["exp_avg"][:1]


CHANGES = {
    "no args": set_key("args", ...),
    "args are a list": set_key("args", [1, 2]),
    "a flag of another type": set_key("args", "gamma", "high"),
    "a choice that there is not": set_key("args", "precision", "float8"),
    "a step that is no number": set_key("global_step", "80"),
    "a step below zero": set_key("global_step", -5),
    "evaluated up to no number": set_key("evaluated_step", "80"),
    "no W&B run": set_key("wandb_run_id", ...),
    "a W&B run that is no name": set_key("wandb_run_id", 7),
    "fewer games": fewer_games,
    "an emulator of garbage": garbage_emulator,
    "a short stack": short_stack,
    "another random state": other_random_state,
    "other layers": other_layers,
    "other moments": moments_of_other_shape,
}
REPLAY_CHANGES = {
    "too many steps": set_key("replay", "num_steps", 10**12),
    "another step": set_key("global_step", 76),
    "a replay longer than the buffer": set_key("args", "buffer_size", 60),
    "rewards of another shape": set_key("replay", "rewards", torch.zeros(3)),
}


def test_what_is_not_whole_is_refused_with_one_sentence(trained, tmp_path, monkeypatch):
    script, folder = trained
    changes = CHANGES | (REPLAY_CHANGES if script != "ppo_atari" else {})
    for name, change in changes.items():
        contents = torch.load(folder / "checkpoint.pt", weights_only=True)
        change(contents)
        copy = tmp_path / name.replace(" ", "_")  # this process keeps the lock of each
        copy.mkdir()
        torch.save(contents, copy / "checkpoint.pt")
        flags = f"--resume {copy} --total-timesteps 160 --wandb-mode disabled"
        with pytest.raises(SystemExit) as error:
            call_main(monkeypatch, tmp_path, flags, script)
        assert str(copy / "checkpoint.pt") in sentence(error), name
        assert "does not fit this script, or is damaged" in sentence(error), name


@pytest.mark.parametrize("script", [*SERIAL, "dqn_atari_visual", "apex_dqn_atari"])
def test_weight_that_is_not_finite_is_never_saved(script, tmp_path):
    module = importlib.import_module(script)
    agent = module.Agent(module.Args(), 4, torch.device("cpu"))
    agent.optimizer.param_groups[0]["params"][-1].data[0] = float("nan")
    with pytest.raises(SystemExit, match="error: a weight is infinite or nan"):
        module.Run(module.Args(), tmp_path, agent, {}).save_checkpoint(0)
    assert not list(tmp_path.iterdir())


def test_model_without_network_is_refused(trained, tmp_path, monkeypatch):
    script, folder = trained
    contents = torch.load(folder / "model.pt", weights_only=True)
    contents["agent"] = {}
    torch.save(contents, tmp_path / "model.pt")
    with pytest.raises(SystemExit) as error:
        call_main(monkeypatch, tmp_path, f"--evaluate {tmp_path / 'model.pt'} --wandb-mode disabled", script)
    assert "does not fit this script, or is damaged: it has no" in sentence(error)
    assert not list(tmp_path.glob("runs/*"))


def test_every_flipped_bit_is_seen(dqn_run, tmp_path):
    """What is not refused holds the same as before: the bit was in what nobody reads."""
    original = (dqn_run / "checkpoint.pt").read_bytes()
    data = bytearray(original)
    whole = torch.load(dqn_run / "checkpoint.pt", weights_only=True)
    flipped, rng = tmp_path / "flipped.pt", np.random.default_rng(1)
    refused = 0
    places = [*rng.integers(len(data), size=60), *rng.integers(len(data) - 4000, len(data), size=20)]
    for place in map(int, places):
        data[place] ^= 1 << int(rng.integers(8))
        flipped.write_bytes(data)
        if not dqn_atari.is_intact(flipped):
            refused += 1
        else:
            try:
                contents = torch.load(flipped, weights_only=True, mmap=True)
            except Exception:
                refused += 1
            else:
                assert same(contents, whole), place
        data[place] = original[place]
    assert refused > 60


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_flipped_bit_ends_resume_and_evaluate_with_one_sentence(dqn_run, tmp_path, monkeypatch):
    for name, flag in (("checkpoint.pt", "--resume"), ("model.pt", "--evaluate")):
        data = bytearray((dqn_run / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SystemExit) as error:
            call_main(monkeypatch, tmp_path, f"{flag} {tmp_path / name} --wandb-mode disabled")
        assert "is damaged: use another one" in sentence(error)


@pytest.mark.parametrize("script", [*SERIAL, "dqn_atari_visual", "apex_dqn_atari"])
def test_flags_are_read_back(script, tmp_path):
    module = importlib.import_module(script)
    args = module.Args(seed=7, **({"panels": ("game", "history")} if script == "dqn_atari_visual" else {}))
    torch.save(module.header(args, 0) | {"agent": {}}, tmp_path / "model.pt")
    assert module.read_flags(tmp_path / "model.pt", resume=False) == args


# -------------------------------------------------------------------------------- what a file may not decide


def test_file_of_a_stranger_chooses_no_path_address_or_account(dqn_run, tmp_path, monkeypatch):
    contents = torch.load(dqn_run / "model.pt", weights_only=True)
    contents["args"] |= {"run_dir": str(tmp_path / "elsewhere"), "exp_name": "../../outside", "wandb_mode": "online"}
    contents["args"] |= {"wandb_project_name": "theirs", "wandb_entity": "them", "wandb_group": "g", "seed": 7}
    torch.save(contents, tmp_path / "model.pt")
    saved = dqn_atari.read_flags(tmp_path / "model.pt", resume=False)
    assert saved.seed == 7
    defaults = dqn_atari.Args()
    assert all(getattr(saved, name) == getattr(defaults, name) for name in dqn_atari.LOCAL_FLAGS)
    monkeypatch.chdir(tmp_path)
    made = dqn_atari.make_run_dir(saved).resolve()
    assert made.parent == tmp_path / "runs" and made.is_dir()


def test_file_of_a_stranger_chooses_no_ray_cluster(tmp_path):
    contents = apex_dqn_atari.header(apex_dqn_atari.Args(ray_address="203.0.113.1:6379"), 0) | {"agent": {}}
    torch.save(contents, tmp_path / "model.pt")
    assert apex_dqn_atari.read_flags(tmp_path / "model.pt", resume=False).ray_address == "local"


def test_resume_says_what_it_does_not_take_from_the_file(dqn_run, tmp_path, monkeypatch, capsys):
    contents = torch.load(dqn_run / "checkpoint.pt", weights_only=True)
    contents["args"]["wandb_project_name"] = "mine"
    contents["script"] = "my_idea.py"
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert call_main(monkeypatch, tmp_path, f"--resume {tmp_path} --total-timesteps 88 --wandb-mode disabled") == 0
    printed = capsys.readouterr()
    assert "--wandb-project-name is watchrl, it was mine" in printed.out
    assert "warning: " in printed.err and "was written by my_idea.py" in printed.err


# ------------------------------------------------------------------------------------- flags that cannot act


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seed 2", "error: --seed cannot change on --resume: it was 1"),
        ("--num-envs 8", "error: --num-envs cannot change on --resume: it was 2"),
        ("--run-dir elsewhere", "error: --run-dir cannot act on --resume"),
        ("", "is at step 80 of --total-timesteps 80: raise it to go on, or play the model with --evaluate"),
        ("--total-timesteps 40", "is at step 80 of --total-timesteps 40: raise it"),
    ],
)
def test_flag_that_cannot_act_on_resume_is_refused(dqn_run, tmp_path, monkeypatch, flags, message):
    with pytest.raises(SystemExit) as error:
        call_main(monkeypatch, tmp_path, f"--resume {dqn_run} --wandb-mode disabled {flags}")
    assert message in sentence(error)


def test_run_that_died_before_its_model_was_written_is_finished_by_resume(dqn_run, tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes((dqn_run / "checkpoint.pt").read_bytes())
    assert call_main(monkeypatch, tmp_path, f"--resume {tmp_path} --wandb-mode disabled") == 0
    whole, again = (torch.load(path / "model.pt", weights_only=True) for path in (dqn_run, tmp_path))
    assert same(whole["agent"], again["agent"])


@pytest.mark.parametrize("script", SERIAL)
def test_model_that_is_missing_or_older_is_written_on_resume(script, tmp_path, monkeypatch):
    """The last step may lie beyond --total-timesteps: 80 of 79."""
    module = importlib.import_module(script)
    flags = FLAGS + (ON_POLICY if script == "ppo_atari" else OFF_POLICY)
    assert call_main(monkeypatch, tmp_path, flags.replace("-timesteps 80", "-timesteps 79"), script) == 0
    folder = run_folder(tmp_path)
    resume = f"--resume {folder} --wandb-mode disabled"
    (folder / "model.pt").unlink()
    assert call_main(monkeypatch, tmp_path, resume, script) == 0
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 80
    with pytest.raises(SystemExit) as error:
        call_main(monkeypatch, tmp_path, resume, script)
    assert "is at step 80 of --total-timesteps 79: raise it" in sentence(error)

    with monkeypatch.context() as full_disk:
        save = module.save
        full_disk.setattr(module, "save", lambda path, contents: path.name != "model.pt" and save(path, contents))
        assert call_main(monkeypatch, tmp_path, resume + " --total-timesteps 99", script) == 1
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 80
    assert call_main(monkeypatch, tmp_path, resume, script) == 0
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 100


# -------------------------------------------------------------------------------------- folders, disks, locks


def test_starts_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260131-120000")
    made = [dqn_atari.make_run_dir(dqn_atari.Args(run_dir=str(tmp_path), exp_name="a b")) for _ in range(6)]
    assert len(set(made)) == 6 and all(path.parent == tmp_path for path in made)
    assert made[0].name.endswith("__a-b__1__20260131-120000") and made[5].name == made[0].name + "-6"


def test_link_to_a_disk_that_is_not_there_ends_with_one_sentence(tmp_path):
    runs = tmp_path / "runs"
    runs.symlink_to(tmp_path / "missing")
    with pytest.raises(SystemExit, match=f"error: the run folder {runs}/.* cannot be made: File exists"):
        dqn_atari.make_run_dir(dqn_atari.Args(run_dir=str(runs)))


def test_file_that_may_not_be_read_is_not_called_damaged(dqn_run, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(SystemExit, match="error: .*checkpoint.pt cannot be read: Permission denied"):
        dqn_atari.load(dqn_run / "checkpoint.pt")


def test_failed_start_leaves_no_folder(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        call_main(monkeypatch, tmp_path, FLAGS + OFF_POLICY.replace("--buffer-size 100", "--buffer-size 1000000000000"))
    assert not list(tmp_path.glob("runs/*"))


def test_second_process_is_refused_and_the_lock_dies_with_the_first(tmp_path):
    process = start(tmp_path, NO_EXTRAS + OFTEN + " --total-timesteps 1000000 --num-workers 2")
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    folder = run_folder(tmp_path)
    result = run(tmp_path, f"--resume {folder} --wandb-mode disabled")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        f"another process is training the run in {folder}: wait for its end, or stop it"
    )
    process.kill()
    process.wait()
    dqn_atari.lock(folder)  # its workers may live on for a moment
    process.communicate()


def test_what_a_killed_process_has_half_written_is_removed(tmp_path):
    (tmp_path / "checkpoint.123.tmp").write_bytes(b"half")
    dqn_atari.lock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_failed_checkpoint_warns_with_the_reason_of_the_disk(tmp_path, monkeypatch, capsys):
    """A read-only disk, also for the clean-up, and a folder that is a file: nothing is raised, the old file stays."""
    path = tmp_path / "checkpoint.pt"
    assert dqn_atari.save(path, {"a": 1})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(Path, "unlink", fail)
        for _ in range(2):
            assert not dqn_atari.save(path, {"a": 2})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(
        "was not written" in line and "Read-only file system; after a full disk" in line for line in warnings
    )
    assert path.read_bytes() == before
    assert not dqn_atari.save(path / "checkpoint.pt", {"a": 2})
    assert "Not a directory" in capsys.readouterr().err or path.read_bytes() == before


def test_full_disk_is_called_by_its_name(tmp_path, capfd):
    """Torch raises "unexpected pos" when a write fails."""
    resource = pytest.importorskip("resource")
    contents = {"a": torch.zeros(10**6)}

    def save_on_a_small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2)
        assert not dqn_atari.save(tmp_path / "checkpoint.pt", contents)

    process = multiprocessing.get_context("fork").Process(target=save_on_a_small_disk)
    process.start()
    process.join()
    printed = capfd.readouterr().err
    assert process.exitcode == 0, printed
    assert "File too large" in printed and "unexpected pos" not in printed
    assert not list(tmp_path.iterdir())


def test_removed_run_folder_is_made_again(tmp_path):
    path = tmp_path / "gone" / "checkpoint.pt"
    assert dqn_atari.save(path, {"a": 1}) and path.is_file()


def test_stop_says_what_there_is_to_go_on_with(tmp_path):
    say = functools.partial(dqn_atari.how_to_go_on, dqn_atari.Args(total_timesteps=100))
    assert say(tmp_path, 80, None) == "stopped at step 80; nothing could be saved"
    (tmp_path / "checkpoint.pt").touch()
    assert say(tmp_path, 80, 80) == f"stopped at step 80; go on with: --resume {tmp_path}"
    assert say(tmp_path, 80, 40) == (
        f"stopped at step 80, which could not be saved; go on from an earlier one: --resume {tmp_path}"
    )
    for step in (80, 100):
        torch.save(dqn_atari.header(dqn_atari.Args(), step) | {"agent": {}}, tmp_path / "model.pt")
        assert say(tmp_path, 80, 80) == f"stopped at step 80; go on with: --resume {tmp_path}"
        assert ("--evaluate" in say(tmp_path, 100, 100)) == (step == 100)
    assert say(tmp_path, 100, 100).endswith(f"--evaluate {tmp_path / 'model.pt'}")


# ------------------------------------------------------------------------------- evaluations cost nothing


@pytest.mark.parametrize("script", SERIAL)
def test_checkpoint_stands_before_the_evaluation_of_its_step(script, tmp_path, monkeypatch):
    """What breaks in an evaluation costs nothing: the run goes on, and plays it in its next step."""
    flags = FLAGS + (ON_POLICY if script == "ppo_atari" else OFF_POLICY)
    flags = flags.replace("--eval-frequency 0", "--eval-frequency 400 --checkpoint-minutes 1e-9")

    def broken(*args, **kwargs):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        call_main(monkeypatch, tmp_path, flags, script, broken)
    assert torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] == 40
    assert evaluations_of_resumed_run(monkeypatch, tmp_path, script) == [60 if script == "ppo_atari" else 42, 80]


@pytest.mark.parametrize("script", SERIAL)
def test_evaluation_that_a_stop_cuts_off_is_played_when_the_run_goes_on(script, tmp_path, monkeypatch):
    flags = FLAGS + (ON_POLICY if script == "ppo_atari" else OFF_POLICY)
    flags = flags.replace("--eval-frequency 0", "--eval-frequency 400")

    def stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    assert call_main(monkeypatch, tmp_path, flags, script, stop) == 128 + signal.SIGTERM
    assert torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)["global_step"] == 40
    assert evaluations_of_resumed_run(monkeypatch, tmp_path, script) == [60 if script == "ppo_atari" else 42, 80]
    flags = " --total-timesteps 100 --eval-frequency 80"  # that of step 80 has been played: it was the last
    assert evaluations_of_resumed_run(monkeypatch, tmp_path, script, flags) == [100]


def evaluations_of_resumed_run(monkeypatch, folder: Path, script: str, flags="") -> list[int]:
    """The steps at which a run evaluates after it has been resumed."""
    evaluated = []

    def evaluate(args, agent, global_step, *rest):
        evaluated.append(global_step)

    flags = f"--resume {run_folder(folder)} --wandb-mode disabled" + flags
    assert call_main(monkeypatch, folder, flags, script, evaluate) == 0
    return evaluated


def test_stop_in_the_last_evaluation_ends_at_once_and_the_model_is_there(tmp_path):
    flags = NO_EXTRAS.replace("--eval-episodes 1", "--eval-episodes 100000") + " --total-timesteps 500"
    process = start(tmp_path, flags)
    wait_for(lambda: list(tmp_path.glob("runs/*/model.pt")), process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, stderr
    model = run_folder(tmp_path) / "model.pt"
    assert "stopped in the last evaluation; play the model with: --evaluate" in stdout
    assert torch.load(model, weights_only=True)["global_step"] == 500
