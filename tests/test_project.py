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


def test_check_copies_finds_and_fixes(tmp_path, capsys):
    template, other = tmp_path / "dqn_atari.py", tmp_path / "c51_atari.py"
    shutil.copy(ROOT / "dqn_atari.py", template)
    changed = template.read_text().replace("class Replay:", "class Replay:\n    # changed", 1)
    changed = changed.replace("STACK = 4 ", "STACK = 5 ", 1).replace('ALGORITHM = "DQN"', 'ALGORITHM = "C51"', 1)
    other.write_text(changed + "\n\ndef projection():\n    pass\n")
    assert check_copies.main([], tmp_path) == 1  # named in the order in which they stand
    assert capsys.readouterr().out.split("\n")[:-1] == [
        "c51_atari.py: STACK is not as elsewhere",
        "c51_atari.py: Replay is not as elsewhere",
    ]
    check_copies.main(["--fix", "Replay"], tmp_path)
    assert "# changed" not in other.read_text() and "STACK = 5 " in other.read_text()
    assert check_copies.main(["--fix"], tmp_path) == 0
    assert check_copies.main([], tmp_path) == 0
    assert other.read_text() == template.read_text().replace('"DQN"', '"C51"', 1) + "\n\ndef projection():\n    pass\n"
    with pytest.raises(SystemExit, match="does not define Nothing"):
        check_copies.main(["--fix", "Nothing"], tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_metadata_agrees_with_pyproject(script):
    """PEP 723: ``uv run FILE.py`` installs what ``pip install .`` installs."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", script.read_text()).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    assert metadata["dependencies"] == project["dependencies"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_stands_alone_and_reads_every_flag(script):
    tree = ast.parse(script.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {other.stem for other in SCRIPTS}
    (flags,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    names = [node.target.id for node in flags.body if isinstance(node, ast.AnnAssign)]
    assert [name for name in names if not re.search(rf"\bargs\.{name}\b", script.read_text())] == []
