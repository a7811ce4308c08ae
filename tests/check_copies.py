"""Keeps the blocks that several scripts share the same, to the letter.

    python tests/check_copies.py                                 names every definition that differs
    python tests/check_copies.py --fix Replay                    copies it from dqn_atari.py into the others
    python tests/check_copies.py --fix --from c51_atari.py NAME  ... from another script
    python tests/check_copies.py --fix                           copies all that differ

Compared are all top-level definitions (functions, classes, assignments) that occur in two scripts or more under the
same name, with their comments, except those that ``DIFFER`` allows to be each script's own.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "dqn_atari.py"
# Definitions that say what an algorithm is; everything else is the same wherever it occurs.
DIFFER = {"ALGORITHM", "Args", "check_args", "Batch", "DQN", "Overlay", "train", "main", "evaluate"}


def definitions(path: Path) -> dict[str, str]:
    """The text of every top-level definition of a script."""
    source, found = path.read_text(), {}
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            for name in [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]:
                found[name.id] = "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these definitions")
    parser.add_argument("--fix", action="store_true", help="copy instead of complaining")
    parser.add_argument("--from", dest="source", default=TEMPLATE, metavar="FILE", help="the script that is right")
    args = parser.parse_args(arguments)
    scripts = {path: definitions(path) for path in sorted(root.glob("*_atari*.py"))}
    if root / args.source not in scripts:
        sys.exit(f"error: there is no script {args.source}")
    source = scripts[root / args.source]
    if missing := set(args.names) - set(source):
        sys.exit(f"error: {args.source} does not define {', '.join(sorted(missing))}")
    different = 0
    # blocks that the source does not have are compared with the first script that has them
    right = {name: text for blocks in [source, *scripts.values()][::-1] for name, text in blocks.items()}
    for path, blocks in scripts.items():
        for name, text in blocks.items():
            if text == right[name] or name in DIFFER or (args.names and name not in args.names):
                continue
            different += 1
            print(f"{path.name}: {name} {'is now' if args.fix else 'is not'} as elsewhere")
            if args.fix:
                path.write_text(path.read_text().replace(text, right[name], 1))
    return 1 if different and not args.fix else 0


if __name__ == "__main__":
    sys.exit(main())
