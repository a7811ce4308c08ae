"""The Atari wrapper against gymnasium's own preprocessing, and its rules on real games."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from dqn_atari import Args, Atari, game_name


@pytest.mark.parametrize("game", ["Breakout", "Pong", "SpaceInvaders", "Seaquest", "Qbert", "MontezumaRevenge"])
def test_observations_equal_gymnasium(game):
    """Byte for byte over 1,500 steps and all resets among them, without life loss and FIRE."""
    ours = Atari(Args(env_id=game, episodic_life=False))
    ours.fire_action = None
    theirs = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    theirs = FrameStackObservation(AtariPreprocessing(theirs, noop_max=30), 4, padding_type="zero")
    rng = np.random.default_rng(1)
    observation, expected = ours.reset(seed=7)[0], theirs.reset(seed=7)[0]
    games = 0
    for _ in range(1500):
        np.testing.assert_array_equal(observation, expected)
        action = int(rng.integers(ours.action_space.n))
        observation, reward, terminated, truncated, info = ours.step(action)
        expected, raw_reward, expected_terminated, expected_truncated, _ = theirs.step(action)
        assert (reward, terminated, truncated) == (np.sign(raw_reward), expected_terminated, expected_truncated)
        if terminated:
            np.testing.assert_array_equal(observation, expected)
            observation, expected = ours.reset()[0], theirs.reset()[0]
            games += 1
    assert games > 0 or game in ("Pong", "Seaquest")


def test_life_loss_ends_the_episode_and_not_the_game():
    """Breakout: five terminated episodes in one game; every next life starts with FIRE and one frame in the stack."""
    env = Atari(Args(env_id="Breakout"))
    env.reset(seed=3)
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


def test_without_episodic_life_only_the_game_ends():
    env = Atari(Args(env_id="Breakout", episodic_life=False))
    env.reset(seed=3)
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
    idle = Atari(Args(env_id="Pong"))
    idle.reset(seed=2)
    idle.unwrapped.step(0)
    for _ in range(10):
        idle.step(0)
    np.testing.assert_array_equal(stuck.stack, idle.stack)


def test_rewards_are_signs_and_returns_are_true():
    """Seaquest pays 20 a shark: the learner sees 1, the episode's return has the points."""
    env = Atari(Args(env_id="Seaquest", episodic_life=False))
    env.reset(seed=1)
    rng, clipped, length, frames = np.random.default_rng(0), [], 0, [env.stack[3].tobytes()]
    while True:
        observation, reward, terminated, _, info = env.step(int(rng.integers(env.action_space.n)))
        clipped.append(reward)
        frames.append(observation[3].tobytes())
        length += 1
        if terminated:
            break
    assert set(clipped) <= {-1.0, 0.0, 1.0} and sum(clipped) > 0
    episode = info["episode"]
    assert episode["r"] == 20 * sum(clipped)
    assert episode["l"] == length + 1  # and the FIRE that started it
    # the frame before that FIRE counts too: it may or may not have come up again
    assert episode["unique_frames"] * (length + 2) - len(set(frames)) in (0, 1)


def test_unique_frames_falls_when_nothing_happens():
    env = Atari(Args(env_id="Breakout", episodic_life=False, max_episode_frames=4000))
    env.fire_action = None
    env.reset(seed=1)
    while not env.game_ended:
        info = env.step(0)[4]
    assert info["episode"]["unique_frames"] < 0.01


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
    rng = np.random.default_rng(0)
    env.reset(seed=4)
    for _ in range(100):
        if env.step(int(rng.integers(4)))[2]:
            env.reset()
    other.load_state_dict(env.state_dict())
    games = 0
    for action in rng.integers(4, size=1200).tolist():
        ours, theirs = env.step(action), other.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
        if ours[2]:
            np.testing.assert_array_equal(env.reset()[0], other.reset()[0])
        games += bool(ours[4])
    assert games >= 2


@pytest.mark.parametrize("env_id", ["Breakout", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4"])
def test_names_of_one_game(env_id):
    assert game_name(env_id) == "Breakout"


def test_full_action_space():
    assert Atari(Args(env_id="Breakout")).action_names == ["NOOP", "FIRE", "RIGHT", "LEFT"]
    assert Atari(Args(env_id="Breakout", full_action_space=True)).action_space.n == 18
