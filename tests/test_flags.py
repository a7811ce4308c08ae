"""The command line of every script: what it takes, what it refuses before any work, and what ``--help`` shows."""

import importlib
import re
import sys
import types
from typing import Literal, Optional, Union, get_type_hints

import pytest
import torch
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*_atari*.py"))


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def dqn():
    return importlib.import_module("dqn_atari")


def parse(script, line: str, monkeypatch, default=None):
    """The flags that ``main`` would go on with."""
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *line.split()])
    args = script.parse_args(default)
    script.check_args(args)
    return args


# ----------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("text", ["1000000", "1_000_000", "1e6", "1E6", "1.0e+06", "1000000.0"])
def test_whole_numbers_can_be_written_in_several_ways(dqn, monkeypatch, text):
    args = parse(dqn, f"--total-timesteps {text} --learning-starts={text} --num-workers 2e0", monkeypatch)
    assert (args.total_timesteps, args.learning_starts, args.num_workers) == (1_000_000, 1_000_000, 2)
    assert type(args.total_timesteps) is type(args.num_workers) is int


def changed(script, old: str, new: str):
    """A copy of a script in which someone has edited a default."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    assert source.count(old) == 1
    copy = types.ModuleType(script.__name__)
    copy.__file__ = script.__file__
    sys.modules["copy_of_a_script"] = copy  # dataclasses look up types there
    copy.__name__ = "copy_of_a_script"
    exec(compile(source.replace(old, new), script.__file__, "exec"), vars(copy))
    return copy


def test_default_may_be_a_whole_number(script, tmp_path, monkeypatch):
    copy = changed(script, "checkpoint_minutes: float = 15.0", "checkpoint_minutes: float = 5")
    args = parse(copy, "", monkeypatch)
    assert args.checkpoint_minutes == 5
    torch.save(copy.header(args, 0) | {"agent": {}}, tmp_path / "model.pt")
    assert copy.read_flags(tmp_path / "model.pt", resume=False).checkpoint_minutes == 5


def test_default_of_another_type_is_refused_before_it_is_saved(script, monkeypatch):
    copy = changed(script, "total_timesteps: int = 10_000_000", "total_timesteps: int = 1e7")
    with pytest.raises(SystemExit) as error:
        parse(copy, "", monkeypatch)
    assert error.value.code == "error: the default of --total-timesteps is 10000000.0, which does not fit its type"


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "many", ""])
def test_other_numbers_are_not_whole(dqn, monkeypatch, capsys, text):
    for flag in ("seed", "num-workers"):
        with pytest.raises(SystemExit) as error:
            parse(dqn, f"--{flag}={text}", monkeypatch)
        assert error.value.code == 2 and f"--{flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, value",
    [
        ("", True),
        ("--episodic-life", True),
        ("--no-episodic-life", False),
        ("--no_episodic_life", False),
        ("--episodic_life=True", True),
        ("--episodic_life=False", False),
        ("--episodic-life=false", False),
        ("--no-episodic-life --episodic-life=TRUE", True),
    ],
)
def test_switches_are_taken_as_sweeps_write_them(dqn, monkeypatch, line, value):
    assert parse(dqn, line, monkeypatch).episodic_life is value


def test_only_switches_are_read_as_switches(dqn, monkeypatch, capsys):
    args = parse(dqn, "--exp-name=True --wandb-group=false", monkeypatch)
    assert (args.exp_name, args.wandb_group) == ("True", "false")
    for line in ("--episodic-life=1", "--episodic-life=maybe", "--no-such-flag=True"):
        with pytest.raises(SystemExit) as error:
            parse(dqn, line, monkeypatch)
        assert error.value.code == 2 and capsys.readouterr().err


def test_every_flag_of_a_run_holds_unless_given_anew(script, monkeypatch):
    saved = script.Args(env_id="Pong", seed=7, gamma=0.5, wandb_group="seeds", episodic_life=False, eval_episodes=2)
    args = parse(script, "--gamma 0.6 --episodic-life", monkeypatch, default=saved)
    expected = vars(saved) | {"gamma": 0.6, "episodic_life": True}
    assert vars(args) == expected and type(args) is script.Args
    assert saved.gamma == 0.5  # it is not changed


@pytest.mark.parametrize("env_id", ["Breakout", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "Breakout-v4"])
def test_a_game_has_one_name(dqn, monkeypatch, env_id):
    assert parse(dqn, f"--env-id {env_id}", monkeypatch).env_id == "Breakout"
    assert parse(dqn, "", monkeypatch, default=dqn.Args(env_id=env_id)).env_id == "Breakout"


# ----------------------------------------------------------------------------------------------------- errors


def numbers(script) -> dict[str, type]:
    """Every flag that is a number, and whether it is an int or a float."""
    hints = get_type_hints(script.Args)
    kinds = {name: {int, float} & {hint, *getattr(hint, "__args__", ())} for name, hint in hints.items()}
    return {name: kind.pop() for name, kind in kinds.items() if kind}


def test_every_number_has_bounds(script):
    assert len(numbers(script)) > 20
    for name, kind in numbers(script).items():
        out_of_range = [-(10**6) - 1, 10**23] + [float("nan"), float("inf"), 1e308] * (kind is float)
        for value in out_of_range:
            with pytest.raises(SystemExit) as error:
                script.check_args(script.Args(**{name: value}))
            sentence = f"error: --{name.replace('_', '-')} is {value:,}: it must be between "
            assert error.value.code.startswith(sentence), error.value.code


REFUSED = [
    ("dqn_atari", "--env-id Breakot", "error: --env-id Breakot is no Atari game: Environment `Breakot` doesn't exist"),
    ("dqn_atari", "--env-id breakout", "Did you mean: `Breakout`?"),
    ("dqn_atari", "--env-id CartPole-v1", "error: --env-id CartPole-v1 is no Atari game: Environment"),
    ("dqn_atari", "--num-envs 0", "error: --num-envs is 0: it must be between 1 and 10,000"),
    ("dqn_atari", "--num_envs 0", "error: --num-envs is 0"),
    ("dqn_atari", "--num-envs 1000000", "error: --num-envs is 1,000,000: it must be between 1 and 10,000"),
    ("dqn_atari", "--gamma 1.5", "error: --gamma is 1.5: it must be between 0 and 1"),
    ("dqn_atari", "--gamma nan", "error: --gamma is nan: it must be between 0 and 1"),
    ("dqn_atari", "--start-e 0.1 --end-e 0.5", "error: --end-e is 0.5: it must be between 0 and 0.1"),
    ("dqn_atari", "--eval-epsilon -0.1", "error: --eval-epsilon is -0.1: it must be between 0 and 1"),
    ("dqn_atari", "--num-workers 9", "error: --num-workers is 9: it must be between 0 and 8"),
    ("dqn_atari", "--learning-rate 1e308", "error: --learning-rate is 1e+308: it must be between 1e-12 and 1"),
    ("dqn_atari", "--buffer-size 1e23", "error: --buffer-size is 99,999,999,999,999,991,611,392: it must be"),
    ("dqn_atari", "--batch-size 100 --learning-starts 64", "error: --batch-size 100 is more than the 56 transitions"),
    ("dqn_atari", "--buffer-size 56", "transitions to draw from when learning starts"),
    (
        "bootstrapped_dqn_atari",
        "--n-step 1000 --learning-starts 8000",
        "transitions to draw from when learning starts",
    ),
    ("dqn_atari", "--max-episode-frames 79", "error: --max-episode-frames is 79: it must be between 80 and"),
    ("bootstrapped_dqn_atari", "--n-step 10 --max-episode-frames 151", "is 10: it must be between 1 and 9"),
    ("bootstrapped_dqn_atari", "--n-step 0", "error: --n-step is 0: it must be between 1 and 1,000"),
    ("dqn_atari", "--resume a --evaluate b", "error: --resume trains and --evaluate does not: give one of them"),
    ("dqn_atari", "--resume=", "error: an empty --resume or --evaluate: give a run folder"),
    ("dqn_atari", "--evaluate=", "error: an empty --resume or --evaluate: give a run folder"),
    ("c51_atari", "--n-atoms 20000", "error: --n-atoms is 20,000: it must be between 2 and 1,000"),
    ("c51_atari", "--v-min 99999.999999 --v-max 100000", "--v-min 99999.999999 and --v-max 100000.0 leave no room"),
    ("ppo_atari", "--num-steps 1e9", "error: --num-steps is 1,000,000,000: it must be between 1 and 100,000"),
    ("ppo_atari", "--learning-rate 1e308", "error: --learning-rate is 1e+308"),
]


@pytest.mark.parametrize("name, line, message", REFUSED)
def test_bad_flags_end_with_one_sentence(monkeypatch, name, line, message):
    with pytest.raises(SystemExit) as error:
        parse(importlib.import_module(name), line, monkeypatch)
    assert message in error.value.code and error.value.code.startswith("error: ")
    assert len(error.value.code.splitlines()) == 1


@pytest.mark.parametrize(
    "hint, fitting, others",
    [
        (Literal["a", "b"] | None, ["a", None], ["c", 1]),
        (tuple[int, ...] | None, [(), (1, 2), None], [(1, "x"), [1]]),
        (Optional[list[float]], [[1.5], [2], None], [["x"], 1.0]),  # noqa: UP045
        (Union[int, str], [3, "x"], [1.5, None]),  # noqa: UP007
        (float | None, [1.5, 1, None], ["1"]),
    ],
)
def test_flags_may_have_a_union_as_their_type(script, hint, fitting, others):
    assert all(script.is_a(value, hint) for value in fitting)
    assert not any(script.is_a(value, hint) for value in others)


@pytest.mark.parametrize("line", ["--no-such-flag 1", "--precision float16", "--seed one"])
def test_tyro_names_the_flag_that_it_does_not_understand(dqn, monkeypatch, capsys, line):
    with pytest.raises(SystemExit) as error:
        parse(dqn, line, monkeypatch)
    assert error.value.code == 2 and line.split()[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_every_flag_in_its_group(script, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        parse(script, "--help", monkeypatch)
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert script.__doc__.splitlines()[0] in text
    titles = re.findall(r"(?m)^\W*([\w&]+) options\b", text)
    assert titles == ["algorithm", "game", "evaluation", "W&B", "run"]
    boxes = re.split(r"(?m)^\W*[\w&]+ options\b.*$", text)[1:]
    groups = [script.AlgorithmFlags, script.GameFlags, script.EvaluationFlags, script.WandbFlags, script.RunFlags]
    for box, group in zip(boxes, groups):
        flags = re.findall(r"(?m)^. (--[\w-]+)", box)  # not those that a line of text begins with
        assert flags == [f"--{name.replace('_', '-')}" for name in group.__annotations__]
    assert max(map(len, text.splitlines()[4:])) <= columns
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    for default in ("(default: 10_000_000)", "(default: Breakout)", "(default: True)"):
        assert default in words
