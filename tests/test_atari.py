"""The Atari wrapper against gymnasium's own preprocessing, and its rules on real games."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import dqn_atari
from dqn_atari import Atari


@pytest.mark.parametrize("game", ["Breakout", "Pong", "SpaceInvaders", "Seaquest", "Qbert", "MontezumaRevenge"])
def test_observations_equal_gymnasium(game):
    """Byte for byte over 1,500 steps and all resets among them, without life loss and FIRE."""
    ours = Atari(game, episodic_life=False)
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
