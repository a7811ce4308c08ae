"""The vector of environments: the same games whether in workers or not, and no process left behind."""

import os
import signal
import time

import numpy as np
import pytest

from dqn_atari import Args, Atari, AtariVector


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_equals_environments_one_by_one(num_workers):
    """Observations, rewards, ends and finished games of 3 environments, each with its own seed."""
    args = Args(env_id="Breakout", num_envs=3, num_workers=num_workers, max_episode_frames=700)
    vector, singles = AtariVector(args), [Atari(args) for _ in range(3)]
    observations = vector.reset(10)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(observations[i], env.reset(seed=10 + i)[0])
    rng, ended, truncations = np.random.default_rng(0), 0, 0
    for _ in range(300):
        actions = rng.integers(4, size=3)
        vector.send(actions)
        observations, rewards, terminated, truncated, games = vector.recv()
        expected_games = []
        for i, env in enumerate(singles):
            observation, reward, end, cut, info = env.step(int(actions[i]))
            assert (rewards[i], terminated[i], truncated[i]) == (reward, end, cut)
            if cut:
                np.testing.assert_array_equal(vector.arrays["final_observations"][i], observation)
                truncations += 1
            if end or cut:
                observation, _ = env.reset()
            np.testing.assert_array_equal(observations[i], observation)
            expected_games += [info["episode"] | {"env": i}] if info else []
        assert games == expected_games
        ended += len(games)
    assert ended >= 3 and truncations
    vector.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_moves_to_another_vector(num_workers):
    args = Args(env_id="Breakout", num_envs=3, num_workers=num_workers)
    one, other = AtariVector(args), AtariVector(args)
    one.reset(1)
    rng = np.random.default_rng(0)
    for _ in range(50):
        one.send(rng.integers(4, size=3))
        one.recv()
    np.testing.assert_array_equal(other.load_state_dict(one.state_dict()), one.arrays["observations"])
    for _ in range(200):
        actions = rng.integers(4, size=3)
        one.send(actions), other.send(actions)
        for a, b in zip(one.recv(), other.recv()):
            np.testing.assert_array_equal(a, b)
    other.close(), one.close()  # the workers forked last hold pipes of the first


def test_close_leaves_no_process():
    vector = AtariVector(Args(env_id="Pong", num_envs=4, num_workers=2))
    vector.reset(1)
    vector.send(np.zeros(4, np.int64))
    pids = [worker.pid for worker in vector.workers]
    assert all(map(alive, pids))
    vector.close()
    assert not any(map(alive, pids))


def test_dead_worker_is_named():
    vector = AtariVector(Args(env_id="Pong", num_envs=4, num_workers=2))
    vector.reset(1)
    os.kill(vector.workers[1].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"worker 1 .*environments 2 to 3\) died with exit code -9"):
        while time.monotonic() < start + 10:
            vector.send(np.zeros(4, np.int64))
            vector.recv()
    vector.close()


def test_exception_in_a_worker_shows_its_traceback():
    vector = AtariVector(Args(env_id="Pong", num_envs=2, num_workers=1))
    vector.reset(1)
    vector.send(np.array([0, 99]))
    with pytest.raises(SystemExit, match="(?s)worker 0 failed.*IndexError"):
        vector.recv()
    vector.close()
