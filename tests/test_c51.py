"""C51's projection, update, acting, flags and overlay against direct computations and known return distributions."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from helpers import IN_BFLOAT16, random_batch, state_frame, with_small_trunk

import c51_atari
from c51_atari import (
    BAR,
    CHOSEN,
    GREEDY,
    GRID,
    STACK,
    TEXT,
    Agent,
    Args,
    Atari,
    CudaGraph,
    Overlay,
    QNetwork,
    check_args,
    number,
    project,
)

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


def all_outcomes(process) -> tuple[torch.Tensor, ...]:
    """A batch of 32 that holds every outcome of every action in every state once."""
    rows = [(s, a, *outcome) for s in range(4) for a in range(2) for outcome in process[s][a]]
    states, actions, next_states, rewards = zip(*rows)
    frames = torch.stack([state_frame(state) for state in range(5)])[:, None].expand(-1, STACK, -1, -1)
    # the observation after the end of an episode is another one's: it must not count
    next_observations = frames[[4 if state is None else state for state in next_states]]
    terminated = torch.tensor([state is None for state in next_states])
    return frames[list(states)], torch.tensor(actions), torch.tensor(rewards).float(), next_observations, terminated


@pytest.mark.parametrize(
    "process, gamma, network, precision, num_updates",
    [
        (LOOPS, 0.9, with_small_trunk(QNetwork), "float32", 200),
        pytest.param(TREE, 0.5, with_small_trunk(QNetwork), *IN_BFLOAT16.values, 200, marks=IN_BFLOAT16.marks),
        (TREE, 0.5, QNetwork, "auto", 120),
    ],
)
@pytest.mark.slow
def test_update_converges_to_the_return_distributions(monkeypatch, process, gamma, network, precision, num_updates):
    """In TREE all returns lie on the support, so that these are the true distributions; LOOPS never ends for sure."""
    monkeypatch.setattr(c51_atari, "QNetwork", network)
    agent = make_agent(v_min=-2.0, v_max=2.0, n_atoms=17, gamma=gamma, learning_rate=1e-3, precision=precision)
    support = np.linspace(-2, 2, 17)
    expected = fixed_point(process, gamma, support)
    if process is TREE:
        for state, action in itertools.product(range(4), range(2)):
            true = np.zeros(17)
            for value, p in true_returns(state, action, gamma).items():
                true[np.flatnonzero(np.isclose(support, value))] += p
            assert true.sum() == pytest.approx(1)
            np.testing.assert_allclose(expected[state, action], true, atol=1e-12)
    batch = all_outcomes(process)
    for update in range(num_updates):
        agent.update(*batch)
        if update % 20 == 0:
            agent.update_target()
    with torch.no_grad():
        learned = agent.q_network(batch[0][::8]).softmax(2).numpy()
    np.testing.assert_allclose(learned, expected, atol=0.01)


# ----------------------------------------------------------------------------------------------------- update


def test_update_is_the_formula():
    """Loss, gradients, Adam's step and all metrics of one update, one transition after another in float64."""
    agent = make_agent(4, gamma=0.97)
    with torch.no_grad():
        agent.q_network.head.weight.mul_(30)  # distributions that differ
        for name, parameter in agent.target_network.named_parameters():
            parameter.copy_(agent.q_network.get_parameter(name) * 1.1)
    observations, actions, rewards, next_observations, terminated = batch = random_batch(num_actions=4)
    assert 0 < terminated.sum() < 32
    discounts = [0.0 if end else 0.97 for end in terminated]
    before = copy.deepcopy(agent.q_network)
    network, target = copy.deepcopy(agent.q_network).double(), copy.deepcopy(agent.target_network).double()
    network.dtype = target.dtype = torch.float64
    for model in (network, target):
        model.forward = lambda x, model=model: torch.nn.functional.linear(
            model.trunk(x.double() / 255), model.head.weight, model.head.bias
        ).view(len(x), 4, 51)
    support, loss, expected = np.linspace(-10, 10, 51), 0.0, np.zeros(6)
    for i in range(32):
        after = target(next_observations[i : i + 1])[0].detach().exp().numpy()
        after /= after.sum(1, keepdims=True)
        best = max(range(4), key=lambda action: after[action] @ support)
        projected = project_by_loops(after[best : best + 1], rewards[i : i + 1], discounts[i : i + 1], support)[0]
        logits = network(observations[i : i + 1])[0]
        log_probabilities = logits[actions[i]] - logits[actions[i]].exp().sum().log()
        cross_entropy = -sum(p * log for p, log in zip(projected.tolist(), log_probabilities))
        loss = loss + cross_entropy / 32
        now = logits.detach().exp().numpy()
        now /= now.sum(1, keepdims=True)
        means = now @ support
        greedy = now[means.argmax()]
        variance = sum(p * (z - means.max()) ** 2 for p, z in zip(greedy, support))
        metrics = [cross_entropy.item(), means[actions[i]], means.max(), variance**0.5, greedy[0], greedy[-1]]
        expected += np.array(metrics) / 32
    loss.backward()
    agent.update(*batch)
    names = ("loss", "q_values", "greedy_mean", "greedy_std", "mass_at_v_min", "mass_at_v_max")
    assert agent.metrics.means() == pytest.approx(dict(zip(names, expected)), rel=1e-4)
    for ours, theirs, old in zip(agent.q_network.parameters(), network.parameters(), before.parameters()):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)
        step = 2.5e-4 * ours.grad / (ours.grad.abs() + 0.01 / 32)  # Adam's first
        torch.testing.assert_close(ours.detach(), (old - step).detach(), rtol=2e-7, atol=1e-7)  # a rounding


def test_metrics_are_means_over_the_updates():
    agent = make_agent()
    assert agent.metrics.take() == {}
    agent.update(*random_batch())
    first = agent.metrics.take()
    agent.update(*random_batch())
    second = agent.metrics.take()
    assert agent.metrics.take() == {}
    again = make_agent()
    for _ in range(2):
        again.update(*random_batch())
    assert first["loss"] > second["loss"]
    assert again.metrics.means() == pytest.approx({name: (first[name] + second[name]) / 2 for name in first}, rel=1e-4)


def test_loss_that_is_not_finite_ends_the_run():
    agent = make_agent()
    observations, actions, rewards, next_observations, terminated = random_batch()
    agent.update(observations, actions, rewards * float("nan"), next_observations, terminated)
    with pytest.raises(SystemExit, match="loss became nan"):
        agent.metrics.means()


def test_update_leaves_the_target_network_alone():
    agent = make_agent()
    before = copy.deepcopy(agent.target_network.state_dict())
    agent.update(*random_batch())
    assert all(torch.equal(before[name], value) for name, value in agent.target_network.state_dict().items())
    agent.update_target()
    now = agent.q_network.state_dict()
    assert all(torch.equal(now[name], value) for name, value in agent.target_network.state_dict().items())


# ----------------------------------------------------------------------------------------- network and acting


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_network_has_a_distribution_for_every_action(precision):
    torch.manual_seed(0)
    agent = make_agent(4, v_min=-1.0, v_max=3.0, n_atoms=21, precision=precision)
    observations = random_batch()[0]
    for network in (agent.q_network, agent.target_network):
        logits = network(observations)
        assert (logits.shape, logits.dtype) == ((32, 4, 21), torch.float32)
        assert torch.equal(network.support, torch.linspace(-1, 3, 21)) and network.support.dtype == torch.float32
    exact = make_agent(4, v_min=-1.0, v_max=3.0, n_atoms=21).q_network(observations)
    logits = agent.q_network(observations)
    torch.testing.assert_close(logits, exact, rtol=0, atol=5e-3)
    assert not torch.equal(logits, logits.bfloat16().float())  # the output layer is exact


def test_acting_takes_the_highest_mean():
    """Not the most probable return: action 1 has the highest peak, action 2 the highest mean."""
    agent = make_agent(3, v_min=0.0, v_max=4.0, n_atoms=5)
    probabilities = torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1], [0.02, 0.02, 0.92, 0.02, 0.02], [0.3, 0, 0, 0.3, 0.4]])
    with torch.no_grad():
        agent.q_network.head.weight.zero_()
        agent.q_network.head.bias.copy_((probabilities + 1e-9).log().flatten())
    observations = random_batch(200)[0]
    assert agent.act(observations, torch.tensor(0.0)).tolist() == [2] * 200
    explored = torch.stack([agent.act(observations, torch.tensor(1.0)) for _ in range(5)]).flatten()
    assert torch.bincount(explored, minlength=3).min() > 250  # of 333 expected
    (support, shown), greedy = agent.think(observations[0])
    assert greedy == 2 and support.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(shown, probabilities, atol=1e-6)
    torch.testing.assert_close(agent.q_values(probabilities[None])[0], torch.tensor([1.2, 2, 2.5]))


def test_a_model_brings_its_support():
    """Whatever the flags say, probabilities belong to the returns that they were trained for."""
    state = copy.deepcopy(make_agent(v_max=3.0).q_network.state_dict())
    agent = make_agent(v_max=7.0)
    agent.q_network.load_state_dict(state)
    (support, _), _ = agent.think(random_batch(1)[0][0])
    assert (support[0], support[-1]) == (-10, 3)
    agent.update_target()
    assert agent.target_network.support[-1] == 3


# ------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"n_atoms": 1}, "--n-atoms is 1: it must be between 2 and 1,000"),
        ({"v_min": 0.0, "v_max": 0.49}, "--v-min 0.0 and --v-max 0.49 leave no room for --n-atoms 51"),
        ({"v_min": 3.0, "v_max": 3.0}, "--v-min 3.0 and --v-max 3.0 leave no room for --n-atoms 51"),
        ({"v_min": 4.0, "v_max": -4.0}, "--v-min 4.0 and --v-max -4.0 leave no room for --n-atoms 51"),
        ({"v_max": float("inf")}, "--v-max is inf: it must be between"),
        ({"v_min": -float("inf")}, "--v-min is -inf: it must be between"),
        ({"v_min": float("nan")}, "--v-min is nan: it must be between"),
    ],
)
def test_support_that_cannot_be_is_refused(flags, message):
    check_args(Args())
    check_args(Args(v_min=0.0, v_max=0.5))
    with pytest.raises(SystemExit, match=message):
        check_args(Args(**flags))


def test_settings_are_those_of_the_paper():
    args = Args()
    assert (args.n_atoms, args.v_min, args.v_max, args.learning_rate) == (51, -10, 10, 2.5e-4)
    assert (args.batch_size, args.target_network_frequency, args.gamma, args.train_frequency) == (32, 10_000, 0.99, 4)
    (group,) = make_agent().optimizer.param_groups
    assert (group["lr"], group["eps"]) == (2.5e-4, 0.01 / 32)
    assert make_agent(batch_size=64).optimizer.param_groups[0]["eps"] == 0.01 / 64
    assert {"n_atoms", "v_min", "v_max"} < set(c51_atari.FIXED_FLAGS)


# ---------------------------------------------------------------------------------------------------- overlay

GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}


class RecordedOverlay(Overlay):
    """Keeps what is written on the picture, with its place."""

    def render(self):
        self.texts = []
        return super().render()

    def text(self, text, x, y, *style, **options):
        self.texts.append((text, x, y))
        return super().text(text, x, y, *style, **options)


@functools.cache
def started_overlay(num_actions: int) -> tuple[RecordedOverlay, dict]:
    """An overlay of a game that has begun, and the game's state: to load a cartridge takes longer than most tests."""
    game, full = GAMES[num_actions]
    env = RecordedOverlay(Atari(Args(env_id=game, full_action_space=full)), "test", 0.01)
    env.reset(seed=1)
    assert env.action_space.n == num_actions
    return env, env.env.state_dict()


def make_overlay(num_actions: int) -> RecordedOverlay:
    """Each has the start of the game before it, and attributes of its own."""
    env, state = started_overlay(num_actions)
    env = copy.copy(env)
    env.env = copy.copy(env.env)
    env.env.load_state_dict(state)
    env.new_game()
    return env


def make_distributions(num_actions, support, center, spread, seed=0) -> np.ndarray:
    """Bumps around ``center`` that differ from action to action, each with a second, smaller one."""
    rng = np.random.default_rng(seed)
    at = center + spread * rng.normal(size=(2, num_actions, 1))
    bumps = np.exp(-(((support - at) / spread) ** 2))
    probabilities = bumps[0] + 0.3 * bumps[1] + 1e-6
    return (probabilities / probabilities.sum(1, keepdims=True)).astype(np.float32)


def shown_atoms(probabilities) -> range:
    """From the first atom to the last one to which an action gives 1 % of the highest probability, and one more."""
    highest = max(max(row) for row in probabilities.tolist())
    likely = [k for k, column in enumerate(probabilities.T.tolist()) if max(column) >= 0.01 * highest]
    return range(max(likely[0] - 1, 0), min(likely[-1] + 1, len(probabilities[0]) - 1) + 1)


def matches(picture, color) -> np.ndarray:
    return (picture.astype(int) == color).all(-1)


SHAPES = [
    # support, center and spread of the distributions
    ((-10, 10, 51), 1.5, 0.5),
    ((-10, 10, 51), 0.0, 40.0),
    ((-10, 10, 51), -9.5, 0.6),
    ((-10, 10, 51), 9.9, 0.01),
    ((-1e5, 1e5, 51), 3e4, 1e4),
    ((-0.002, 0.001, 7), 0, 0.001),
    ((900, 901, 2), 900.5, 0.3),
    ((0, 1, 101), 0.5, 0.05),
]


@pytest.mark.parametrize("num_actions", [3, 6, 18])
@pytest.mark.parametrize("support, center, spread", SHAPES)
def test_histograms_show_the_distributions(num_actions, support, center, spread):
    """Every bar's height, read off the picture, is its probability; colors, means and the axis are right as well."""
    env, support = make_overlay(num_actions), np.linspace(*support, dtype=np.float32)
    probabilities = make_distributions(num_actions, support, center, spread)
    means = (probabilities * support).sum(1)
    env.note((support, probabilities), int(means.argmin()))
    picture = env.render()
    atoms, pitch = shown_atoms(probabilities), 310 // num_actions
    spacing = (float(support[-1]) - float(support[0])) / (len(support) - 1)
    edge = float(support[0]) + (atoms[0] - 0.5) * spacing

    def place(value):
        return 634 + 220 * (value - edge) / (len(atoms) * spacing)

    for i in range(num_actions):
        foot = 104 + (i + 1) * pitch - 3
        row = picture[foot - pitch + 6 : foot + 1]
        color = GREEDY if i == means.argmax() else BAR
        mean = place(float(means[i]))
        for k in atoms:
            x = 634 + 220 * (k - atoms[0] + 0.5) / len(atoms)
            if abs(x - mean) > 3:
                expected = (pitch - 6) * probabilities[i, k] / probabilities[:, atoms[0] : atoms[-1] + 1].max()
                assert matches(row[:, int(x)], color).sum() - 1 == pytest.approx(expected, abs=0.51)
        marked = np.flatnonzero(matches(row[:, 630:860], TEXT).all(0)) + 630
        assert marked.tolist() == [pytest.approx(mean, abs=1), pytest.approx(mean + 1, abs=1)]
        written = [text for text, x, y in env.texts if abs(y - (foot - pitch // 2 + 7)) <= 8]
        assert env.env.action_names[i] in written and number(means[i]) in written
    labels = [(float(text), x + 4 * len(text), x) for text, x, y in env.texts if y == 104 + num_actions * pitch + 16
              and text != "future return"]  # fmt: skip
    assert 2 <= len(labels) <= 6
    lines = np.flatnonzero(matches(picture[104 + pitch - 2], GRID)[600:900]) + 600  # between two rows
    assert [x for _, x, _ in labels] == [pytest.approx(place(value), abs=0.51) for value, _, _ in labels]
    if means.argmin() != 0 and means.argmin() != 1:  # no frame there
        assert lines.tolist() == [x for _, x, _ in labels]
    assert all(x + 9 * len(f"{value:g}") <= after for (value, _, x), (_, _, after) in zip(labels, labels[1:]))


@pytest.mark.parametrize("num_actions", [3, 6, 18])
def test_distributions_that_say_nothing_are_drawn(num_actions):
    """Equal ones, all mass on one atom and, from a network that diverged, nan."""
    env, support = make_overlay(num_actions), np.linspace(-10, 10, 51, dtype=np.float32)
    row = slice(107, 104 + 310 // num_actions - 2)  # of the first action
    env.note((support, np.full((num_actions, 51), 1 / 51, np.float32)), 1)
    assert matches(env.render()[row], GREEDY)[:, 634:855].mean() > 0.95
    for atom in (0, 25, 50):
        env.new_game()
        env.note((support, np.tile(np.eye(51, dtype=np.float32)[atom], (num_actions, 1))), 1)
        full = matches(env.render()[row], GREEDY)[:, 634:855].all(0)
        assert full.sum() == pytest.approx(220 / (3 if atom == 25 else 2), abs=4)
    probabilities = make_distributions(num_actions, support, 0, 1)
    probabilities[1] = np.nan
    env.new_game()
    env.note((support, probabilities), 0)
    picture = env.render()
    assert ("nan", 936) in [(text, x) for text, x, _ in env.texts]
    assert not matches(picture[104 + 310 // num_actions + 3 : 104 + 2 * (310 // num_actions) - 4, 634:855], BAR).any()
    env.note((support, np.full((num_actions, 51), np.nan)), 0)
    env.render()
    assert [text for text, _, y in env.texts if y == 104 + 310 // num_actions * num_actions + 16] == [
        "future return", "-10", "-5", "0", "5", "10"]  # fmt: skip


def test_axis_is_steady():
    """It spans what was likely in the last 150 states of this game, so that it does not jump from frame to frame."""
    env, support = make_overlay(3), np.linspace(-10, 10, 51, dtype=np.float32)

    def labels(center):
        env.note((support, make_distributions(3, support, center, 0.3)), 0)
        env.render()
        return [float(text) for text, _, y in env.texts if y == 104 + 309 + 16 and text != "future return"]

    assert min(labels(0)) > -2
    assert min(labels(-8)) == -5
    for _ in range(149):
        assert min(labels(0)) == -5
    assert min(labels(0)) > -2
    labels(-8)
    env.env.game_ended = True
    env.reset()
    assert min(labels(0)) > -2


def test_chosen_and_exploring_are_marked():
    env, support = make_overlay(6), np.linspace(-10, 10, 51, dtype=np.float32)
    probabilities = make_distributions(6, support, 0, 1)
    greedy = int((probabilities * support).sum(1).argmax())
    for action in range(6):
        env.note((support, probabilities), action)
        picture = env.render()
        frame = np.flatnonzero(matches(picture[104:414, 620:885], CHOSEN).any(1))
        assert frame.mean() // 51 == action and len(frame) == pytest.approx(51, abs=2)
        assert ("exploring" in [text for text, _, _ in env.texts]) == (action != greedy)


def test_trace_is_the_highest_mean():
    env, support = make_overlay(3), np.linspace(-10, 10, 51, dtype=np.float32)
    for seed in range(20):
        probabilities = make_distributions(3, support, seed / 10, 1, seed)
        env.note((support, probabilities), 0)
        assert env.values[-1] == pytest.approx(max(row @ support for row in probabilities))


def test_nothing_overlaps():
    """With 18 actions and the widest texts, each column and block of the panel keeps a gap to the next one."""
    env, support = make_overlay(18), np.linspace(-1e5, -9e4, 51, dtype=np.float32)
    for center in (-98_000, -95_000):
        env.note((support, make_distributions(18, support, center, 3_000)), 3)
    env.notice = "the video is cut here"
    env.env.episode_return, env.env.episode_length = 1_234_567, 26_999
    picture = env.render().astype(int)
    panel = np.abs(picture[:, 480:] - (18, 19, 23)).sum(2) > 60
    assert not panel[:, :20].any() and not panel[:, -20:].any()
    assert not panel[104:408, 144:148].any()  # between names and histograms
    assert not panel[104:408, 380:384].any()  # between histograms and means
    assert not panel[94:103].any() and not panel[428:432].any() and not panel[552:562].any()  # between blocks
    for title in (panel[22:46], panel[78:95], panel[440:457]):  # between title and legend and what is at the right
        assert np.diff(np.flatnonzero(title.any(0))).max() > 14


def test_the_end_of_a_game_has_no_distributions():
    env, support = make_overlay(6), np.linspace(-10, 10, 51, dtype=np.float32)
    env.env.max_episode_frames = 1
    env.note((support, make_distributions(6, support, 0, 1)), 3)
    env.step(3)
    picture = env.render()
    assert "cut off at the frame limit" in [text for text, _, _ in env.texts]
    assert not any(matches(picture[:430], color).any() for color in (GREEDY, CHOSEN, BAR))


# ------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_update_equals_plain_update(precision):
    """100 updates on the same batches: parameters and metrics agree within float32 rounding."""
    device = torch.device("cuda")
    plain, captured = (make_agent(4, device, precision=precision) for _ in range(2))
    update = CudaGraph(captured.update)
    batch = [x.to(device) for x in random_batch(num_actions=4)]
    for step in range(100):
        batch[2] = torch.full_like(batch[2], (step % 7) / 7)
        plain.update(*batch)
        update(*batch)
    assert update.graph is not None
    assert captured.metrics.means() == pytest.approx(plain.metrics.means(), rel=1e-3, abs=1e-6)
    for a, b in zip(plain.q_network.parameters(), captured.q_network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)


@pytest.mark.gpu
def test_projection_and_means_are_float32_on_cuda():
    """Also where matrix products are TF32, as ``train`` sets them, whose rounding is a thousandth."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        support, probabilities = torch.linspace(-10, 10, 51), torch.rand(32, 51).softmax(1)
        inputs = probabilities, torch.randn(32), torch.full((32,), 0.99), support
        projected = project(*(x.cuda() for x in inputs))
        np.testing.assert_allclose(projected.cpu(), project_by_loops(*inputs), atol=1e-6)
        means = make_agent(1, torch.device("cuda")).q_values(probabilities.cuda()[:, None]).squeeze(1)
        torch.testing.assert_close(means.cpu().double(), probabilities.double() @ support.double(), rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
def test_captured_acting_follows_epsilon():
    agent = make_agent(4, torch.device("cuda"))
    observations = random_batch(200)[0].cuda()
    act, epsilon = CudaGraph(agent.act), torch.zeros((), device="cuda")
    greedy = agent.q_values(agent.q_network(observations).softmax(2)).argmax(1)
    for _ in range(5):
        assert torch.equal(act(observations, epsilon), greedy)
    epsilon.fill_(1.0)
    assert torch.bincount(act(observations, epsilon), minlength=4).min() > 20
