"""Keeps the blocks that several scripts share the same, to the letter.

    python tests/check_copies.py                                 names every definition that differs
    python tests/check_copies.py --fix Replay                    copies it from dqn_atari.py into the others
    python tests/check_copies.py --fix --from c51_atari.py NAME  ... from another script
    python tests/check_copies.py --fix                           copies all that differ

Compared are all top-level definitions (functions, classes, assignments) that occur in two scripts or more under the
same name, with their comments, except those that ``OWN`` allows a script to have of its own. A class of which ``OWN``
names members ("Agent.update") is compared member by member; a flag, with its docstring, is a member of its class.
Other files are left alone: a copy under another name is an experiment.
"""

import argparse
import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "dqn_atari.py"
SCRIPTS = (
    "dqn_atari.py",
    "dqn_atari_visual.py",
    "c51_atari.py",
    "ppo_atari.py",
    "apex_dqn_atari.py",
    "bootstrapped_dqn_atari.py",
)
# What each script has of its own, or lacks: its algorithm. Everything else is the same wherever it occurs.
OWN = {
    "dqn_atari_visual.py": "EvaluationFlags.panels EvaluationFlags.saliency check_args Overlay evaluate",
    "c51_atari.py": "ALGORITHM check_args QNetwork AlgorithmFlags.learning_rate"
    " AlgorithmFlags.target_network_frequency"
    " Agent.__init__ Agent.act Agent.think Agent.update Overlay.new_game Overlay.note Overlay.render",
    "bootstrapped_dqn_atari.py": "ALGORITHM FIXED_FLAGS check_args QNetwork AlgorithmFlags.learning_rate"
    " AlgorithmFlags.buffer_size AlgorithmFlags.target_network_frequency"
    " AlgorithmFlags.n_step Batch BYTES_PER_TRANSITION Replay.ARRAYS Replay.__init__ Replay.add Replay.sample"
    " Agent.__init__ Agent.act Agent.think Agent.update Overlay.new_game Overlay.note Overlay.render train",
    "apex_dqn_atari.py": "ALGORITHM FIXED_FLAGS check_args Atari.state_dict Atari.load_state_dict QNetwork"
    " Batch BYTES_PER_TRANSITION Replay"
    " GameFlags.num_envs EvaluationFlags.eval_epsilon AlgorithmFlags.learning_rate AlgorithmFlags.buffer_size"
    " AlgorithmFlags.batch_size AlgorithmFlags.target_network_frequency"
    " AlgorithmFlags.learning_starts AlgorithmFlags.max_grad_norm"
    " Agent.__init__ Agent.think Agent.update Agent.state_dict Agent.load_state_dict"
    " Overlay.note Overlay.render find_replay_device Run.check_step Run.log_games capture_learning train",
    "ppo_atari.py": "ALGORITHM FIXED_FLAGS check_args EvaluationFlags.eval_epsilon"
    " AlgorithmFlags.learning_rate AlgorithmFlags.max_grad_norm"
    " OUTCOME EnvSlice.step AtariVector.reset"
    " Run.start Run.load_checkpoint Run.save_checkpoint Run.checkpoint_is_due Run.evaluate"
    " Run.log_games Run.say_progress Run.finish Run.close"
    " Agent Overlay.new_game Overlay.note Overlay.render Overlay.draw_trace model evaluate train play main",
}
OWN = {script: set(names.split()) for script, names in OWN.items()}
ADVICE = """
These blocks are one block in all six scripts. If you have changed one of them for good, carry the change into the
others: python tests/check_copies.py --fix --from THE_SCRIPT_YOU_CHANGED NAME. If it is a part of an algorithm, name it
under OWN in tests/check_copies.py. An experiment is best a copy under another name, which is not compared."""
BY_MEMBER = {name.split(".")[0] for names in OWN.values() for name in names if "." in name}


parse = cache(ast.parse)  # a script is asked for many classes


def definitions(source: str, inside: str = "") -> dict[str, str]:
    """The text of every top-level definition of a script, or of every member of its class ``inside``."""
    lines, body, found = source.splitlines(keepends=True), parse(source).body, {}
    if inside:
        (body,) = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == inside]
    for node, following in zip(body, [*body[1:], None]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            last = following if documented else node  # a flag's docstring follows it
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]:
                found[name.id] = "".join(lines[node.lineno - 1 : last.end_lineno])
    return found


def shared(path: Path) -> dict[str, str]:
    """All that can be compared of a script: its definitions, of classes ``BY_MEMBER`` each "Class.member" as well.

    A class of which the script has a member of its own, or lacks one, is left out as a whole.
    """
    source, own, found = path.read_text(), OWN.get(path.name, set()), {}
    for name, text in definitions(source).items():
        members = definitions(source, name).items() if name in BY_MEMBER else ()
        entries = {f"{name}.{member}": text for member, text in members}
        if not any(member.startswith(f"{name}.") for member in own):
            entries[name] = text
        found |= {entry: text for entry, text in entries.items() if not own & {entry, name}}
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these definitions")
    parser.add_argument("--fix", action="store_true", help="copy instead of complaining")
    parser.add_argument("--from", dest="source", default=TEMPLATE, metavar="FILE", help="the script that is right")
    args = parser.parse_args(arguments)
    paths = [root / name for name in SCRIPTS]
    scripts = {path: shared(path) for path in paths if path.exists()}
    if root / args.source not in scripts:
        sys.exit(f"error: there is no script {args.source}")
    source = scripts[root / args.source]
    wanted = {entry for blocks in scripts.values() for entry in blocks if {entry, entry.split(".")[0]} & {*args.names}}
    if missing := set(args.names) - {name for entry in source for name in (entry, entry.split(".")[0])}:
        sys.exit(f"error: {args.source} does not define {', '.join(sorted(missing))}")
    different = 0
    # blocks that the source does not have are compared with the first script that has them
    right = {name: text for blocks in [source, *scripts.values()][::-1] for name, text in blocks.items()}
    for path, blocks in scripts.items():
        for name, text in blocks.items():
            whole = "." in name and name.split(".")[0] in blocks  # its members are no news
            if text == right[name] or whole or (args.names and name not in wanted):
                continue
            different += 1
            print(f"{path.name}: {name} {'is now' if args.fix else 'is not'} as elsewhere")
            if args.fix:
                path.write_text(path.read_text().replace(text, right[name], 1))
    if not different or args.fix:
        return 0
    print(ADVICE)
    return 1


if __name__ == "__main__":
    sys.exit(main())
