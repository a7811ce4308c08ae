"""The project around the scripts: shared blocks, dependencies, and the rule that a script stands alone."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize

import check_copies
import pytest
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCRIPTS = [ROOT / name for name in check_copies.SCRIPTS]
MOST_TOKENS = 14_750  # in dqn_atari.py


def test_shared_blocks_are_the_same():
    assert check_copies.main([]) == 0


def test_check_copies_finds_and_fixes(tmp_path, capsys, monkeypatch):
    """Whole definitions and members that differ are named in the order in which they stand, and copied."""
    monkeypatch.setattr(
        check_copies,
        "OWN",
        {"c51_atari.py": {"ALGORITHM", "Agent.update", "AlgorithmFlags.start_e", "Atari.load_state_dict"}},
    )
    monkeypatch.setattr(check_copies, "BY_MEMBER", {"Agent", "AlgorithmFlags", "Atari"})
    template, other = tmp_path / "dqn_atari.py", tmp_path / "c51_atari.py"
    shutil.copy(ROOT / "dqn_atari.py", template)
    own = template.read_text()
    own = own.replace('ALGORITHM = "DQN"', 'ALGORITHM = "C51"', 1)
    own = own.replace("td_target = rewards", "td_target = 2 * rewards", 1)
    own += "\n\ndef projection():\n    pass\n"
    lacking = own.index('    def load_state_dict(self, state: dict) -> None:\n        """Goes on')
    own = own[:lacking].rstrip() + own[own.index("\n\n\nGame = Atari", lacking) :]
    changed = own
    for old, drifted in (
        ("STACK = 4 ", "STACK = 5 "),
        ("class Replay:", "class Replay:\n    # changed"),
        ('"""discount factor"""', '"""discount"""'),
        ("torch.where(explore,", "torch.where(~explore,"),
    ):
        assert old in changed
        changed = changed.replace(old, drifted, 1)
    other.write_text(changed)
    assert check_copies.main([], tmp_path) == 1
    names = ["STACK", "AlgorithmFlags.gamma", "Replay", "Agent.act"]
    lines = [f"c51_atari.py: {name} is not as elsewhere" for name in names]
    output = capsys.readouterr().out
    assert output.splitlines()[:4] == lines
    assert "--fix" in output and "OWN" in output  # what to do
    check_copies.main(["--fix", "Replay"], tmp_path)
    assert "# changed" not in other.read_text() and "STACK = 5 " in other.read_text()
    check_copies.main(["--fix", "Agent"], tmp_path)
    assert "torch.where(explore," in other.read_text() and "2 * rewards" in other.read_text()
    assert check_copies.main(["--fix"], tmp_path) == 0
    assert check_copies.main([], tmp_path) == 0
    assert other.read_text() == own
    with pytest.raises(SystemExit, match="does not define Nothing"):
        check_copies.main(["--fix", "Nothing"], tmp_path)


def test_copy_under_another_name_is_left_alone(tmp_path):
    """An experiment: ``cp dqn_atari.py my_idea_atari.py``, with another loss."""
    template = (ROOT / "dqn_atari.py").read_text()
    (tmp_path / "dqn_atari.py").write_text(template)
    (tmp_path / "my_idea_atari.py").write_text(template.replace("F.mse_loss", "F.smooth_l1_loss"))
    assert check_copies.main([], tmp_path) == 0


def density(path) -> tuple[int, float]:
    """Code tokens of a script, without comments and docstrings, and how many a line of code has.

    An f-string is one token, as it was before Python 3.12.
    """
    source = path.read_text()
    documented = set()  # lines of docstrings
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, node.end_lineno + 1))
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = []
    depth = 0  # of f-strings in each other
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if depth == 0 and token.type not in no_code and token.start[0] not in documented:
            tokens.append(token)
        if kind.endswith("STRING_START"):
            depth += 1
        elif kind.endswith("STRING_END"):
            depth -= 1
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(tokens), len(tokens) / len(lines)


def test_code_is_easy_on_the_eye(capsys):
    """At most 10 tokens a line in each script; run with -s to see the figures."""
    figures = {path.name: density(path) for path in SCRIPTS}
    with capsys.disabled():
        for name, (tokens, per_line) in figures.items():
            print(f"\n{name}: {tokens:,} code tokens, {per_line:.1f} a line", end="")
    assert max(per_line for _, per_line in figures.values()) <= 10
    assert figures["dqn_atari.py"][0] <= MOST_TOKENS


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_code_is_formatted(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_algorithm_comes_first():
    """Nothing of the machinery stands before the training loop."""
    for path in SCRIPTS:
        code, banner, machinery = path.read_text().partition("# " + 109 * "=")
        names = [node.name for node in ast.parse(code).body if hasattr(node, "name")]
        assert banner and "train" in names and names[0] == "AlgorithmFlags", path.name
        assert "Overlay" not in names and "class Atari(gym.Wrapper)" in machinery, path.name
        assert code.count("\n") < 750, path.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_metadata_agrees_with_pyproject(script):
    """PEP 723: ``uv run FILE.py`` installs what ``pip install .`` installs, and Ray for Ape-X."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", script.read_text()).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    extra = project["optional-dependencies"]["apex"] if script.name == "apex_dqn_atari.py" else []
    assert metadata["dependencies"] == project["dependencies"] + extra


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_stands_alone_and_reads_every_flag(script):
    tree = ast.parse(script.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {other.stem for other in SCRIPTS}
    groups = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Flags")]
    names = [node.target.id for flags in groups for node in flags.body if isinstance(node, ast.AnnAssign)]
    assert len(names) > 30
    assert [name for name in names if not re.search(rf"\bargs\.{name}\b", script.read_text())] == []
