"""The overlay shows the numbers it was given, and the video holds every picture."""

import numpy as np
import pytest
from helpers import read_video

from dqn_atari import BAR, CHOSEN, GAIN, GREEDY, LOSS, TEXT, Args, Atari, Overlay, Recorder, number

GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}


def make_overlay(num_actions: int) -> Overlay:
    game, full = GAMES[num_actions]
    env = Overlay(Atari(Args(env_id=game, full_action_space=full)), "test", 0.01)
    env.reset(seed=1)
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
    env.think(q_values, int(q_values.argmin()))
    drawn = bars(env.render(), num_actions)
    expected = (q_values - q_values.min()) / (q_values.max() - q_values.min())
    for i, (length, color) in enumerate(drawn):
        assert length == pytest.approx(220 * expected[i], abs=2)
        assert color == (GREEDY if i == q_values.argmax() else BAR)


@pytest.mark.parametrize("num_actions", [3, 6, 18])
def test_equal_and_nan_values(num_actions):
    env = make_overlay(num_actions)
    env.think(np.full(num_actions, 2.0), 0)
    assert all(length <= 2 for length, _ in bars(env.render(), num_actions))
    q_values = np.arange(num_actions, dtype=float)
    q_values[1] = np.nan
    env.think(q_values, 0)
    drawn = bars(env.render(), num_actions)
    assert drawn[1][0] <= 2 and drawn[-1][0] == pytest.approx(220, abs=2)
    for q_values in (np.full(num_actions, np.nan), np.full(num_actions, np.inf)):
        env.think(q_values, 0)
        env.render()


def test_chosen_and_exploring_are_marked():
    env = make_overlay(6)
    q_values = np.array([0.0, 1, 2, 3, 4, 5])

    def marked(action):
        env.think(q_values, action)
        picture = env.render().astype(int)
        frame = np.abs(picture[104:428, 620:885] - CHOSEN).sum(2) == 0
        exploring = np.abs(picture[50:70, 800:] - CHOSEN).sum(2) == 0
        return np.flatnonzero(frame.any(1)).mean() // 36, exploring.any()

    assert marked(5) == (5, False)
    assert marked(2) == (2, True)


def test_numbers_are_printed():
    """The same canvas drawn with one value changed differs just where that value stands."""
    env = make_overlay(6)
    env.think(np.array([1.0, 2, 3, 4, 5, 6]), 5)
    one = env.render().copy()
    env.q_values = np.array([1.0, 2, 3, 4.001, 5, 6])
    changed = np.argwhere((one != env.render()).any(2))
    assert len(changed) and (changed[:, 0] >= 104 + 3 * 36).all() and (changed[:, 0] < 104 + 4 * 36).all()
    assert (np.abs(one[104:428, 880:940].astype(int) - TEXT).sum(2) == 0).any()
    texts = [number(value) for value in (2.41249, -1.5, -1250.54, -123456.0, 3.2e30, float("nan"), -float("inf"))]
    assert texts == ["2.412", "-1.500", "-1,250.5", "-1.2e+05", "3.2e+30", "nan", "-inf"]


def test_nothing_overlaps():
    """With the widest texts each column of the panel keeps a gap to the next one, and nothing leaves the canvas."""
    env = make_overlay(18)
    env.think(np.linspace(-9_999.9, -1_000, 18), 3)
    env.env.episode_return, env.env.episode_length = 1_234_567, 26_999
    picture = env.render().astype(int)
    panel = np.abs(picture[:, 480:] - (18, 19, 23)).sum(2) > 60
    assert not panel[:, :20].any() and not panel[:, -20:].any()
    assert not panel[104:428, 144:148].any()  # between names and bars
    assert not panel[104:428, 380:384].any()  # between bars and values
    assert not panel[430:434].any() and not panel[552:562].any()  # between bars, trace and facts


def test_trace_follows_value_and_marks_rewards():
    env = make_overlay(6)
    for step in range(150):
        env.env.episode_return += {60: 1, 100: -1}.get(step, 0)
        env.think(np.array([0, 0, 0, 0, 0, float(step)]), 5)
    picture = env.render().astype(int)
    trace = np.abs(picture[466:549] - GREEDY).sum(2) < 30
    heights = [np.flatnonzero(trace[:, x]).mean() for x in range(510, 930, 20)]
    assert all(earlier > later for earlier, later in zip(heights, heights[1:]))  # a rising value rises
    assert heights[0] > 76 and heights[-1] < 8  # over the whole height
    for color, step in ((GAIN, 60), (LOSS, 100)):
        columns = np.flatnonzero((np.abs(picture[466:549] - color).sum(2) == 0).sum(0) > 20)
        assert columns.tolist() == [pytest.approx(936 - (149 - step) * 432 / 149, abs=1)]


def test_the_game_is_shown():
    env = make_overlay(6)
    env.think(np.zeros(6), 0)
    np.testing.assert_array_equal(env.render()[1::3, 1:480:3], env.env.ale.getScreenRGB())


def test_video_has_one_frame_per_step(tmp_path):
    """40 of 50 steps recorded: 40 frames at 15 a second, each close to the picture that was given."""
    env, recorder, pictures = make_overlay(6), Recorder(tmp_path / "videos" / "game.mp4", length=40), []
    for step in range(50):
        env.think(np.random.default_rng(step).normal(size=6), step % 6)
        recorder.write(env)
        pictures.append(env.render().copy())
        env.step(step % 6)
    recorder.close()
    meta, frames = read_video(recorder.path)
    assert (len(frames), meta["size"], meta["fps"]) == (40, (960, 630), 15)
    assert meta["pix_fmt"].startswith("yuv420p")  # what browsers play
    for frame, picture in zip(frames, pictures):
        assert np.abs(frame.astype(int) - picture).mean() < 4
    np.testing.assert_array_equal(recorder.still, pictures[31])


def test_failed_video_warns_once_and_goes_on(tmp_path):
    (tmp_path / "videos").write_text("a file where the folder should be")
    env, recorder = make_overlay(6), Recorder(tmp_path / "videos" / "game.mp4", length=40)
    env.think(np.zeros(6), 0)
    with pytest.warns(UserWarning, match="no video") as caught:
        for _ in range(5):
            recorder.write(env)
        recorder.close()
    assert len(caught) == 1 and recorder.count == 0


def test_killed_encoder_does_not_end_the_run(tmp_path):
    env, recorder = make_overlay(6), Recorder(tmp_path / "game.mp4", length=400)
    env.think(np.zeros(6), 0)
    recorder.write(env)
    recorder.writer.proc.kill()
    recorder.writer.proc.wait()
    with pytest.warns(UserWarning, match="no video"):
        for _ in range(20):
            recorder.write(env)
    recorder.close()
