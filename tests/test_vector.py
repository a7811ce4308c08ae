"""The vector of environments: the same games whether in workers or not, and no process left behind."""

import copy
import functools
import os
import signal
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import dqn_atari
import ppo_atari
from dqn_atari import Args, Atari, AtariVector, derive_seed


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


PLAYED = Args(env_id="Breakout", num_envs=3, max_episode_frames=640)


class Outcome(NamedTuple):
    """What a step brings to all environments: observations to act on, and those that the step itself has led to."""

    actions: np.ndarray
    observations: np.ndarray
    last_observations: np.ndarray
    rewards: list[float]
    terminated: list[bool]
    truncated: list[bool]
    games: list[dict]


@functools.cache
def one_by_one() -> tuple[np.ndarray, list[Outcome]]:
    """First observations and 300 steps of environments that are each on its own, with the seeds that 10 leads to."""
    singles = [Atari(PLAYED) for _ in range(PLAYED.num_envs)]
    first = np.stack([env.reset(seed=derive_seed(10, i))[0] for i, env in enumerate(singles)])
    rng, outcomes = np.random.default_rng(0), []
    for _ in range(300):
        actions = rng.integers(4, size=PLAYED.num_envs)
        steps = [env.step(action) for env, action in zip(singles, actions.tolist())]
        observations, rewards, terminated, truncated, infos = zip(*steps)
        last = np.stack(observations)
        for env, end, cut in zip(singles, terminated, truncated):
            if end or cut:
                env.reset()  # overwrites its observation
        games = [info["episode"] | {"env": i} for i, info in enumerate(infos) if info]
        outcomes.append(Outcome(actions, np.stack(observations), last, rewards, terminated, truncated, games))
    return first, outcomes


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.slow
def test_equals_environments_one_by_one(num_workers):
    """Observations, rewards, ends and finished games of 3 environments, each with its own seed."""
    vector = AtariVector(replace(PLAYED, num_workers=num_workers))
    first, outcomes = one_by_one()
    vector.reset(10)
    np.testing.assert_array_equal(vector.observations, first)
    ended = truncations = 0
    for expected in outcomes:
        vector.send(expected.actions)
        observations, rewards, terminated, truncated, games = vector.recv()
        np.testing.assert_array_equal(observations, expected.observations)
        assert (*rewards,) == expected.rewards
        assert (*terminated,) == expected.terminated and (*truncated,) == expected.truncated
        assert games == expected.games
        ended += len(games)
        truncations += truncated.sum()
    assert ended >= 3 and 0 < truncations < ended
    vector.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_last_observations_of_truncated_episodes_are_kept(num_workers):
    """... by PPO, which needs their values."""
    vector = ppo_atari.AtariVector(replace(PLAYED, num_workers=num_workers))
    vector.reset(10)
    cuts = 0
    for expected in one_by_one()[1]:
        vector.send(expected.actions)
        _, _, _, truncated, _ = vector.recv()
        assert (*truncated,) == expected.truncated
        for i in np.flatnonzero(truncated):
            np.testing.assert_array_equal(vector.outcomes["final_observation"][i], expected.last_observations[i])
            cuts += 1
    assert cuts >= 2
    vector.close()


@pytest.mark.slow
def test_workers_can_be_spawned(monkeypatch):
    """As on macOS and Windows, where a fork is unsafe or missing."""
    args = Args(env_id="Pong", num_envs=2, num_workers=1)
    forked = AtariVector(args)
    monkeypatch.setattr(sys, "platform", "darwin")
    spawned = AtariVector(args)
    for vector in (forked, spawned):
        vector.reset(1)
    for _ in range(20):
        for vector in (forked, spawned):
            vector.send(np.array([2, 3]))
        for a, b in zip(forked.recv(), spawned.recv()):
            assert_array_equal(a, b)
    os.kill(spawned.workers[0].pid, signal.SIGKILL)
    with pytest.raises(SystemExit, match="died with exit code -9"):
        while True:
            spawned.send(np.zeros(2, np.int64))
            spawned.recv()
    spawned.close(), forked.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_state_moves_to_another_vector(num_workers):
    args = Args(env_id="Breakout", num_envs=3, num_workers=num_workers)
    one, other = AtariVector(args), AtariVector(args)
    one.reset(1)
    rng = np.random.default_rng(0)
    for _ in range(50):
        one.send(rng.integers(4, size=3))
        one.recv()
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(other.observations, one.observations)
    for _ in range(100):
        actions = rng.integers(4, size=3)
        one.send(actions), other.send(actions)
        for a, b in zip(one.recv(), other.recv()):
            np.testing.assert_array_equal(a, b)
    other.close(), one.close()  # the workers forked last hold pipes of the first


def test_runs_with_neighbouring_seeds_have_no_game_in_common():
    seeds = {derive_seed(seed, env) for seed in range(20) for env in range(64)}
    assert len(seeds) == 20 * 64


def test_a_share_of_the_environments_plays_their_games():
    """As the ranks and halves of PPO do: environments 1 and 2 of 3, on their own."""
    whole, share = (ppo_atari.AtariVector(Args(env_id="Pong", num_envs=num_envs, num_workers=0)) for num_envs in (3, 2))
    whole.reset(5), share.reset(5, first=1)
    games = whole.state_dict()
    assert games[1:] == share.state_dict()
    assert len({str(game["random"]) for game in games}) == 3


@pytest.fixture(scope="module", params=[0, 2])
def pong(request):
    """Two games, in this process and in workers, and their states."""
    vector = AtariVector(Args(env_id="Pong", num_envs=2, num_workers=request.param))
    vector.reset(1)
    yield vector, vector.state_dict()
    vector.close()


@pytest.mark.parametrize("damage", ["missing", "garbage", "no game"])
@pytest.mark.slow
def test_states_that_cannot_be_loaded_raise_an_error_here(pong, damage):
    """... with its reason, whether the games are in workers or not."""
    vector, states = pong
    vector.load_state_dict(states)
    states = copy.deepcopy(states)
    if damage == "missing":
        del states[1]["stack"]
    elif damage == "garbage":
        states[1]["screens"] = bytes(14000)
    else:
        states[1] = None
    reason = {"missing": "KeyError.*stack", "garbage": "cannot reshape", "no game": "TypeError"}[damage]
    with pytest.raises(ValueError, match=reason):
        vector.load_state_dict(states)


@pytest.mark.parametrize("number", [1, 3])
def test_states_of_another_number_of_games_are_refused(pong, number):
    vector, states = pong
    with pytest.raises(ValueError, match=f"there are {number} games, not 2"):
        vector.load_state_dict((2 * states)[:number])


def test_close_leaves_no_process():
    vector = AtariVector(Args(env_id="Pong", num_envs=2, num_workers=2))
    vector.reset(1)
    vector.send(np.zeros(2, np.int64))
    pids = [worker.pid for worker in vector.workers]
    assert all(map(alive, pids))
    vector.close()
    assert not any(map(alive, pids))


def test_dead_worker_is_named():
    vector = AtariVector(Args(env_id="Pong", num_envs=3, num_workers=2))
    vector.reset(1)
    pid = vector.workers[1].pid
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(SystemExit, match=rf"environment worker \(process {pid}\) died with exit code -9"):
        while time.monotonic() < start + 10:
            vector.send(np.zeros(3, np.int64))
            vector.recv()
    vector.close()


def test_exception_in_a_worker_shows_its_traceback():
    vector = AtariVector(Args(env_id="Pong", num_envs=2, num_workers=1))
    vector.reset(1)
    vector.send(np.array([0, 99]))
    with pytest.raises(SystemExit, match="(?s)an environment worker failed.*IndexError"):
        vector.recv()
    vector.close()


class NoRoom(Atari):
    """The first is made, for the number of actions; those of the workers are not."""

    main_process = os.getpid()

    def __init__(self, args):
        if os.getpid() != self.main_process:
            raise MemoryError("no room")
        super().__init__(args)


def test_game_that_cannot_be_made_in_a_worker_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(dqn_atari, "Game", NoRoom)
    vector = AtariVector(Args(env_id="Pong", num_envs=2, num_workers=1))
    vector.workers[0].join()  # what is sent from now on finds a closed pipe
    with pytest.raises(SystemExit, match="(?s)an environment worker failed.*MemoryError: no room"):
        vector.reset(1)
    vector.close()


class Broken(Atari):
    def step(self, action):
        raise ConnectionResetError("the game's server is gone")


def test_error_of_a_game_in_the_main_process_is_raised_as_it_is(monkeypatch):
    monkeypatch.setattr(dqn_atari, "Game", Broken)
    vector = AtariVector(Args(env_id="Pong", num_envs=2, num_workers=0))
    vector.reset(1)
    with pytest.raises(ConnectionResetError, match="the game's server is gone"):
        vector.send(np.zeros(2, np.int64))
