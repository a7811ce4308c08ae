"""C51's projection, update, acting, flags and overlay against direct computations and known return distributions."""

import itertools

import numpy as np
import pytest
import torch
from test_learner import state_frame

from c51_atari import STACK, Agent, Args, project

CPU = torch.device("cpu")


def make_agent(num_actions=2, device=CPU, **flags):
    torch.manual_seed(0)
    return Agent(Args(**({"precision": "float32"} | flags)), num_actions, device)


# ------------------------------------------------------------------------------------------------- projection


def project_by_loops(probabilities, returns, discounts, support) -> np.ndarray:
    """Algorithm 1 of Bellemare et al. 2017, one atom after another, in float64."""
    probabilities, returns, discounts, support = (
        np.asarray(x, np.float64) for x in (probabilities, returns, discounts, support)
    )
    projected, spacing = np.zeros_like(probabilities), (support[-1] - support[0]) / (len(support) - 1)
    for i, j in itertools.product(*map(range, probabilities.shape)):
        moved = min(max(returns[i] + discounts[i] * support[j], support[0]), support[-1])
        place = (moved - support[0]) / spacing
        below = min(int(place), len(support) - 2)
        projected[i, below] += probabilities[i, j] * (below + 1 - place)
        projected[i, below + 1] += probabilities[i, j] * (place - below)
    return projected


SUPPORTS = {"default": (-10, 10, 51), "lopsided": (-1, 7.3, 23), "negative": (-900, -850, 11), "two": (0, 1, 2)}


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("gamma", [0, 0.5, 0.99**3, 0.99, 1])
def test_projection_equals_the_double_loop(support, gamma):
    """Random and one-hot distributions, returns inside, at and far beyond both ends, some states terminal."""
    support = torch.linspace(*support)
    low, high = support[0].item(), support[-1].item()
    generator = torch.Generator().manual_seed(0)
    random = (3 * torch.randn(64, len(support), generator=generator)).softmax(1)
    peaks = torch.nn.functional.one_hot(torch.arange(64) % len(support), len(support)).float()
    for probabilities in (random, peaks):
        inside = low + (high - low) * torch.rand(40, generator=generator) - gamma * (low + high) / 2
        edges = torch.tensor([low, high, 0, low - gamma * low, high - gamma * high, 1e5, -1e5, 1e30, -1e30])
        returns = torch.cat([inside, edges, torch.randn(15, generator=generator)])
        discounts = gamma * (torch.arange(64) % 3 > 0)
        projected = project(probabilities, returns, discounts, support)
        assert projected.dtype == torch.float32 and (projected >= 0).all()
        expected = project_by_loops(probabilities, returns, discounts, support)
        # positions are rounded to the float32 spacing of the returns, in units of the distance between atoms
        rounding = 4 * 1.2e-7 * max(abs(low), abs(high)) / (support[1] - support[0]).item()
        np.testing.assert_allclose(projected, expected, atol=max(rounding, 1e-6))
        np.testing.assert_allclose(projected.sum(1), np.ones(64), atol=5e-6)


def test_projection_onto_support_points_moves_whole_atoms():
    """Undiscounted returns of whole atoms shift a distribution; what passes an end piles up there."""
    support, probabilities = torch.linspace(-10, 10, 51), torch.rand(101, 51).softmax(1)
    shifts = range(-50, 51)
    returns = torch.tensor(shifts) * 0.4
    projected = project(probabilities, returns, torch.ones(101), support)
    for shift, before, after in zip(shifts, probabilities.numpy(), projected.numpy()):
        expected = np.zeros(51)
        np.add.at(expected, np.clip(np.arange(51) + shift, 0, 50), before)
        np.testing.assert_allclose(after, expected, atol=1e-6)
    returns = support[torch.arange(101) % 51]  # terminal: all of the mass on the return's atom
    projected = project(probabilities, returns, torch.zeros(101), support)
    np.testing.assert_allclose(projected, torch.eye(51)[torch.arange(101) % 51], atol=5e-6)


def test_projection_keeps_the_mean():
    """As long as nothing passes an end, the mean moves like a Q-value: E[r + gamma Z] = r + gamma E[Z]."""
    support, probabilities = torch.linspace(-10, 10, 51), torch.rand(64, 51).softmax(1)
    returns, discounts = torch.rand(64) - 0.5, torch.rand(64) * 0.9
    projected = project(probabilities, returns, discounts, support)
    expected = returns + discounts * (probabilities @ support)
    torch.testing.assert_close(projected @ support, expected, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------- decision processes

# state -> action -> outcomes of equal probability: next state (None: the episode ends), reward
TREE = {
    0: {0: [(1, 0), (1, 1), (2, 0), (2, -1)], 1: [(2, 0), (2, 0), (2, 1), (3, -1)]},
    1: {0: [(2, 0), (2, 0), (3, 0), (3, 1)], 1: [(None, 1), (None, -1), (None, -1), (None, -1)]},
    2: {0: [(None, 1), (None, 1), (None, 1), (None, -1)], 1: [(3, 0), (3, 0), (3, 0), (3, 1)]},
    3: {0: [(None, 1), (None, 1), (None, -1), (None, -1)], 1: [(None, 0), (None, 0), (None, 0), (None, 1)]},
}
LOOPS = {
    0: {0: [(0, 0), (1, 0), (1, 0), (1, 1)], 1: [(0, -1), (0, 0), (0, 0), (0, 0)]},
    1: {0: [(0, 1), (2, 0), (2, 0), (2, -1)], 1: [(3, 0), (3, 0), (0, 0), (0, 0)]},
    2: {0: [(None, 1), (None, 1), (1, 0), (1, 0)], 1: [(None, 0), (2, 1), (2, -1), (3, 0)]},
    3: {0: [(None, -1), (2, 0), (2, 1), (0, 0)], 1: [(3, -1), (3, 0), (3, 0), (2, 0)]},
}


def fixed_point(process, gamma, support) -> np.ndarray:
    """Return distributions [state, action, atom] that a sweep of the projected Bellman operator no longer changes."""
    distributions = np.full((4, 2, len(support)), 1 / len(support))
    for _ in range(200):
        best = (distributions @ support).argmax(1)
        swept = np.zeros_like(distributions)
        for state, action in itertools.product(range(4), range(2)):
            for next_state, reward in process[state][action]:
                after = distributions[next_state or 0, best[next_state or 0]]
                discount = 0 if next_state is None else gamma
                swept[state, action] += project_by_loops([after], [reward], [discount], support)[0] / 4
        distributions = swept
    return distributions


def true_returns(state, action, gamma) -> dict[float, float]:
    """Every return of ``TREE`` with its probability, by following all branches of the best policy."""
    found = {}
    for next_state, reward in TREE[state][action]:
        after = {0.0: 1.0}
        if next_state is not None:
            actions = [true_returns(next_state, action, gamma) for action in range(2)]
            after = max(actions, key=lambda returns: sum(value * p for value, p in returns.items()))
        for value, p in after.items():
            found[reward + gamma * value] = found.get(reward + gamma * value, 0) + p / 4
    return found


def all_outcomes(process, gamma) -> tuple[torch.Tensor, ...]:
    """A batch of 32 that holds every outcome of every action in every state once."""
    rows = [(s, a, *outcome) for s in range(4) for a in range(2) for outcome in process[s][a]]
    states, actions, next_states, rewards = zip(*rows)
    frames = torch.stack([state_frame(state) for state in range(5)])[:, None].expand(-1, STACK, -1, -1)
    # the observation after the end of an episode is another one's: it must not count
    next_observations = frames[[4 if state is None else state for state in next_states]]
    discounts = torch.tensor([0.0 if state is None else gamma for state in next_states])
    return frames[list(states)], torch.tensor(actions), torch.tensor(rewards).float(), next_observations, discounts


@pytest.mark.parametrize(
    "process, gamma, precision", [(TREE, 0.5, "float32"), (TREE, 0.5, "bfloat16"), (LOOPS, 0.9, "float32")]
)
def test_update_converges_to_the_return_distributions(process, gamma, precision):
    """In TREE all returns lie on the support, so that these are the true distributions; LOOPS never ends for sure."""
    agent = make_agent(v_min=-2.0, v_max=2.0, n_atoms=17, learning_rate=1e-3, precision=precision)
    support = np.linspace(-2, 2, 17)
    expected = fixed_point(process, gamma, support)
    if process is TREE:
        for state, action in itertools.product(range(4), range(2)):
            true = np.zeros(17)
            for value, p in true_returns(state, action, gamma).items():
                true[np.flatnonzero(np.isclose(support, value))] += p
            assert true.sum() == pytest.approx(1)
            np.testing.assert_allclose(expected[state, action], true, atol=1e-12)
    batch = all_outcomes(process, gamma)
    for update in range(300):
        agent.update(*batch)
        if update % 20 == 0:
            agent.update_target()
    with torch.no_grad():
        learned = agent.q_network(batch[0][::8]).softmax(2).numpy()
    print(np.abs(learned - expected).max())
    np.testing.assert_allclose(learned, expected, atol=0.02)
