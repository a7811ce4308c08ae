"""The Atari wrapper against gymnasium's own preprocessing, and its rules on real games."""

import copy
import functools
import multiprocessing
import re
import zlib
from collections import deque
from unittest.mock import Mock

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from dqn_atari import Args, Atari, undo_rollover

GAMES = sorted(spec[4:-3] for spec in gym.registry if re.fullmatch(r"ALE/\w+-v5", spec))


@functools.cache
def started_once(game):
    env = Atari(Args(env_id=game))
    env.reset(seed=3)
    return env, env.state_dict()


def started(game, **attributes):
    """A game after ``reset(seed=3)``; it ends the one that was made before in the same emulator."""
    env, state = started_once(game)
    env = copy.copy(env)  # attributes that a test sets are its own
    vars(env).update(attributes)
    env.load_state_dict(state)
    return env


def play(env, steps, seed):
    """Random steps, and the resets among them; all that they return."""
    seen = []
    for action in np.random.default_rng(seed).integers(env.action_space.n, size=steps).tolist():
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append((zlib.crc32(observation), reward, terminated, truncated, info))
        if terminated or truncated:
            seen.append(zlib.crc32(env.reset()[0]))
    return seen


def in_a_copy(function, *arguments):
    """What the function returns in a copy of this process, which leaves all that is here as it was."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


@pytest.mark.parametrize("game", ["Breakout", "Pong", "SpaceInvaders", "Seaquest", "Qbert", "MontezumaRevenge"])
def test_observations_equal_gymnasium(game):
    """Byte for byte over 500 steps and all resets among them, without life loss and FIRE."""
    ours = Atari(Args(env_id=game, episodic_life=False))
    ours.fire_action = None
    theirs = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    theirs = FrameStackObservation(AtariPreprocessing(theirs, noop_max=30), 4, padding_type="zero")
    rng = np.random.default_rng(1)
    observation, expected = ours.reset(seed=7)[0], theirs.reset(seed=7)[0]
    games = 0
    for _ in range(500):
        np.testing.assert_array_equal(observation, expected)
        action = int(rng.integers(ours.action_space.n))
        observation, reward, terminated, truncated, info = ours.step(action)
        expected, raw_reward, expected_terminated, expected_truncated, _ = theirs.step(action)
        assert (reward, terminated, truncated) == (np.sign(raw_reward), expected_terminated, expected_truncated)
        if terminated:
            np.testing.assert_array_equal(observation, expected)
            observation, expected = ours.reset()[0], theirs.reset()[0]
            games += 1
    assert games > 0 or game == "Pong"


def test_life_loss_ends_the_episode_and_not_the_game():
    """Breakout: five terminated episodes in one game; every next life starts with FIRE and one frame in the stack."""
    env = started("Breakout")
    lives, infos = [env.lives], []
    while True:
        _, _, terminated, truncated, info = env.step(3)
        assert not truncated
        if terminated:
            infos.append(info)
            if env.game_ended:
                break
            assert env.lives == lives[-1] - 1
            lives.append(env.lives)
            before = env.ale.getEpisodeFrameNumber()
            observation, _ = env.reset()
            assert env.ale.getEpisodeFrameNumber() == before + 4  # FIRE, and the same game
            assert not observation[:3].any() and observation[3].any()
    assert lives == [5, 4, 3, 2, 1]
    assert [bool(info) for info in infos] == [False] * 4 + [True]
    env.reset()
    assert env.lives == 5 and env.episode_length == 1


def test_a_life_that_ends_while_a_reset_presses_fire_is_not_counted_twice():
    env = started("Breakout")
    while not env.step(3)[2]:
        pass
    env.ale.setRAM(57, 3)  # the next life is lost too, as ALE sees in the next frame
    env.reset()
    assert env.lives == env.ale.lives() == 3
    assert not env.step(0)[2]


def test_without_episodic_life_only_the_game_ends():
    env = started("Breakout", episodic_life=False)
    while not env.step(1)[2]:
        pass
    assert env.game_ended and env.lives == 0


def test_fire_starts_the_ball():
    """Breakout waits for FIRE: after a reset the ball is in play and the bricks change although nobody fires."""
    env = Atari(Args(env_id="Breakout"))
    frames = {env.reset(seed=1)[0][3].tobytes()} | {env.step(0)[0][3].tobytes() for _ in range(20)}
    assert len(frames) > 10
    env.fire_action = None
    frames = {env.reset(seed=1)[0][3].tobytes()} | {env.step(0)[0][3].tobytes() for _ in range(20)}
    assert len(frames) <= 2
    assert Atari(Args(env_id="Freeway")).fire_action is None


def test_noop_starts_differ_and_follow_the_seed():
    env = Atari(Args(env_id="Pong"))
    env.fire_action = None
    env.reset(seed=5)
    starts = []
    for _ in range(30):
        env.game_ended = True
        env.reset()
        starts.append(env.ale.getEpisodeFrameNumber())
    assert min(starts) >= 1 and max(starts) <= 30 and len(set(starts)) > 8
    one, other = env.reset(seed=9)[0].copy(), env.reset(seed=9)[0]
    np.testing.assert_array_equal(one, other)


def test_sticky_actions_repeat_the_previous_action():
    """With probability 1 of repeating, the paddle never obeys; with 0 two equal seeds play alike."""
    free, stuck = (Atari(Args(env_id="Pong", sticky_actions=p)) for p in (0.0, 0.999999))
    for env in (free, stuck):
        env.reset(seed=2)
        env.unwrapped.step(0)
    np.testing.assert_array_equal(free.stack, stuck.stack)
    for _ in range(10):
        free.step(2), stuck.step(2)
    assert not np.array_equal(free.stack, stuck.stack)
    free.reset(seed=2)
    free.unwrapped.step(0)
    for _ in range(10):
        free.step(0)
    np.testing.assert_array_equal(stuck.stack, free.stack)


def paddle(env) -> int:
    """Where ALE has turned the paddle to: 23,000 further in every frame of RIGHT or LEFT."""
    return int.from_bytes(env.ale.cloneSystemState().serialize()[:4], "little") // 23_000


@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_sticky_actions_are_those_of_ale(probability):
    """In how many of 4 frames the paddle moves when told to, and when told to stop, as with ALE's own stickiness."""
    env = started("Breakout", sticky_actions=probability)
    env.np_random = np.random.default_rng(1)
    theirs = gym.make("ALE/Breakout-v5", obs_type="ram", frameskip=4, repeat_action_probability=probability).unwrapped
    counts = np.zeros((2, 2, 5), int)  # whose, told to move or to stop, frames
    for step in range(1000):
        if step % 100 == 0:  # back to the middle
            env.game_ended = True
            env.reset(), theirs.reset(seed=1 if step == 0 else None)
            places = [paddle(env), paddle(theirs)]
        action = [2, 0, 3, 0][step % 4]  # RIGHT, NOOP, LEFT, NOOP
        for whose, one in enumerate((env, theirs)):
            before = places[whose]
            one.step(action)
            places[whose] = paddle(one)
            counts[whose, int(action == 0), abs(places[whose] - before)] += 1
    expected = 500 * (1 - probability) * probability ** np.arange(4)
    assert np.all(abs(counts[:, 0, :0:-1] - expected) < 4 * expected**0.5)  # moving: 4, 3, 2, 1 frames
    assert np.all(abs(counts[0] - counts[1]) < 4 * counts.sum(0) ** 0.5 + 1)


def test_rewards_are_signs_and_returns_are_true():
    """Seaquest pays 20 a shark: the learner sees 1, the episode's return has the points."""
    env = Atari(Args(env_id="Seaquest", episodic_life=False))
    env.reset(seed=1)
    rng, clipped, length = np.random.default_rng(0), [], 0
    while True:
        _, reward, terminated, _, info = env.step(int(rng.integers(env.action_space.n)))
        clipped.append(reward)
        length += 1
        if terminated:
            break
    assert set(clipped) <= {-1.0, 0.0, 1.0} and sum(clipped) > 0
    episode = info["episode"]
    assert episode["r"] == 20 * sum(clipped)
    assert episode["l"] == length + 1  # and the FIRE that started it


def test_points_that_run_over_the_last_digit_are_counted():
    """Asterix shows six digits: 999,950 and 50 points are 0 there."""
    env = Atari(Args(env_id="Asterix"))
    env.reset(seed=1)
    for address in (0xDE, 0xDF, 0xE0):
        env.ale.setRAM(address - 0x80, 0x99)
    env.step(0)
    before, reward, rng = env.episode_return, 0.0, np.random.default_rng(0)
    assert before > 999_000
    while reward == 0:
        reward = env.step(int(rng.integers(env.action_space.n)))[1]
    assert reward == 1 and 0 < env.episode_return - before <= 500


def test_what_a_game_takes_away_stays_taken():
    """Skiing takes 10,000 points for 20 gates missed; a score that was set back to 0 is none that ran over."""
    for points in (-1.0, -10_000.0, -50_000.0, -500_000.0):
        assert undo_rollover(points) == points
    assert [undo_rollover(points) for points in (-99_900.0, -999_500.0, -9_999_000.0)] == [100, 500, 1000]


class FrameByFrame:
    """A second emulator that plays along frame by frame and keeps its pictures."""

    def __init__(self, env, seed):
        self.env = env
        self.emulator = gym.make(f"ALE/{env.game}-v5", frameskip=1, repeat_action_probability=0.0).unwrapped
        self.reset(game_ended=True, seed=seed)

    def reset(self, game_ended, seed=None):
        if game_ended:
            self.emulator.reset(seed=seed)
            for _ in range(self.emulator.np_random.integers(1, 31)):
                self.emulator.ale.act(ale_py.Action.NOOP)
            self.frames = deque([self.emulator.ale.getScreenRGB()], maxlen=2)
        if self.env.fire_action is not None:
            self.step(self.env.fire_action)

    def step(self, action):
        for _ in range(4):
            self.emulator.ale.act(self.env.emulator_actions[action])
            self.frames.append(self.emulator.ale.getScreenRGB())
            if self.emulator.ale.game_over(with_truncation=False):
                break

    def screen(self):
        return np.max(self.frames, axis=0)


@pytest.mark.parametrize("game", ["Breakout", "UpNDown", "MsPacman"])
def test_screen_is_the_maximum_of_the_last_two_frames_while_recording(game):
    """... after a reset, after every step, and at the end of a game, whose very last frames it shows."""
    env = Atari(Args(env_id=game))
    env.recording = True
    env.reset(seed=3)
    twin = FrameByFrame(env, seed=3)
    np.testing.assert_array_equal(env.screen(), twin.screen())
    rng, flickering, after_the_end = np.random.default_rng(0), 0, 0
    while after_the_end < 10:
        action = int(rng.integers(env.action_space.n))
        terminated = env.step(action)[2]
        twin.step(action)
        assert np.array_equal(env.screen(), twin.screen())
        flickering += not np.array_equal(env.screen(), twin.frames[-1])
        after_the_end += after_the_end > 0 or env.game_ended
        if terminated:
            twin.reset(env.game_ended)
            env.reset()
            np.testing.assert_array_equal(env.screen(), twin.screen())
    assert flickering > 50
    env.recording = False
    np.testing.assert_array_equal(env.screen(), twin.frames[-1])


def test_recording_changes_nothing_else():
    plain, recorded = Atari(Args(env_id="MsPacman")), Atari(Args(env_id="MsPacman"))
    recorded.recording = True
    np.testing.assert_array_equal(plain.reset(seed=1)[0], recorded.reset(seed=1)[0])
    assert play(plain, 300, seed=0) == play(recorded, 300, seed=0)


@pytest.mark.parametrize("game", ["Krull", "MsPacman", "Pong"])
def test_repeated_rewards_are_those_earned_in_an_earlier_picture(game):
    """Against means over blocks of 3x3 pixels, each kept whole; a point lost is no reward."""
    env = Atari(Args(env_id=game, episodic_life=False, max_episode_frames=4000))
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    pictures = []
    while not env.game_ended:
        frame = env.stack[-1].astype(float)
        before = env.episode_return
        info = env.step(int(rng.integers(env.action_space.n)))[4]
        if env.episode_return > before:
            blocks = frame.reshape(28, 3, 28, 3).mean((1, 3))
            pictures.append((blocks.round() // 64).astype(np.uint8).tobytes())
    repeated = len(pictures) - len(set(pictures))
    assert env.rewarded_pictures == {zlib.crc32(picture) for picture in pictures}
    assert info["episode"]["repeated_rewards"] == repeated / max(len(pictures), 1)
    assert (len(pictures) > 10) == (game != "Pong")


def test_repeated_rewards_rise_in_a_loop():
    """A lap of Ms. Pacman that is played ten times, through the same dots; the next game begins anew."""
    env = Atari(Args(env_id="MsPacman", episodic_life=False))
    env.reset(seed=1)
    play(env, 70, seed=0)
    env._start_game(seed=1)
    assert env.repeated_rewards == 0
    state = env.state_dict()
    left = env.action_names.index("LEFT")
    for _ in range(10):
        env.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
        env.stack[-1] = np.frombuffer(state["stack"], np.uint8).reshape(env.stack.shape)[-1]
        for _ in range(90):
            env.step(left)
    assert env.num_rewards >= 50 and env.repeated_rewards == 0.9


def test_the_return_is_of_the_whole_game():
    """The points of the no-op start included: the clock of Skiing runs from the first frame."""
    env = Atari(Args(env_id="Skiing", max_episode_frames=200))
    env.reset(seed=1)
    paid = env.episode_return
    truncated = False
    while not truncated:
        *_, truncated, info = env.step(0)
    raw = ale_py.ALEInterface()
    raw.loadROM(ale_py.roms.get_rom_path("skiing"))
    raw.setFloat("repeat_action_probability", 0)
    raw.reset_game()
    played = sum(raw.act(0) for _ in range(env.ale.getEpisodeFrameNumber()))
    assert paid < 0
    assert info["episode"]["r"] == played


def test_frame_limit_truncates_and_never_terminates():
    env = Atari(Args(env_id="Pong", max_episode_frames=400))
    env.reset(seed=1)
    for step in range(1000):  # noqa: B007
        _, _, terminated, truncated, info = env.step(0)
        assert not terminated
        if truncated:
            break
    assert env.ale.getEpisodeFrameNumber() in range(400, 404) and env.game_ended and info["episode"]["l"] == step + 2
    env.reset()
    assert env.ale.getEpisodeFrameNumber() < 40


@pytest.mark.parametrize("sticky_actions", [0.0, 0.25])
def test_state_restores_exactly(sticky_actions):
    """A restored game goes on frame for frame, through lost lives, the end of the game and its no-op start."""
    args = Args(env_id="Breakout", sticky_actions=sticky_actions)
    env, other = Atari(args), Atari(args)
    env.reset(seed=4)
    play(env, 100, seed=0)
    other.load_state_dict(env.state_dict())
    seen = play(env, 600, seed=1)
    assert play(other, 600, seed=1) == seen
    assert len([step for step in seen if isinstance(step, tuple) and step[4]]) >= 2


def moments(env):
    """States of a game, each with all that the next 30 steps return."""
    env.np_random = np.random.default_rng(1)
    env.reset()
    for seed in range(2):
        yield env.state_dict(), play(env, 30, seed)


def go_on(env, state, seed):
    env.load_state_dict(state)
    return play(env, 30, seed)


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.slow
def test_every_game_restores_exactly(game):
    """... into an environment that has just been made."""
    env = Atari(Args(env_id=game))
    (early, played_early), (late, played_late) = in_a_copy(list, moments(env))
    assert in_a_copy(go_on, env, late, 1) == played_late
    assert go_on(env, early, 0) == played_early


def test_golf_restores_exactly():
    """... far into a game too, where ale-py 0.12.1 restores another count of strokes."""
    env, other = (Atari(Args(env_id="MiniatureGolf", sticky_actions=0.0)) for _ in range(2))
    env.reset(seed=3)
    play(env, 1300, seed=3)
    other.load_state_dict(env.state_dict())
    assert play(other, 30, seed=1) == play(env, 30, seed=1)


@pytest.fixture(scope="module", params=["Pong", "Breakout", "SpaceInvaders", "Freeway"])
def twins(request):
    """Two environments of one game."""
    return [Atari(Args(env_id=request.param)) for _ in range(2)]


@pytest.mark.parametrize("sticky_actions", [0.25, 0.5])
def test_first_frame_after_a_restore_sticks_alike(twins, sticky_actions):
    env, other = twins
    env.sticky_actions = other.sticky_actions = sticky_actions
    env.game_ended = True
    env.np_random = np.random.default_rng(1)
    env.reset()
    for seed in range(40):
        play(env, 3, seed)
        other.load_state_dict(env.state_dict())
        assert play(env, 2, seed) == play(other, 2, seed)


DAMAGES = {
    "no emulator": lambda state: state.pop("emulator"),
    "no lives": lambda state: state.pop("lives"),
    "an empty emulator": lambda state: state.update(emulator=b""),
    "an emulator of zeros": lambda state: state.update(emulator=bytes(len(state["emulator"]))),
    "half an emulator": lambda state: state.update(emulator=state["emulator"][:7000]),
    "an emulator that is cut off": lambda state: state.update(emulator=state["emulator"][:-1]),
    "a text for an emulator": lambda state: state.update(emulator="Breakout"),
    "another generator": lambda state: state.update(random=np.random.MT19937(1).state),
    "no generator": lambda state: state.update(random=None),
    "a generator of text": lambda state: state["random"].update(state={"state": "1", "inc": "1"}),
    "an action that there is not": lambda state: state.update(last_action=99),
    "screens of another game": lambda state: state.update(screens=state["screens"] + bytes(160 * 40 * 2)),
    "one screen": lambda state: state.update(screens=state["screens"][: len(state["screens"]) // 2]),
    "one frame": lambda state: state.update(stack=state["stack"][: 84 * 84]),
    "no frames": lambda state: state.update(stack=b""),
    "broken rewards": lambda state: state["rewarded_pictures"].append("1"),
    "a text for the number of rewards": lambda state: state.update(num_rewards="3"),
    "a text for lives": lambda state: state.update(lives="5"),
    "half a life": lambda state: state.update(lives=2.5),
    "no return": lambda state: state.update(episode_return=None),
    "a return that is no number": lambda state: state.update(episode_return=float("nan")),
    "a list for the length": lambda state: state.update(episode_length=[3]),
    "a text for the end": lambda state: state.update(game_ended="no"),
}


@pytest.fixture(scope="module")
def game():
    env = Atari(Args(env_id="Breakout"))
    env.reset(seed=1)
    return env, env.state_dict()


@pytest.mark.parametrize("damage", DAMAGES)
def test_nonsense_is_refused(damage, game):
    env, state = game
    env.load_state_dict(state)
    state = copy.deepcopy(state)
    DAMAGES[damage](state)
    with pytest.raises((ValueError, KeyError, TypeError)):
        env.load_state_dict(state)


def test_a_state_of_another_game_is_refused():
    env = Atari(Args(env_id="Pong"))
    env.reset(seed=1)
    with pytest.raises(ValueError, match="emulator.* is damaged or of another game"):
        Atari(Args(env_id="Breakout")).load_state_dict(env.state_dict())


@pytest.mark.parametrize("env_id", ["Breakout", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4"])
def test_names_of_one_game(env_id):
    assert Atari.find_game(env_id) == "Breakout"


def test_full_action_space():
    assert Atari(Args(env_id="Breakout")).action_names == ["NOOP", "FIRE", "RIGHT", "LEFT"]
    assert Atari(Args(env_id="Breakout", full_action_space=True)).action_space.n == 18


def test_game_that_ends_at_the_frame_limit_is_over_and_not_cut():
    """A truncation would bootstrap from a state that nothing follows."""

    def play(**limit):
        env = started("Breakout", **limit)
        while True:
            _, _, terminated, truncated, info = env.step(0)
            if info:
                return env.ale.getEpisodeFrameNumber(), terminated, truncated
            if terminated:
                env.reset()

    last_frame, terminated, truncated = play()
    assert terminated and not truncated
    assert play(max_episode_frames=last_frame) == (last_frame, True, False)
    assert play(max_episode_frames=last_frame - 4)[2]


def test_no_lives_before_the_end_are_no_lost_life(monkeypatch):
    """Some games show 0 lives for a few frames before they are over: that is one end, not two."""
    env = started("Breakout")
    lives = iter([5, 4, 4, 0, 0])
    env.ale = Mock(wraps=env.ale, lives=lambda: next(lives))
    assert [env.step(0)[2] for _ in range(5)] == [False, True, False, False, False]
