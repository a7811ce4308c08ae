"""docs/compare.py: tables, curves and videos from records that W&B has written offline."""

import math
import os
import re
import shutil
import subprocess
import sys

import compare
import cv2
import helpers
import numpy as np
import pytest
from compare import Run
from conftest import ROOT
from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import dqn_atari, ppo_atari, wandb

def write(script, game, seed, evaluations, ending="", job_type="train", video=None, more={}, **flags):
    "Records a run with the script's own tracker; evaluations: (step, mean, std); more: by step."
    args = script.Args(env_id=game, exp_name=script.__name__, seed=seed, wandb_mode="offline", **flags)
    run_dir = Path("runs", f"{game}__{script.__name__}__{seed}__20260131-120000{ending}")
    run_dir.mkdir(parents=True, exist_ok=True)
    tracker = script.Tracker(args, run_dir, job_type)
    for step, mean, std in evaluations:
        tracker.log({"eval/episodic_return": mean, "eval/episodic_return_std": std, "charts/SPS": step / 10}, step)
        tracker.log(more.get(step, {}), step)
        if video:
            tracker.log_video(Path(video), np.zeros((8, 8, 3), np.uint8), step)
    tracker.finish()

write(dqn_atari, "Pong", 1, [(1000, -20, 0), (2000, -10, 0), (2500, -9, 0)], total_timesteps=3000)
write(dqn_atari, "Pong", 2, [(1000, -18, 0), (2000, -14, 0), (3000, 0, 0)], video="red.mp4")
nan = {1000: {"charts/episodic_return": float("nan")}, 2000: {"charts/episodic_return": 7.0}}
write(ppo_atari, "Breakout", 1, [(1000, 5, 2.5), (2000, 3, 1.5)], video="green.mp4", more=nan)
write(dqn_atari, "Pong", 1, [(3000, 21, 0)], ending="__eval", job_type="eval")
wandb.init(mode="offline", id="foreign", settings={"silent": True}).finish()
# resumed from its checkpoint at 1500
write(dqn_atari, "Pong", 1, [(2000, -12, 1), (3000, -8, 1)], video="red.mp4", num_workers=3)
"""


def write_video(path, color, size, count) -> None:
    with FFMPEG_VideoWriter(str(path), size, 15) as writer:
        for _ in range(count):
            writer.write_frame(np.full((size[1], size[0], 3), color, np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs/ and wandb/ of four runs, one of them resumed, and a stranger's record."""
    folder = tmp_path_factory.mktemp("compare")
    write_video(folder / "red.mp4", (255, 0, 0), (192, 126), 12)
    write_video(folder / "green.mp4", (0, 255, 0), (256, 144), 5)
    (folder / "write.py").write_text(WRITE)
    result = helpers.run(folder, str(ROOT), folder / "write.py")
    assert result.returncode == 0, result.stderr
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 6
    return folder


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """W&B's command takes seconds for each record."""
    read_record, cache = compare.read_record, {}

    def read(record, wanted):
        key = record, *sorted(wanted)
        if key not in cache:
            cache[key] = read_record(record, wanted)
        return cache[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "read_record", read)
        yield


def cells(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in output.splitlines() if line[0] == "|"]


TABLE = [
    ["Breakout", "PPO", "ppo_atari", "1", "2,000", "3.0 ± 1.5", "5.0 at 1,000", "150"],
    ["Pong", "DQN", "dqn_atari", "1, 2", "3,000", "-4.0 (-8.0 to 0.0)", "-4.0 at 3,000", "200"],
]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["wandb", "runs", "runs/*2000?", "wandb/offline-run-*", "runs wandb"])
def test_table(words, folder, tmp_path, monkeypatch, capsys):
    """The same from W&B's folder and from that of the runs, which leads to W&B's from elsewhere too."""
    monkeypatch.chdir(tmp_path)
    compare.main([str(folder / word) for word in words.split()])
    output, errors = capsys.readouterr()
    header, _, *rows = cells(output)
    assert header[0] == "game" and rows == TABLE
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and output.endswith("curves.png\n")
    warnings = [line for line in errors.splitlines() if line.startswith("warning")]
    assert len(warnings) == ("?" not in words) + ("wandb" in words)
    assert ("__eval is left out" in errors) == ("?" not in words)
    assert ("foreign is left out: these scripts have trained nothing in it" in errors) == ("wandb" in words)


@pytest.mark.slow
def test_resumed_is_one_run(folder):
    """The second record counts from its first step, 2000, on."""
    groups = compare.read_groups([str(folder / "wandb")], compare.EVALUATION)
    first, second = groups["Pong", "DQN", "dqn_atari"]
    assert (first.config["seed"], second.config["seed"]) == (1, 2)
    assert first.points(compare.EVALUATION).tolist() == [[1000, 2000, 3000], [-20, -12, -8]]
    assert [compare.VIDEO in row for row in first.rows] == [False, True, True]


@pytest.mark.slow
def test_record_that_breaks_off(folder, tmp_path, monkeypatch, capsys):
    """Whatever is whole is read, be it nothing."""
    (source,) = folder.glob("wandb/*Breakout*/*.wandb")
    whole = source.read_bytes()
    name = b"eval/episodic_return_std"  # stands in the summary and in the row, each time
    second_row = [match.start() for match in re.finditer(name, whole)][3]
    for folder_name, length in (("cut", second_row), ("empty", 0)):
        copy = tmp_path / folder_name / source.parent.name / source.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(whole[:length])
    monkeypatch.chdir(tmp_path)
    compare.main(["cut"])
    _, _, row = cells(capsys.readouterr().out)
    assert row == ["Breakout", "PPO", "ppo_atari", "1", "1,000", "5.0 ± 2.5", "5.0 at 1,000", "100"]
    with pytest.raises(SystemExit, match="error: no training run was found"):
        compare.main(["empty"])


@pytest.mark.slow
def test_nan_is_left_out_of_curves(folder):
    groups = compare.read_groups([str(folder / "wandb/*Breakout*")], "charts/episodic_return")
    (run,) = groups["Breakout", "PPO", "ppo_atari"]
    assert run.points("charts/episodic_return").tolist() == [[2000], [7]]


@pytest.mark.slow
def test_videos_side_by_side(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compare.main([str(folder / "runs"), "--videos", "side.mp4"])
    frames = list(compare.pictures(tmp_path / "side.mp4"))
    assert len(frames) == 12 and cv2.VideoCapture("side.mp4").get(cv2.CAP_PROP_FPS) == 15
    label = compare.LABEL_HEIGHT
    for frame in (frames[0], frames[-1]):
        assert frame.shape == (label + 420, 3 * 640, 3)
        green, *reds = (frame[label:, x : x + 640] for x in (0, 640, 1280))
        for red in reds:  # fills its tile
            assert np.abs(red[10:-10, 10:-10].astype(int) - (0, 0, 255)).max() < 30
        assert np.abs(green[40:-40, 10:-10].astype(int) - (0, 255, 0)).max() < 30  # is wider: 360 pixels high
        assert green[:20].max() < 60 and green[-20:].max() < 60
        for x in (0, 640, 1280):
            assert frame[:label, x : x + 640].max() > 200  # its name


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, reason",
    [
        ("wandb/*Breakout* --metric charts/nothing", "no curves: the runs have not logged charts/nothing"),
        ("wandb --out no/such/folder.png", "there is no folder no/such"),
        ("wandb --videos no/side.mp4", "there is no folder no"),
        ("wandb --save no/curves.jsonl", "there is no folder no"),
        ("red.mp4", "red.mp4 was not written by --save"),
        ("nothing", "there is no nothing"),
        ("none/*", r"there is no none/\*"),
        ("empty", "no training run was found"),
        ("wandb/*__eval", "no training run was found"),
    ],
)
def test_errors(words, reason, folder, monkeypatch):
    (folder / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=f"^error: {reason}$"):
        compare.main(words.split())


@pytest.mark.slow
def test_without_matplotlib_the_rest_is_made(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"error: no curves: matplotlib is missing: pip install '.\[compare\]'"):
        compare.main([str(folder / "wandb"), "--videos", "side.mp4"])
    output = capsys.readouterr().out
    assert cells(output)[2:] == TABLE and output.endswith("side.mp4\n") and (tmp_path / "side.mp4").exists()


@pytest.mark.slow
def test_without_videos_the_rest_is_made(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compare.main([str(folder / "wandb"), "--save", "kept.jsonl"])
    with pytest.raises(SystemExit, match="^error: no videos side by side: the runs have none$"):
        compare.main(["kept.jsonl", "--videos", "side.mp4"])
    assert capsys.readouterr().out.endswith("curves.png\n") and not (tmp_path / "side.mp4").exists()


@pytest.mark.slow
def test_what_is_saved_makes_the_same_table(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compare.main([str(folder / "wandb"), "--save", "kept.jsonl"])
    kept = compare.read_groups(["kept.jsonl"], compare.EVALUATION)
    groups = compare.read_groups([str(folder / "wandb")], compare.EVALUATION)
    for group, runs in groups.items():
        np.testing.assert_equal(
            compare.curves(kept[group], compare.EVALUATION, 1), compare.curves(runs, compare.EVALUATION, 1)
        )
    capsys.readouterr()
    compare.main(["kept.jsonl"])
    assert cells(capsys.readouterr().out)[2:] == TABLE


def test_what_is_saved_names_no_file_of_this_machine(tmp_path):
    config = {"seed": 1, "resume": "/home/me/runs/x", "evaluate": None, "run_dir": "/scratch"}
    compare.save_runs(
        {("Pong", "DQN", "x"): [Run(config, [{"global_step": 8, "eval/episodic_return": 2.0}])]},
        tmp_path / "kept.jsonl",
    )
    (kept,) = compare.load_runs(tmp_path / "kept.jsonl")
    assert kept.config == {"seed": 1}
    assert kept.points("eval/episodic_return").tolist() == [[8], [2]]


@pytest.mark.slow
def test_runs_without_a_record(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "runs", "runs")
    with pytest.raises(SystemExit, match="no training run"):
        compare.main(["runs"])
    assert capsys.readouterr().err.count("no W&B record of it") == 4
    monkeypatch.setenv("WANDB_DIR", str(folder))
    compare.main(["runs"])
    assert cells(capsys.readouterr().out)[2:] == TABLE


def run(seed, points, metric=compare.EVALUATION, **config) -> Run:
    return Run({"seed": seed} | config, [{"global_step": step, metric: value} for step, value in points])


DQN, C51, OTHER = ("Pong", "DQN", "dqn_atari"), ("Pong", "C51", "c51_atari"), ("Boxing", "DQN", "my_dqn")


def test_curves_are_joined_at_all_steps():
    """The mean of those that are still running; where one has no point, it is on its line."""
    runs = [run(1, [(100, 0), (200, 4), (300, 8)]), run(2, [(100, 2), (300, 4), (400, 6)]), run(3, [])]
    steps, values = compare.curves(runs, compare.EVALUATION, 100)
    assert steps.tolist() == [100, 200, 300, 400]
    np.testing.assert_equal(values, [[0, 4, 8, np.nan], [2, 3, 4, 6]])


def test_best_evaluation_is_of_all_runs():
    runs = [run(1, [(100, 1), (200, 3), (300, 2)]), run(2, [(100, 1), (200, 1)]), run(3, [])]
    runs[2].rows.append({"global_step": 50, "charts/SPS": 10.0})
    (_, row) = compare.table({DQN: runs})
    assert row == (*DQN, "1, 2, 3", "50 to 300", "1.5 (1.0 to 2.0)", "2.0 at 200", "10")
    (_, row) = compare.table({DQN: runs[2:]})
    assert row == (*DQN, "3", "50", "none yet", "none yet", "10")
    apart = [run(1, [(100, 1)]), run(2, [(200, 3)])]
    assert compare.table({DQN: apart})[1][5:] == ("2.0 (1.0 to 3.0)", "none yet", "")


def test_what_is_logged_often_is_averaged_over_bins():
    runs = [run(1, [(1, 0), (50, 2), (100, 4), (101, 10), (200, 30), (401, 7)], "charts/episodic_return")]
    steps, values = compare.curves(runs, "charts/episodic_return", 100)
    assert steps.tolist() == [50, 150, 450] and values.tolist() == [[2, 20, 7]]


@pytest.mark.parametrize("last_step", [456, 552, 102_512, 1_000_448])
def test_saved_curves_end_with_their_run(last_step):
    """... though the hundredth part of some numbers, times 100, is a little less than they are."""
    thinned = compare.thin([{"global_step": step, "charts/SPS": 1.0} for step in (8, last_step)])
    steps = [row["global_step"] for row in thinned]
    assert steps[-2:] == [pytest.approx(0.995 * last_step), last_step] and isinstance(steps[-1], int)


def test_saved_curves_are_means_of_100_bins():
    """Exactly those that are drawn of the whole run; an evaluation and the last step stay as they are."""
    metric = "charts/episodic_return"
    whole = run(1, [(step, step % 7) for step in range(1, 1999, 3)], metric)
    whole.rows.insert(5, {"global_step": 14, compare.EVALUATION: 3.0})
    thinned = Run(whole.config, compare.thin(whole.rows))
    assert len(thinned.rows) == 102 and thinned.rows[-1]["global_step"] == 1996
    assert thinned.points(compare.EVALUATION).tolist() == [[14], [3]]
    drawn, expected = (compare.curves([each], metric, 19.96) for each in (thinned, whole))
    np.testing.assert_allclose(drawn[0], expected[0])
    np.testing.assert_allclose(drawn[1], expected[1], atol=1e-4)


def test_figure_has_a_panel_a_game_and_a_line_and_band_a_group():
    groups = {
        OTHER: [run(1, [(100, 50), (200, 60)])],
        C51: [run(1, [(100, 5), (200, 6)])],
        DQN: [run(1, [(100, 0), (200, 10)]), run(2, [(100, 4), (200, 20)])],
    }
    figure = compare.draw_curves(groups, compare.EVALUATION, 100)
    boxing, pong = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["Boxing", "Pong"]
    assert boxing.get_ylabel() == "eval/episodic_return" and boxing.get_xlim()[0] == 0
    c51, dqn = pong.lines
    assert dqn.get_xydata().tolist() == [[100, 2], [200, 15]] and c51.get_xydata().tolist() == [[100, 5], [200, 6]]
    band = pong.collections[1].get_paths()[0].vertices
    assert {tuple(point) for point in band} == {(100, 0), (100, 4), (200, 10), (200, 20)}
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"DQN, my_dqn", "C51", "DQN, dqn_atari"}
    colors = [line.get_color() for line in (*boxing.lines, *pong.lines)]
    assert len(set(colors)) == 3


def test_long_curves_and_many_games():
    points = [(step, math.sin(step)) for step in range(1, 1000)]
    groups = {(game, "DQN", "dqn_atari"): [run(1, points, "losses/td_loss")] for game in "ABCDEFGH"}
    figure = compare.draw_curves(groups, "losses/td_loss", 100)
    assert len(figure.axes) == 8 and len({line.get_color() for panel in figure.axes for line in panel.lines}) == 1
    assert len(figure.legends[0].get_texts()) == 1
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) == 100 and line.get_linestyle() == "-"
    (smoother,) = compare.draw_curves(groups, "losses/td_loss", 10).axes[0].lines
    means = line.get_ydata().reshape(10, 10).mean(1)
    np.testing.assert_allclose(smoother.get_ydata(), means, atol=0.02)  # the first and the last bin lack a step


def test_which_videos_are_shown(capsys):
    """One a run up to six, else one a group: of the run that has come furthest."""
    groups = {
        ("Pong", "DQN", name): [run(seed, [(seed * 100, 0), (seed * 200, 0)]) for seed in (1, 2)] for name in "abc"
    }
    for runs in groups.values():
        for each in runs:
            for row in each.rows:
                row[compare.VIDEO] = f"{row['global_step']}.mp4"
    videos = compare.newest_videos(groups)
    assert len(videos) == 6 and videos[1] == ("Pong   DQN, a   seed 2   step 400", "400.mp4")
    groups["Pong", "PPO", "d"] = [run(1, [(100, 0)])]
    assert [path for _, path in compare.newest_videos(groups)] == 3 * ["400.mp4"]
    assert "warning: Pong, PPO, d has no video" in capsys.readouterr().err
    assert not compare.newest_videos({DQN: [run(1, [(100, 0)])]})
    many = {("Pong", "DQN", name): groups["Pong", "DQN", "a"] for name in "abcdefgh"}
    assert len(compare.newest_videos(many)) == 6 and "only 6 of 8 videos" in capsys.readouterr().err


def test_runs_with_other_flags_are_no_seeds(monkeypatch, capsys):
    same = dict(game="Pong", algorithm="DQN", exp_name="x", run_dir="runs")
    runs = [run(1, [(1, 1)], gamma=0.9, **same), run(2, [(1, 1)], gamma=0.99, wandb_group="g", **same)]
    monkeypatch.setattr(compare, "find_records", lambda words: {"a": 0, "b": 1})
    monkeypatch.setattr(compare, "read_run", lambda records, metric: runs[records])
    compare.read_groups([], compare.EVALUATION)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: the runs of Pong, DQN, x differ in gamma: give each kind its own --exp-name"


@pytest.mark.parametrize("count, size", [(1, (660, 960)), (2, (660, 1920)), (4, (1320, 1920)), (5, (900, 1920))])
def test_grid_of_videos(count, size, tmp_path):
    write_video(tmp_path / "blue.mp4", (0, 0, 255), (96, 64), 2)
    compare.write_side_by_side([("blue", tmp_path / "blue.mp4")] * count, tmp_path / "side.mp4")
    frames = list(compare.pictures(tmp_path / "side.mp4"))
    assert len(frames) == 2 and frames[0].shape == (*size, 3)


def test_table_on_a_terminal_without_its_letters(tmp_path):
    """Such as the one between mean and spread: the table is printed all the same."""
    rows = [{"global_step": 8, compare.EVALUATION: 3.0, compare.EVALUATION_STD: 1.0}]
    config = {"game": "Pong", "algorithm": "DQN", "exp_name": "dqn_atari", "seed": 1}
    compare.save_runs({DQN: [Run(config, rows)]}, tmp_path / "curves.jsonl")
    command = [sys.executable, str(ROOT / "docs" / "compare.py"), "curves.jsonl"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3.0 ? 1.0" in result.stdout
