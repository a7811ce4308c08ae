"""The overlay shows the numbers it was given, and the video holds every picture up to the end of the game."""

import copy
import functools
import runpy
import signal
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import drawn_texts, read_video

import dqn_atari
from dqn_atari import (
    BAR,
    CHOSEN,
    GAIN,
    GREEDY,
    LOSS,
    TEXT,
    TRACE_SPAN,
    Agent,
    Args,
    Atari,
    Overlay,
    Recorder,
    evaluate,
    finite_range,
    number,
)

GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}


@functools.cache
def started_game(env_id: str, full_action_space: bool) -> tuple[Atari, dict]:
    """A game after ``reset`` and its state: what a start costs is paid once for all tests that only draw."""
    game = Atari(Args(env_id=env_id, full_action_space=full_action_space))
    game.reset(seed=1)
    return game, game.state_dict()


def make_overlay(num_actions: int, **attributes) -> Overlay:
    """A game that has just been started; it ends the one that was made before in the same emulator."""
    game, state = started_game(*GAMES[num_actions])
    game = copy.copy(game)  # attributes that a test sets are its own
    vars(game).update(attributes)
    game.load_state_dict(state)
    env = Overlay(game, "test", 0.01)
    env.new_game()
    env.has_lives = game.lives > 0
    assert env.action_space.n == num_actions
    return env


def bars(picture: np.ndarray, num_actions: int) -> list[tuple[int, tuple]]:
    """Length in pixels and colour of every bar, read off the picture row by row."""
    region = picture[104:428, 634:858]
    pitch = min(36, 324 // num_actions)
    found = []
    for i in range(num_actions):
        row = region[i * pitch + pitch // 2].astype(int)
        lengths = {color: int((np.abs(row - color).sum(1) == 0).sum()) for color in (GREEDY, BAR)}
        color = max(lengths, key=lengths.get)
        found.append((lengths[color], color))
    return found


@pytest.mark.parametrize("num_actions", [3, 6, 18])
@pytest.mark.parametrize("scale, shift", [(1, 0), (1, -5), (1e-3, 2), (1e8, 0), (1e30, -1e30)])
def test_bars_show_the_values(num_actions, scale, shift):
    """Lengths are proportional to the distance from the lowest value, whatever the sign and size of the values."""
    env = make_overlay(num_actions)
    q_values = np.random.default_rng(num_actions).normal(size=num_actions) * scale + shift
    env.note(q_values, int(q_values.argmin()))
    drawn = bars(env.render(), num_actions)
    expected = (q_values - q_values.min()) / (q_values.max() - q_values.min())
    for i, (length, color) in enumerate(drawn):
        assert length == pytest.approx(220 * expected[i], abs=2)
        assert color == (GREEDY if i == q_values.argmax() else BAR)


@pytest.mark.parametrize("num_actions", [3, 6, 18])
def test_equal_and_nan_values(num_actions):
    env = make_overlay(num_actions)
    rounding = np.random.default_rng(0).normal(size=num_actions) * 1e-6
    for q_values in (np.full(num_actions, 2.0), np.zeros(num_actions), 2 + rounding, 1e5 * (2 + rounding)):
        env.note(q_values, 0)
        assert all(length <= 110 for length, _ in bars(env.render(), num_actions))
    q_values = np.arange(num_actions, dtype=float)
    q_values[1] = np.nan
    env.note(q_values, 0)
    drawn = bars(env.render(), num_actions)
    assert drawn[1][0] <= 2 and drawn[-1][0] == pytest.approx(220, abs=2)
    for q_values in (np.full(num_actions, np.nan), np.full(num_actions, np.inf)):
        env.note(q_values, 0)
        env.render()


def test_chosen_and_exploring_are_marked(monkeypatch):
    env = make_overlay(6)
    q_values = np.array([0.0, 1, 2, 3, 4, 5])

    def marked(action):
        env.note(q_values, action)
        picture = env.render().astype(int)
        frame = np.abs(picture[104:428, 620:885] - CHOSEN).sum(2) == 0
        return np.flatnonzero(frame.any(1)).mean() // 36, "exploring" in drawn_texts(env, monkeypatch)

    assert marked(5) == (5, False)
    assert marked(2) == (2, True)


def test_numbers_are_printed():
    """The same canvas drawn with one value changed differs just where that value stands."""
    env = make_overlay(6)
    env.note(np.array([1.0, 2, 3, 4, 5, 6]), 5)
    one = env.render().copy()
    env.q_values = np.array([1.0, 2, 3, 4.001, 5, 6])
    changed = np.argwhere((one != env.render()).any(2))
    assert len(changed) and (changed[:, 0] >= 104 + 3 * 36).all() and (changed[:, 0] < 104 + 4 * 36).all()
    assert (np.abs(one[104:428, 880:940].astype(int) - TEXT).sum(2) == 0).any()


def test_number_has_at_most_eight_characters():
    written = {
        2.41249: "2.412",
        -1.5: "-1.500",
        -0.0001: "0.000",
        999.9996: "1,000.0",
        -1250.54: "-1,250.5",
        9999.96: "10,000.0",
        -9999.96: "-10,000",
        12_345.6: "12,345.6",
        -123_456.7: "-123,457",
        999_999.6: "1e+06",
        3.2e30: "3.2e+30",
        float("nan"): "nan",
        -float("inf"): "-inf",
    }
    assert {value: number(value) for value in written} == written


@pytest.mark.parametrize("values, least, expected", [
    ([1, 3, np.nan, np.inf], 0.01, (1, 3)),
    ([0.027, 0.0271], 0.01, (0.027, 0.037)),
    ([-500, -499], 0.01, (-500, -495)),
    ([0, 0], 1e-5, (0, 1e-5)),
    ([2, 2], 0, (2, 2)),
    ([np.nan], 0.01, (0, 0.01)),
])  # fmt: skip
def test_a_range_has_a_least_span(values, least, expected):
    assert finite_range(np.array(values, float), least) == pytest.approx(expected)


def test_nothing_overlaps():
    """With the widest texts each column of the panel keeps a gap to the next one, and nothing leaves the canvas."""
    env = make_overlay(18)
    for highest in (-9_999.9, -1_000):
        env.note(np.linspace(-9_999.9, highest, 18), 3)
    env.env.episode_return, env.env.episode_length = 1_234_567, 26_999
    env.notice = "the video is cut here"
    picture = env.render().astype(int)
    panel = np.abs(picture[:, 480:] - (18, 19, 23)).sum(2) > 60
    assert not panel[:, :20].any() and not panel[:, -20:].any()
    assert not panel[104:428, 144:148].any()  # between names and bars
    assert not panel[104:428, 380:384].any()  # between bars and values
    assert not panel[430:434].any() and not panel[552:562].any()  # between bars, trace and facts
    for title in (panel[22:46], panel[78:95], panel[440:457]):  # between title and legend and the figure at the right
        gaps = np.diff(np.flatnonzero(title.any(0)))
        assert gaps.max() > 14


def test_trace_follows_value_and_marks_rewards(monkeypatch):
    """A reward stands at the state whose action brought it."""
    env = make_overlay(6)
    for step in range(150):
        env.note(np.array([0, 0, 0, 0, 0, float(step)]), 5)
        env.env.episode_return += {60: 1, 100: -1, 149: 1}.get(step, 0)
    picture = env.render().astype(int)
    trace = np.abs(picture[466:549] - GREEDY).sum(2) < 30
    heights = [np.flatnonzero(trace[:, x]).mean() for x in range(510, 930, 20)]
    assert all(earlier > later for earlier, later in zip(heights, heights[1:]))  # a rising value rises
    assert heights[0] > 76 and heights[-1] < 8  # over the whole height
    for color, steps in ((GAIN, (60, 149)), (LOSS, (100,))):
        columns = np.flatnonzero((np.abs(picture[466:549] - color).sum(2) == 0).sum(0) > 20)
        assert columns.tolist() == [pytest.approx(936 - (149 - step) * 432 / 149, abs=1) for step in steps]
        assert (np.abs(picture[440:457, 640:780] - color).sum(2) < 60).any()  # the legend
    assert {"reward", "penalty", "0.000 to 149.000"} <= set(drawn_texts(env, monkeypatch))


def test_noise_does_not_fill_the_trace(monkeypatch):
    """What moves by a thousandth fills a tenth of the height, and the figures say what the height is."""
    env = make_overlay(6)
    for step in range(150):
        env.note(np.array([0, 0, 0, 0, 0, 0.027 + TRACE_SPAN / 10 * (step % 2)]), 5)
    rows = np.flatnonzero((np.abs(env.render()[460:552].astype(int) - GREEDY).sum(2) < 30).any(1))
    assert 460 + rows.min() > 548 - 0.1 * 82 - 3
    assert "0.027 to 0.037" in drawn_texts(env, monkeypatch)


@pytest.mark.parametrize("game, lives", [("Pong", False), ("Breakout", True)])
def test_facts_are_those_of_the_game(monkeypatch, game, lives):
    """... with lives only where there are any."""
    env = Overlay(Atari(Args(env_id=game)), "test", 0.07)
    env.reset()
    env.note(np.zeros(env.action_space.n), 0)
    env.env.episode_return, env.env.episode_length = 1234.0, 5678
    env.env.num_rewards, env.env.rewarded_pictures = 4, {1, 2, 3}
    texts = drawn_texts(env, monkeypatch)
    expected = {"return": "1,234", "step": "5,678", "epsilon": "0.07", "repeated rewards": "0.25"}
    expected |= {"lives": str(env.env.lives)} if lives else {}
    assert {name: texts[texts.index(name) + 1] for name in expected} == expected
    assert ("lives" in texts) == lives


def test_the_screen_of_the_game_is_shown():
    """The overlay draws what ``screen`` returns, whatever the emulator shows."""
    env = make_overlay(6)
    env.note(np.zeros(6), 0)
    screen = np.random.default_rng(0).integers(256, size=(210, 160, 3), dtype=np.uint8)
    env.env.screen = lambda: screen
    np.testing.assert_array_equal(env.render()[1::3, 1:480:3], screen)


@pytest.mark.parametrize("limit, ending", [(108_000, "game over"), (400, "cut off at the frame limit")])
def test_the_end_of_a_game_is_shown(monkeypatch, limit, ending):
    """Its return and what the last step brought, but no thoughts."""
    env, info = make_overlay(6, max_episode_frames=limit), {}
    while not info:
        env.note(np.arange(6.0), 2)
        info = env.step(0)[4]
    texts = set(drawn_texts(env, monkeypatch))
    final_return, length = round(info["episode"]["r"]), info["episode"]["l"]
    assert {ending, f"return {final_return} after {length} steps", str(final_return)} <= texts
    assert not {"Q(s, a)", "greedy", "taken", "exploring"} & texts
    picture = env.render()
    np.testing.assert_array_equal(picture[1::3, 1:480:3], env.env.screen())
    penalties = np.flatnonzero((np.abs(picture[466:549].astype(int) - LOSS).sum(2) == 0).sum(0) > 20)
    assert (936 in penalties) == (ending == "game over")  # the last point of Pong ends it
    env.reset()
    env.note(np.arange(6.0), 2)
    assert "exploring" in drawn_texts(env, monkeypatch) and len(env.values) == len(env.returns) == 1


@pytest.mark.slow
def test_video_has_one_frame_per_step(tmp_path, capsys):
    """105 of 107 steps recorded: 105 frames at 15 a second, each close to the picture that was given."""
    env, recorder, pictures = make_overlay(6), Recorder(tmp_path / "videos" / "game.mp4", length=105), []
    for step in range(107):
        env.note(np.random.default_rng(step).normal(size=6), step % 6)
        recorder.write(env)
        assert recorder.active == (step < 104)
        pictures.append(env.render().copy())
        env.step(step % 6)
    recorder.close()
    meta, frames = read_video(recorder.path)
    assert (len(frames), meta["size"], meta["fps"]) == (105, (960, 630), 15)
    assert meta["pix_fmt"].startswith("yuv420p")  # what browsers play
    for frame, picture in zip(frames, pictures):
        assert cv2.norm(frame, picture, cv2.NORM_L1) / picture.size < 4
    np.testing.assert_array_equal(recorder.still, pictures[100])
    video = recorder.path.read_bytes()
    assert 0 < video.index(b"moov") < video.index(b"mdat")  # the index first: it plays while it loads
    notice = np.abs(np.array(pictures)[:, 25:45, 760:].astype(int) - CHOSEN).sum(3).min((1, 2)) == 0
    assert notice.tolist() == [False] * 104 + [True] * 3  # the 105th picture is the last that was written
    assert capsys.readouterr().out.count(f"{recorder.path} is cut after 105 steps") == 1


@pytest.mark.parametrize("length, capture", [(20, True), (4500, True), (4500, False)])
def test_evaluation_records_the_first_game_to_its_end(tmp_path, monkeypatch, capsys, length, capture):
    """Colour frames are kept only while the video is written."""
    steps, pictures = [], []

    class Watched(Atari):
        def step(self, action):
            steps.append(self.recording)
            return super().step(action)

        def screen(self):
            pictures.append((self.recording, self.game_ended))
            return super().screen()

    monkeypatch.setattr(dqn_atari, "Game", Watched)
    args = Args(env_id="Pong", eval_episodes=2, max_episode_frames=200, capture_video=capture, video_length=length)
    args.precision = "float32"
    args.exp_name = "idea\udcff"  # of a file whose name is not UTF-8: OpenCV would crash
    cpu, tracker = torch.device("cpu"), Mock()
    evaluate(args, Agent(args, 6, cpu), 7, tmp_path, tracker)
    video = tmp_path / "videos" / "0000000007.mp4"
    assert [call.args[0] for call in tracker.log_video.call_args_list] == [video] * capture
    assert video.exists() == capture and ("is cut" in capsys.readouterr().out) == (length == 20)
    if not capture:
        assert not any(steps) and not pictures
        return
    recorded = steps.count(True)
    assert steps == [True] * recorded + [False] * (len(steps) - recorded) and recorded < 0.6 * len(steps)
    assert len(pictures) == len(read_video(video)[1]) == (20 if length == 20 else recorded + 1)
    ends = [False] * (len(pictures) - 1) + [length > 20]
    assert pictures == [(True, ended) for ended in ends]


def test_ffmpeg_does_not_hear_the_terminal(tmp_path):
    """Ctrl-C signals every process in a terminal: ffmpeg does not end by it, and the video can be ended."""
    env, recorder = make_overlay(6), Recorder(tmp_path / "game.mp4", length=40)
    env.note(np.zeros(6), 0)
    for _ in range(20):
        recorder.write(env)
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            recorder.ffmpeg.send_signal(stop)
    recorder.close()
    assert recorder.count == 20 and len(read_video(recorder.path)[1]) == 20
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_failed_video_warns_once_and_goes_on(tmp_path, capsys):
    (tmp_path / "videos").write_text("a file where the folder should be")
    env, recorder = make_overlay(6), Recorder(tmp_path / "videos" / "game.mp4", length=40)
    env.note(np.zeros(6), 0)
    for _ in range(5):
        recorder.write(env)
    recorder.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: no video {recorder.path}: ") and not recorder.count


@pytest.mark.parametrize("pictures", [0, 20])
def test_killed_encoder_does_not_end_the_run(tmp_path, capsys, pictures):
    """It is seen when the next picture is written or, at the latest, when the video is closed."""
    env, recorder = make_overlay(6), Recorder(tmp_path / "game.mp4", length=400)
    env.note(np.zeros(6), 0)
    recorder.write(env)
    recorder.ffmpeg.kill()
    for _ in range(pictures):
        recorder.write(env)
    recorder.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: no video {recorder.path}: ffmpeg ended with -9") and not recorder.count


def test_complaint_of_the_encoder_is_quoted(tmp_path, capsys):
    env, recorder = make_overlay(6), Recorder(tmp_path / "game.mp4", length=400)
    recorder.path.mkdir()
    env.note(np.zeros(6), 0)
    recorder.write(env)
    recorder.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Is a directory") and not recorder.count


SCRIPTS = sorted(path.name for path in ROOT.glob("*_atari*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_opencv_4_is_one_sentence(monkeypatch, script):
    monkeypatch.delattr(cv2, "FontFace")
    with pytest.raises(SystemExit, match="^error: OpenCV 5 is needed and cv2 is .*: pip uninstall opencv-python, "):
        runpy.run_path(str(ROOT / script), run_name="imported")
