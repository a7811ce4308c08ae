"""The project around the scripts: shared blocks, dependencies, and the rule that a script stands alone."""

import ast
import re
import shutil
import sys

import check_copies
import pytest
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCRIPTS = sorted(ROOT.glob("*_atari*.py"))


def test_shared_blocks_are_the_same():
    assert check_copies.main([]) == 0


def test_check_copies_finds_and_fixes(tmp_path, capsys, monkeypatch):
    """Whole definitions and members that differ are named in the order in which they stand, and copied."""
    monkeypatch.setattr(
        check_copies,
        "OWN",
        {"c51_atari.py": {"ALGORITHM", "Agent.update", "AlgorithmFlags.n_step", "Atari.load_state_dict"}},
    )
    monkeypatch.setattr(check_copies, "BY_MEMBER", {"Agent", "AlgorithmFlags", "Atari"})
    template, other = tmp_path / "dqn_atari.py", tmp_path / "c51_atari.py"
    shutil.copy(ROOT / "dqn_atari.py", template)
    own = template.read_text()
    own = own.replace('ALGORITHM = "DQN"', 'ALGORITHM = "C51"', 1)
    own = own.replace("td_target = returns", "td_target = 2 * returns", 1)
    own += "\n\ndef projection():\n    pass\n"
    lacking = own.index('    def load_state_dict(self, state: dict) -> None:\n        """Goes on')
    own = own[:lacking].rstrip() + own[own.index("\n\n\n# ---", lacking) :]
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
    names = ["AlgorithmFlags.gamma", "STACK", "Replay", "Agent.act"]
    lines = [f"c51_atari.py: {name} is not as elsewhere" for name in names]
    assert capsys.readouterr().out.splitlines() == lines
    check_copies.main(["--fix", "Replay"], tmp_path)
    assert "# changed" not in other.read_text() and "STACK = 5 " in other.read_text()
    check_copies.main(["--fix", "Agent"], tmp_path)
    assert "torch.where(explore," in other.read_text() and "2 * returns" in other.read_text()
    assert check_copies.main(["--fix"], tmp_path) == 0
    assert check_copies.main([], tmp_path) == 0
    assert other.read_text() == own
    with pytest.raises(SystemExit, match="does not define Nothing"):
        check_copies.main(["--fix", "Nothing"], tmp_path)


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
