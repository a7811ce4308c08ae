"""Compares runs without an account, from the records that W&B keeps on disk: a table, curves, videos side by side.

    python docs/compare.py runs/
    python docs/compare.py 'runs/Pong__*' --metric charts/episodic_return --out pong.png
    python docs/compare.py wandb/ --videos side.mp4
    python docs/compare.py runs/ --save curves.jsonl && python docs/compare.py curves.jsonl

RUN is a run's folder, a folder of runs, W&B's folder, one in it, a pattern of those, or a file that --save wrote: it
keeps the evaluations and the curves (as means of bins) when the records are gone. Runs of one game, algorithm and
--exp-name are a group, in which only the seed should differ: a line is their mean, its band goes from the lowest to the
highest; after the end of a shorter run, both are of the others. Evaluations are drawn one by one, all else as means of
--bins.
"""

import argparse
import glob
import itertools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

EVALUATION = "eval/episodic_return"
EVALUATION_STD = "eval/episodic_return_std"  # over the games of an evaluation
SPEED = "charts/SPS"
VIDEO = "videos/eval.path"
MOST_VIDEOS = 6
FPS = 15  # of the scripts' videos
LABEL_HEIGHT = 30
FREE_FLAGS = "seed device num_workers total_timesteps checkpoint_minutes capture_video video_length run_dir resume "
FREE_FLAGS += "evaluate wandb_mode wandb_project_name wandb_entity wandb_group _wandb"  # may differ within a group
PATH_FLAGS = ("resume", "evaluate", "run_dir")


class Run(NamedTuple):
    config: dict
    rows: list[dict]  # what was logged, by rising global_step

    def points(self, metric: str) -> np.ndarray:
        """Steps and values, float [2, points]."""
        points = [(row["global_step"], row[metric]) for row in self.rows if metric in row]
        return np.array(points, float).reshape(-1, 2).T


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def find_paths(words: list[str]) -> list[Path]:
    """The files and folders that the words name, which may be patterns."""
    found = []
    for word in words:
        paths = [word] if os.path.exists(word) else glob.glob(word)
        if not paths:
            sys.exit(f"error: there is no {word}")
        found += map(Path, paths)
    return found


def find_records(folders: list[Path]) -> dict[str, list[Path]]:
    """The records of each run by its id, oldest first: a run that is resumed begins another one."""
    found = {record.resolve() for folder in folders for record in records_at(folder)}
    records = defaultdict(list)
    for record in sorted(found, key=lambda record: record.parent.name.partition("run-")[2]):  # starts with the time
        records[record.stem.removeprefix("run-")].append(record)
    return records


def records_at(path: Path) -> list[Path]:
    """Those of W&B's folder, of one folder in it, of a run's folder, or of a folder of runs."""
    records = [*path.glob("*.wandb"), *path.glob("*run-*/*.wandb")]
    if records:
        return records
    for folder in [folder for folder in path.glob("*__*") if folder.is_dir()] or [path]:
        name = folder.resolve().name
        run_id = name if len(name) <= 64 else f"{name[:31]}--{name[-31:]}"  # as the scripts shorten it
        places = [os.environ.get("WANDB_DIR", "."), folder.resolve().parent.parent]
        pattern = f"wandb/*run-*/run-{glob.escape(run_id)}.wandb"
        found = [record for place in places for record in Path(place).glob(pattern)]
        if not found:
            warn(f"{folder} is left out: no W&B record of it is in ./wandb or beside the folder of runs")
        records += found
    return records


def read_record(record: Path, wanted: set[str]) -> tuple[dict, list[dict]]:
    """What W&B noted about the run, and the wanted numbers of every row that was logged."""
    # W&B's own command, for the format is internal and may change; it also reads what a killed run has left
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    about, rows = {}, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            entry = json.loads(line)
            about = entry.get("run", about)
            items = entry.get("history", {}).get("item", {})
            row = {name: value for name, value in items.items() if name in wanted and isinstance(value, int | float)}
            video = record.parent / "files" / items.get(VIDEO, "")
            if video.is_file():
                row[VIDEO] = video
            if "global_step" in row:
                rows.append(row)
    if process.returncode:
        sys.exit(f"error: W&B cannot read {record}")
    return about, rows


def read_run(records: list[Path], metric: str) -> Run | None:
    """Joins the records of a run; each counts from its first step on, for the run had gone back to a checkpoint."""
    about, rows = {}, []
    for record in records:
        later_about, later = read_record(record, {"global_step", EVALUATION, EVALUATION_STD, SPEED, metric})
        about = later_about or about
        if later:
            rows = [row for row in rows if row["global_step"] < later[0]["global_step"]] + later
    config = about.get("config", {}).get("update", {})
    if rows and {"game", "algorithm", "exp_name", "seed"} <= config.keys() and about.get("job_type") != "eval":
        return Run(config, rows)
    warn(f"{records[-1].parent.name} is left out: these scripts have trained nothing in it")


def bins(steps: np.ndarray, width: float) -> np.ndarray:
    """The number of the bin, from 1, that each step lies in."""
    return np.ceil(steps / width - 1e-9).clip(1)  # 456 / 4.56 is a little more than 100


def thin(rows: list[dict]) -> list[dict]:
    """Evaluations as they are, all else as means of 100 bins, each at the middle of its bin."""
    width = rows[-1]["global_step"] / 100
    binned = defaultdict(lambda: defaultdict(list))
    thinned = []
    for row in rows:
        evaluation = {name: value for name, value in row.items() if name.startswith("eval/")}
        if evaluation:
            thinned.append({"global_step": row["global_step"]} | evaluation)
        for name in row.keys() - evaluation.keys() - {"global_step", VIDEO}:
            binned[bins(row["global_step"], width)][name].append(row[name])
    for number, values in binned.items():
        means = {name: round(float(np.mean(numbers)), 4) for name, numbers in values.items()}
        thinned.append({"global_step": (number - 0.5) * width} | means)
    thinned.append({"global_step": rows[-1]["global_step"]})
    return sorted(thinned, key=lambda row: row["global_step"])


def save_runs(groups: dict[tuple, list[Run]], path: Path) -> None:
    """A line of JSON for each run, without the flags that name files of this machine."""
    lines = []
    for run in itertools.chain(*groups.values()):
        config = {flag: value for flag, value in run.config.items() if flag not in PATH_FLAGS}
        lines.append(json.dumps({"config": config, "rows": thin(run.rows)}))
    path.write_text("\n".join(lines) + "\n")


def load_runs(path: Path) -> list[Run]:
    try:
        return [Run(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError):
        sys.exit(f"error: {path} was not written by --save")


def read_groups(words: list[str], metric: str) -> dict[tuple, list[Run]]:
    """The training runs, in the order of their seeds, by (game, algorithm, exp_name)."""
    paths = find_paths(words)
    found = [run for path in paths if path.is_file() for run in load_runs(path)]
    for records in find_records([path for path in paths if path.is_dir()]).values():
        found.append(read_run(records, metric))
    groups = defaultdict(list)
    for run in filter(None, found):
        groups[run.config["game"], run.config["algorithm"], run.config["exp_name"]].append(run)
    if not groups:
        sys.exit("error: no training run was found")
    for group, runs in groups.items():
        runs.sort(key=lambda run: run.config["seed"])
        flags = sorted(set().union(*(run.config for run in runs)) - set(FREE_FLAGS.split()))
        different = [flag for flag in flags if len({str(run.config.get(flag)) for run in runs}) > 1]
        if different:
            warn(f"the runs of {', '.join(group)} differ in {', '.join(different)}: give each kind its own --exp-name")
    return dict(sorted(groups.items()))


def curves(runs: list[Run], metric: str, bin_width: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] where any run has a point, values [runs, n] on the line through a run's points, NaN beyond its ends."""
    points = [points for points in (run.points(metric) for run in runs) if points.size]
    if not metric.startswith("eval/"):
        for i, (steps, values) in enumerate(points):
            numbers, members = np.unique(bins(steps, bin_width), return_inverse=True)
            points[i] = (numbers - 0.5) * bin_width, np.bincount(members, values) / np.bincount(members)
    steps = np.unique([step for run_steps, _ in points for step in run_steps])
    values = [np.interp(steps, *run_points, left=np.nan, right=np.nan) for run_points in points]
    return steps, np.array(values)


def span(values, form: str) -> str:
    """The lowest and the highest, or one number if they are the same."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def table(groups: dict[tuple, list[Run]]) -> list[tuple]:
    """The last evaluation is given ± over its games, or from the lowest run to the highest; the best is of the mean."""
    rows = [("game", "algorithm", "exp name", "seeds", "steps", "last evaluation", "best evaluation", "steps/s")]
    for group, runs in groups.items():
        seeds = ", ".join(str(run.config["seed"]) for run in runs)
        last_steps = [run.rows[-1]["global_step"] for run in runs]
        speeds = [speed for run in runs for speed in run.points(SPEED)[1]]
        last = best = "none yet"
        steps, values = curves(runs, EVALUATION, 0)
        if steps.size:
            lasts = [run_values[np.isfinite(run_values)][-1] for run_values in values]
            stds = [std for run in runs for std in run.points(EVALUATION_STD)[1]] or [math.nan]
            spread = f"({span(lasts, ',.1f')})" if len(lasts) > 1 else f"± {stds[-1]:,.1f}"
            last = f"{np.mean(lasts):,.1f} {spread}"
            means = values.mean(0)  # NaN where a run is missing
            if np.isfinite(means).any():
                best = f"{np.nanmax(means):,.1f} at {steps[np.nanargmax(means)]:,.0f}"
        speed = f"{np.median(speeds):,.0f}" if speeds else ""
        rows.append((*group, seeds, span(last_steps, ",d"), last, best, speed))
    return rows


def short_names(groups: dict[tuple, list[Run]]) -> dict[tuple, str]:
    """The algorithm, and the experiment's name where an algorithm has several."""
    algorithms = [algorithm for algorithm, _ in {group[1:] for group in groups}]  # once for each exp_name
    return {group: group[1] if algorithms.count(group[1]) == 1 else ", ".join(group[1:]) for group in groups}


def draw_curves(groups: dict[tuple, list[Run]], metric: str, num_bins: int):
    """A matplotlib figure with a panel for each game and a line for each group; the longest run has ``num_bins``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = short_names(groups)
    colors = {name: f"C{i}" for i, name in enumerate(sorted(set(names.values())))}
    games = sorted({game for game, _, _ in groups})
    columns = min(len(games), 3)
    lines = math.ceil(len(games) / columns)
    width = max(4.4 * columns, 6)
    figure = Figure(figsize=(width, 1), layout="constrained")
    bin_width = max(run.rows[-1]["global_step"] for runs in groups.values() for run in runs) / num_bins
    legend = {}
    for i, game in enumerate(games):
        label = metric if i % columns == 0 else ""
        panel = figure.add_subplot(lines, columns, i + 1, title=game, xlabel="steps", ylabel=label)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
        for group in (group for group in groups if group[0] == game):
            steps, values = curves(groups[group], metric, bin_width)
            if steps.size:
                name = names[group]
                (legend[name],) = panel.plot(steps, np.nanmean(values, 0), marker=".", color=colors[name])
                band = np.nanmin(values, 0), np.nanmax(values, 0)
                panel.fill_between(steps, *band, color=colors[name], alpha=0.2, linewidth=0)
        panel.set_xlim(left=0)
    names, handles = zip(*sorted(legend.items()))
    ncols = max(1, int(10 * width / (max(map(len, names)) + 8)))  # an inch holds 10 letters
    figure.set_figheight(3.4 * lines + 0.22 * math.ceil(len(names) / ncols))
    figure.legend(handles, names, loc="outside lower center", ncols=ncols, frameon=False)
    return figure


def newest_videos(groups: dict[tuple, list[Run]]) -> list[tuple[str, Path]]:
    """Label and path: of every run or, if those are too many, of the run of each group that has come furthest."""
    choices = [(group, [run]) for group, runs in groups.items() for run in runs]
    if len(choices) > MOST_VIDEOS:
        choices = list(groups.items())
    names = short_names(groups)
    videos = []
    for group, runs in choices:
        found = [(row["global_step"], run, row[VIDEO]) for run in runs for row in run.rows if VIDEO in row]
        if found:
            step, run, path = max(found, key=lambda video: video[0])
            videos.append((f"{group[0]}   {names[group]}   seed {run.config['seed']}   step {step:,}", path))
        else:
            warn(f"{', '.join(group)} has no video")
    if len(videos) > MOST_VIDEOS:
        warn(f"only {MOST_VIDEOS} of {len(videos)} videos are shown: name the runs to choose")
    return videos[:MOST_VIDEOS]


def pictures(path: Path):
    video = cv2.VideoCapture(str(path))
    while (picture := video.read()[1]) is not None:
        yield picture


def fit(picture: np.ndarray, tile: np.ndarray) -> None:
    """Draws it in the middle of the tile, as large as the tile allows."""
    scale = np.divide(tile.shape[:2], picture.shape[:2]).min()
    height, width = np.multiply(picture.shape[:2], scale).round().astype(int)
    top, left = np.subtract(tile.shape[:2], (height, width)) // 2
    tile[top : top + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def write_side_by_side(videos: list[tuple[str, Path]], out: Path) -> None:
    """Plays all at once; one that ends early keeps its last picture."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    columns = 2 if len(videos) == 4 else min(len(videos), 3)
    width, height = (640, 420) if columns == 3 else (960, 630)
    lines = math.ceil(len(videos) / columns)
    grid = np.full((lines, LABEL_HEIGHT + height, columns, width, 3), 20, np.uint8)  # line, y, column, x, BGR
    canvas = grid.reshape(lines * (LABEL_HEIGHT + height), columns * width, 3)
    places = [grid[line, :, column] for line in range(lines) for column in range(columns)]
    for place, (label, _) in zip(places, videos):
        cv2.putText(place[:LABEL_HEIGHT], label, (12, 21), (240, 240, 240), cv2.FontFace("sans"), 16, 600)
    with FFMPEG_VideoWriter(str(out), canvas.shape[1::-1], FPS, preset="veryfast") as writer:
        for moment in itertools.zip_longest(*(pictures(path) for _, path in videos)):
            for place, picture in zip(places, moment):
                if picture is not None:
                    fit(picture, place[LABEL_HEIGHT:])
            writer.write_frame(cv2.cvtColor(canvas, cv2.COLOR_BGR2RGB))


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs/, wandb/, a folder in one of them, a pattern")
    parser.add_argument("--metric", default=EVALUATION, help="what the curves show (%(default)s)")
    parser.add_argument(
        "--bins", type=int, default=100, help="points of the longest curve; fewer are smoother (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default="curves.png", help="picture of the curves (%(default)s)")
    parser.add_argument("--save", type=Path, help="a file to keep the table and the curves in")
    parser.add_argument("--videos", type=Path, help="an mp4 to make of the newest videos, side by side")
    args = parser.parse_args(words)
    sys.stdout.reconfigure(errors="replace")  # a name may have letters that the terminal lacks
    if args.bins < 1:
        sys.exit(f"error: --bins is {args.bins}: it must be at least 1")
    for path in filter(None, (args.out, args.save, args.videos)):
        if not path.absolute().parent.is_dir():
            sys.exit(f"error: there is no folder {path.parent}")
    groups = read_groups(args.runs, args.metric)
    header, *rows = table(groups)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("|", " | ".join(map(str.ljust, row, widths)), "|")
    if args.save:
        save_runs(groups, args.save)
        print(args.save)
    failures = []
    if args.videos:
        videos = newest_videos(groups)
        if videos:
            write_side_by_side(videos, args.videos)
            print(args.videos)
        else:
            failures.append("error: no videos side by side: the runs have none")
    if any(run.points(args.metric).size for runs in groups.values() for run in runs):
        try:
            draw_curves(groups, args.metric, args.bins).savefig(args.out, dpi=110)
            print(args.out)
        except ImportError:
            failures.append("error: no curves: matplotlib is missing: pip install '.[compare]'")
    else:
        failures.append(f"error: no curves: the runs have not logged {args.metric}")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
