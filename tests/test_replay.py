"""The single-frame replay against a naive list of full transitions."""

import numpy as np
import pytest
import torch
from helpers import Naive

from dqn_atari import HISTORY, SIZE, Replay

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_envs", [1, 5])
@pytest.mark.parametrize("n_step", [1, 3])
def test_samples_equal_full_transitions(num_envs, n_step):
    """Every drawn transition is the naive one; those drawn are exactly those that are valid."""
    rng = np.random.default_rng(num_envs * 10 + n_step)
    torch.manual_seed(0)
    rows, gamma = 40, 0.9
    replay = Replay(rows * num_envs, num_envs, n_step, gamma, CPU)
    naive = [Naive(n_step, gamma) for _ in range(num_envs)]
    for step in range(3 * rows + 7):
        frames = rng.integers(0, 256, (num_envs, SIZE, SIZE), dtype=np.uint8)
        frames[:, 0, :4] = np.arange(num_envs)[:, None]  # a tag that tells the transition drawn: environment and step
        frames[:, 0, 4:8] = step
        actions, rewards = rng.integers(0, 18, num_envs), rng.integers(-1, 2, num_envs).astype(np.float32)
        terminated, truncated = rng.random(num_envs) < 0.1, rng.random(num_envs) < 0.05
        for i in range(num_envs):
            naive[i].add(frames[i], actions[i], rewards[i], terminated[i], truncated[i])
        replay.add(*map(torch.from_numpy, (frames, actions, rewards, terminated, truncated)))
        if step not in (9, rows - 2, rows - 1, rows, rows + 2, 2 * rows + 5, 3 * rows + 6):
            continue
        stored = step + 1
        first = max(0, stored - rows + HISTORY)
        valid = {
            (i, t) for i in range(num_envs) for t in range(first, stored - n_step) if naive[i].transition(t) is not None
        }
        drawn = set()
        for _ in range(40 * num_envs):
            batch = replay.sample(32)
            for j in range(32):
                observation = batch.observations[j].numpy()
                i, t = int(observation[-1, 0, 0]), int(observation[-1, 0, 4])
                stack, action, total, next_stack, discount = naive[i].transition(t)
                np.testing.assert_array_equal(observation, stack)
                assert batch.actions[j] == action
                assert batch.returns[j].item() == pytest.approx(total, abs=1e-6)
                assert batch.discounts[j].item() == pytest.approx(discount, abs=1e-6)
                if next_stack is not None:
                    np.testing.assert_array_equal(batch.next_observations[j].numpy(), next_stack)
                drawn.add((i, t))
        assert drawn == valid


def test_sampling_is_uniform():
    """Each valid transition comes up equally often (chi-square over 64,000 draws, 1e-6 tail)."""
    torch.manual_seed(0)
    replay = Replay(60, 2, 1, 0.99, CPU)
    for step in range(50):
        frames = torch.full((2, SIZE, SIZE), step, dtype=torch.uint8)
        frames[1, 0, 0] += 100
        truncated = torch.tensor([step % 7 == 0, False])
        replay.add(frames, torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.bool), truncated)
    counts = torch.zeros(256)
    for _ in range(1000):
        counts += torch.bincount(replay.sample(64).observations[:, -1, 0, 0].long(), minlength=256)
    valid = [t + 100 * i for i in range(2) for t in range(23, 49) if not (i == 0 and t % 7 == 0)]
    assert set(counts.nonzero().flatten().tolist()) == set(valid)
    expected = 64_000 / len(valid)
    chi_square = ((counts[valid] - expected) ** 2 / expected).sum().item()
    assert chi_square < 107  # 48 - 1 degrees of freedom


def test_state_survives_a_checkpoint(tmp_path):
    """A restored replay draws the same samples and goes on storing at the same place."""
    replay, other = (Replay(70, 2, 1, 0.99, CPU) for _ in range(2))

    def add(replay, step):
        generator = torch.Generator().manual_seed(step)
        frames = torch.randint(0, 256, (2, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        ends = torch.rand(2, generator=generator)
        replay.add(frames, torch.tensor([step % 5, 1]), torch.tensor([1.0, step]), ends < 0.1, ends > 0.95)

    for steps in (range(20), range(20, 100)):
        for step in steps:
            add(replay, step)
        torch.save(replay.state_dict(), tmp_path / "replay.pt")
        assert (tmp_path / "replay.pt").stat().st_size < 1.1 * min(100, replay.num_steps) * 2 * 7063
        other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True, mmap=True))
        for r in (replay, other):
            torch.manual_seed(1)
            for step in range(500, 503):
                add(r, step)
        for a, b in zip(replay.sample(32), other.sample(32)):
            assert a.shape == b.shape
        torch.manual_seed(2)
        first = replay.sample(32)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(first, other.sample(32)))
