"""Bootstrapped DQN's masks, priors, heads, update, votes and overlay against direct computations."""

import copy
import functools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import HAS_BFLOAT16, Naive, drawn_texts, random_batch, state_frame, with_small_trunk

import bootstrapped_dqn_atari
import dqn_atari
from bootstrapped_dqn_atari import (
    CHOSEN,
    GAIN,
    GREEDY,
    GROUND,
    HIGHEST,
    HISTORY,
    LOSS,
    LOWEST,
    MAX_HEADS,
    QUIET,
    SIZE,
    VOTE,
    ActingHeads,
    Agent,
    Args,
    Atari,
    AtariVector,
    CudaGraph,
    Overlay,
    QNetwork,
    Replay,
    check_args,
    decide,
    model,
    train,
)

CPU = torch.device("cpu")


def make_agent(num_actions=2, device=CPU, **flags):
    torch.manual_seed(0)
    return Agent(Args(**({"precision": "float32", "num_heads": 3} | flags)), num_actions, device)


def masked_batch(num_heads, num_actions=2, size=32, probability=0.7):
    """A random batch with discounts and masks; the first transition belongs to no head, the second to all."""
    generator = torch.Generator().manual_seed(4)
    masks = torch.rand(size, num_heads, generator=generator) < probability
    masks[0], masks[1] = False, True
    *batch, terminated = random_batch(size, num_actions)
    return *batch, torch.rand(size, generator=generator) * ~terminated, masks


def make_replay(capacity: int, device=CPU, **flags) -> Replay:
    """Of two environments; 9 heads learn from every second transition unless flags say otherwise."""
    flags = {"num_heads": 9, "mask_probability": 0.5} | flags
    return Replay(Args(num_envs=2, buffer_size=capacity, **flags), device)


def with_other_target(agent):
    """The agent, its target network no longer equal to its network: every kind of weight differs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in agent.target_network.named_parameters():
            if not name.startswith("prior"):
                parameter += parameter.std() * torch.randn(parameter.shape, generator=generator)
    return agent


# ------------------------------------------------------------------------------------------- network and prior


def plain_heads(network: QNetwork, observation: torch.Tensor) -> torch.Tensor:
    """Q-values float64 [heads, actions] of one observation, head by head, without the prior."""
    actions = network.heads.out_features // network.num_heads
    features = network.trunk(observation[None].double() / 255)[0]
    rows = [slice(k * actions, (k + 1) * actions) for k in range(network.num_heads)]
    return torch.stack([network.heads.weight[row] @ features + network.heads.bias[row] for row in rows])


@pytest.mark.parametrize("prior_scale", [0.0, 10.0])
def test_q_values_are_the_heads_plus_the_scaled_prior(prior_scale):
    agent = with_other_target(make_agent(4, prior_scale=prior_scale))
    observations = random_batch(5)[0]
    for network in (agent.q_network, agent.target_network):
        exact, q_values = copy.deepcopy(network).double(), network(observations)
        assert q_values.shape == (5, 3, 4) and q_values.dtype == torch.float32
        for observation, found in zip(observations, q_values):
            expected = plain_heads(exact, observation)
            if prior_scale:
                expected = expected + prior_scale * plain_heads(exact.prior, observation)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (agent.q_network.prior is None) == (prior_scale == 0)


def test_prior_is_frozen_shared_and_saved():
    agent = make_agent(4, learning_rate=1e-2)
    assert agent.q_network.prior is agent.target_network.prior
    assert not torch.equal(agent.q_network.prior.heads.weight, agent.q_network.heads.weight)
    before = copy.deepcopy(agent.q_network.state_dict())
    batch = masked_batch(3, 4)
    for _ in range(3):
        agent.update(*batch)
        agent.update_target()
    assert all(parameter.grad is None for parameter in agent.q_network.prior.parameters())
    for name, value in agent.q_network.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith("prior."), name
    trained = sum(1 for parameter in agent.q_network.parameters() if parameter in agent.optimizer.state)
    assert trained == 10  # 3 convolutions, the hidden layer and the heads, weights and biases

    torch.manual_seed(99)
    other = Agent(Args(precision="float32", num_heads=3), 4, CPU)
    other.q_network.load_state_dict(model(Args(), agent, 0)["agent"]["q_network"])
    assert torch.equal(other.q_network(batch[0]), agent.q_network(batch[0]))
    assert not any(name.startswith("prior") for name in make_agent(prior_scale=0).q_network.state_dict())


def test_checkpoint_restores_the_agent(tmp_path):
    """Through a file, as --resume does: values, target, optimizer and sums are the same, and so is the next update."""
    agent = with_other_target(make_agent(precision="bfloat16"))
    batch = masked_batch(3, size=4)
    agent.update(*batch)
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    torch.manual_seed(99)
    other = Agent(Args(precision="bfloat16", num_heads=3), 2, CPU)
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True, mmap=True))
    for _ in range(2):
        for name, value in agent.state_dict()["q_network"].items():
            assert torch.equal(value, other.q_network.state_dict()[name]), name
        assert torch.equal(agent.target_network(batch[0]), other.target_network(batch[0]))
        assert agent.metrics.sums.keys() == other.metrics.sums.keys()
        assert all(torch.equal(sums, other.metrics.sums[name]) for name, sums in agent.metrics.sums.items())
        agent.update(*batch)
        other.update(*batch)


def test_bfloat16_trunk_stays_close_to_float32():
    agents = [make_agent(precision=precision) for precision in ("float32", "bfloat16")]
    one, half = (agent.q_network(random_batch()[0]) for agent in agents)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, one, rtol=0, atol=0.05)  # the prior's error is scaled by 10


def test_settings_are_those_of_the_docstring():
    args = Args()
    assert (args.num_heads, args.mask_probability, args.prior_scale, args.max_grad_norm) == (9, 0.9, 10, 5)
    assert (args.learning_rate, args.target_network_frequency, args.n_step) == (6.25e-5, 10_000, 1)


# ------------------------------------------------------------------------------------------------------ update


def direct_update(agent, batch, prior_scale) -> tuple[torch.Tensor, dict, list]:
    """Loss, gradients by name and mean losses of the heads, in float64, one transition and head at a time."""
    network, target = copy.deepcopy(agent.q_network).double(), copy.deepcopy(agent.target_network).double()
    num_heads = network.num_heads

    def values(model, observation):
        learned = plain_heads(model, observation)
        return learned + prior_scale * plain_heads(network.prior, observation) if prior_scale else learned

    loss, head_losses = 0.0, [[] for _ in range(num_heads)]
    for observation, action, reward, next_observation, discount, mask in zip(*batch):
        q_values = values(network, observation)
        for head in range(num_heads):
            best = values(network, next_observation)[head].argmax()
            td_target = reward + discount * values(target, next_observation)[head][best].detach()
            if mask[head]:
                squared = (q_values[head, action] - td_target) ** 2
                loss = loss + squared
                head_losses[head].append(squared.item())
    loss = loss / sum(map(len, head_losses))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    for name in gradients:
        if name.startswith("trunk"):
            gradients[name] /= num_heads
    return loss, gradients, [np.mean(squares) for squares in head_losses]


@pytest.mark.parametrize("prior_scale, max_grad_norm", [(10.0, 1e9), (10.0, 0.05), (0.0, 1e9)])
def test_update_is_the_formula(prior_scale, max_grad_norm):
    """Loss, each head's loss, gradients, their clipping and Adam's step, with masks, prior and double Q-learning."""
    agent = with_other_target(make_agent(prior_scale=prior_scale, max_grad_norm=max_grad_norm))
    before, batch = copy.deepcopy(agent.q_network), masked_batch(3, size=8)
    best, best_of_target = (network(batch[3]).argmax(2) for network in (agent.q_network, agent.target_network))
    assert (best != best_of_target).any()  # else this could not tell double from plain Q-learning
    loss, gradients, head_losses = direct_update(agent, batch, prior_scale)
    agent.update(*batch)
    found = dict(agent.q_network.named_parameters())
    norm = math.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))
    assert norm > 0.1  # so that the small limit shortens the gradient and the large one does not
    factor = min(1, max_grad_norm / norm)
    assert {name for name in found if found[name].grad is not None} == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name].grad.double(), factor * gradient, rtol=1e-3, atol=2e-6 * factor)
        step = found[name].grad / (found[name].grad.abs() + 1e-8)  # Adam's first
        expected = before.get_parameter(name).detach() - 6.25e-5 * step
        torch.testing.assert_close(found[name].detach(), expected, rtol=0, atol=1e-7)
    metrics = agent.metrics.take()
    assert metrics["td_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert [metrics[f"td_loss_head_{head}"] for head in range(3)] == pytest.approx(head_losses, rel=1e-4)


def test_head_that_a_transition_does_not_belong_to_learns_nothing():
    agent = make_agent()
    batch = masked_batch(3)
    batch[-1][:] = torch.tensor([True, False, True])
    agent.update(*batch)
    untouched = agent.q_network.heads.weight.grad.view(3, 2, 512).abs().sum((1, 2)) == 0
    assert untouched.tolist() == [False, True, False]
    metrics = agent.metrics.take()
    assert [metrics[f"td_loss_head_{head}"] == 0 for head in range(3)] == untouched.tolist()
    batch[-1][:] = False
    before = copy.deepcopy(agent.q_network.state_dict())
    agent.optimizer = torch.optim.SGD(agent.q_network.parameters(), 1.0)  # Adam would go on by its momentum
    agent.update(*batch)
    assert all(torch.equal(before[name], value) for name, value in agent.q_network.state_dict().items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_head_without_masks_and_prior_is_double_dqn(precision):
    """Five updates and a target copy equal those of dqn_atari.py's network with a double-Q target, written out here."""
    agent = make_agent(4, num_heads=1, prior_scale=0, max_grad_norm=1e9, precision=precision, learning_rate=1e-3)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    network = dqn_atari.QNetwork(4, dtype).to(memory_format=torch.channels_last)
    target = dqn_atari.QNetwork(4, dtype).to(memory_format=torch.channels_last)
    weights = {name.replace("heads", "head"): value for name, value in agent.q_network.state_dict().items()}
    network.load_state_dict(weights)
    target.load_state_dict(weights)
    target.trunk.to(dtype)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    replay = make_replay(200, num_heads=1, mask_probability=1.0)
    for _ in range(60):
        frames = torch.randint(0, 256, (2, SIZE, SIZE), dtype=torch.uint8)
        ends = torch.rand(2)
        replay.add(frames, torch.randint(4, (2,)), torch.randn(2), ends < 0.1, ends > 0.95)
    for update in range(5):
        batch = replay.sample(8)
        assert batch.masks.all()
        agent.update(*batch)
        observations, actions, rewards, next_observations, discounts, _ = batch
        with torch.no_grad():
            best = network(next_observations).argmax(1, keepdim=True)
            next_values = target(next_observations).gather(1, best).squeeze(1)
            td_target = rewards + torch.where(discounts == 0, 0.0, 0.99 * next_values)
        loss = F.mse_loss(network(observations).gather(1, actions[:, None]).squeeze(1), td_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update == 1:
            agent.update_target()
            target.load_state_dict(network.state_dict())
        assert agent.metrics.take()["td_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(agent.q_network.parameters(), network.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    actions = agent.act(observations, torch.tensor(0.0), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(actions, network(observations).argmax(1))


@pytest.mark.slow
def test_every_head_converges_to_value_iteration(monkeypatch):
    """A corridor of five states shown as pictures; all heads, each with its prior, find the values of its best policy.

    Left and right move; right in the last state ends the episode with reward 1; left in the first costs 0.5. Episodes
    are cut off at random, which must not change the values.
    """
    num_states, gamma = 5, 0.8

    def step(state, action):
        """Next state, reward, terminated."""
        if action == 1:
            return (state, 1.0, True) if state == num_states - 1 else (state + 1, 0.0, False)
        return (0, -0.5, False) if state == 0 else (state - 1, 0.0, False)

    expected = np.zeros((num_states, 2))
    for _ in range(200):
        for state in range(num_states):
            for action in range(2):
                next_state, reward, terminated = step(state, action)
                expected[state, action] = reward + (0 if terminated else gamma * expected[next_state].max())

    precision = "bfloat16" if HAS_BFLOAT16 else "float32"
    monkeypatch.setattr(bootstrapped_dqn_atari, "QNetwork", with_small_trunk(QNetwork))
    agent = make_agent(learning_rate=1e-3, precision=precision, gamma=gamma)
    replay = make_replay(4000, num_heads=3, mask_probability=0.7, gamma=gamma)
    rng, states = np.random.default_rng(0), [0, 2]
    for _ in range(1500):
        actions = rng.integers(2, size=2)
        outcomes = [step(state, action) for state, action in zip(states, actions)]
        terminated = np.array([outcome[2] for outcome in outcomes])
        truncated = (rng.random(2) < 0.2) & ~terminated
        frames = torch.stack([state_frame(state) for state in states])
        rewards = torch.tensor([outcome[1] for outcome in outcomes])
        replay.add(frames, torch.tensor(actions), rewards, torch.tensor(terminated), torch.tensor(truncated))
        ended = terminated | truncated
        states = [int(rng.integers(num_states)) if end else outcome[0] for end, outcome in zip(ended, outcomes)]

    for update in range(500):
        agent.update(*replay.sample(32))
        if update % 25 == 0:
            agent.update_target()
    batch = replay.sample(256)
    with torch.no_grad():
        q_values = agent.q_network(batch.observations).numpy()
    in_state = batch.observations[:, -1].float().mean(1).argmax(1).numpy() // 16
    learned = np.stack([q_values[in_state == state].mean(0) for state in range(num_states)])
    for head in range(3):
        np.testing.assert_allclose(learned[:, head], expected, atol=0.02)


def test_metrics_are_means_over_the_updates():
    agent, updates = make_agent(3), []
    assert agent.metrics.take() == {}
    for size in (8, 12):
        batch = masked_batch(3, 3, size)
        with torch.no_grad():
            q_values = agent.q_network(batch[0]).double()
        loss, _, head_losses = direct_update(agent, batch, prior_scale=10.0)
        agent.update(*batch)
        taken = [q_values[i, :, action].mean().item() for i, action in enumerate(batch[1])]
        spread = [q_values[i, :, a].std(correction=0).item() for i in range(size) for a in range(3)]
        share = [torch.bincount(q_values[i].argmax(1)).max().item() / 3 for i in range(size)]
        spread_of_losses = np.std(head_losses)
        updates.append([loss.item(), np.mean(taken), np.mean(spread), np.mean(share), spread_of_losses, *head_losses])
    names = ["td_loss", "q_values", "q_values_std", "vote_share", "td_loss_std"]
    names += [f"td_loss_head_{head}" for head in range(3)]
    assert agent.metrics.take() == pytest.approx(dict(zip(names, np.mean(updates, axis=0))), rel=1e-3)
    assert agent.metrics.take() == {}


def test_loss_that_is_not_finite_ends_the_run():
    agent = make_agent()
    observations, actions, rewards, *rest = masked_batch(3)
    agent.update(observations, actions, rewards * float("nan"), *rest)
    with pytest.raises(SystemExit, match="td_loss became nan"):
        agent.metrics.means()


# ------------------------------------------------------------------------------------------------------- masks


def fill(replay, steps, first=0):
    """Stores steps whose frames and rewards tell them apart; the same for every kind of replay."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        frames = torch.randint(0, 256, (2, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        ends = torch.rand(2, generator=generator)
        rewards = torch.tensor([2.0 * step, 2.0 * step + 1])
        replay.add(frames, torch.tensor([step % 5, 1]), rewards, ends < 0.1, ends > 0.95)


def test_samples_equal_those_of_the_plain_replay():
    """With the same random state both draw the same transitions; masks come on top."""
    plain, masked = dqn_atari.Replay(70, 2, CPU), make_replay(70)
    for steps in (20, 60):
        fill(plain, steps, plain.num_steps)
        fill(masked, steps, masked.num_steps)
        torch.manual_seed(3)
        expected = plain.sample(64)
        torch.manual_seed(3)
        batch = masked.sample(64)
        assert batch.masks.shape == (64, 9) and batch.masks.dtype == torch.bool
        assert torch.equal(batch.discounts, 0.99 * ~expected.terminated)
        names = ("observations", "actions", "next_observations")
        assert all(torch.equal(getattr(batch, name), getattr(expected, name)) for name in names)
        assert torch.equal(batch.returns, expected.rewards)


@pytest.mark.parametrize("n_step", [1, 3, 7])
def test_returns_and_states_n_steps_later_are_the_direct_ones(n_step):
    """Against a list of whole transitions, over the end of the ring; exactly those that are valid are drawn."""
    rng = np.random.default_rng(n_step)
    torch.manual_seed(0)
    replay = make_replay(60, n_step=n_step, gamma=0.9)
    naive = [Naive(n_step, 0.9) for _ in range(2)]
    for step in range(75):
        frames = rng.integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
        frames[:, 0, 0] = [0, 1]  # tags that tell the transition drawn
        frames[:, 0, 1] = step
        actions = rng.integers(0, 18, 2)
        rewards = rng.normal(size=2).astype(np.float32)
        terminated = rng.random(2) < 0.15
        truncated = ~terminated & (rng.random(2) < 0.1)
        for env in range(2):
            naive[env].add(frames[env], actions[env], rewards[env], terminated[env], truncated[env])
        replay.add(*map(torch.from_numpy, (frames, actions, rewards, terminated, truncated)))
        if step not in (12, 29, 30, 74):
            continue
        stored = range(max(0, step + 1 - 30 + HISTORY), step + 1 - n_step)
        transitions = {(env, t): naive[env].transition(t) for env in range(2) for t in stored}
        valid = {place: transition for place, transition in transitions.items() if transition is not None}
        batch = replay.sample(1280)
        drawn = [tuple(tags) for tags in batch.observations[:, -1, 0, :2].tolist()]
        assert set(drawn) == set(valid)
        stacks, actions, returns, next_stacks, discounts = zip(*(valid[place] for place in drawn))
        running = [i for i, next_stack in enumerate(next_stacks) if next_stack is not None]
        assert np.array_equal(batch.observations, np.stack(stacks))
        assert batch.actions.tolist() == list(actions)
        np.testing.assert_allclose(batch.returns, returns, rtol=0, atol=1e-6)
        np.testing.assert_allclose(batch.discounts, discounts, rtol=1e-6)
        assert np.array_equal(batch.next_observations[running], np.stack([next_stacks[i] for i in running]))


@pytest.mark.parametrize("num_heads", [1, 9, 31])
def test_a_transition_keeps_the_masks_it_was_stored_with(num_heads):
    """Also when older ones are overwritten: what is drawn is what the random numbers at storing said."""
    replay, stored = make_replay(70, num_heads=num_heads), {}
    for step in range(100):
        torch.manual_seed(1000 + step)
        fill(replay, 1, step)
        torch.manual_seed(1000 + step)
        for env, mask in enumerate(torch.rand(2, num_heads) < 0.5):
            stored[2 * step + env] = mask
    drawn = set()
    for _ in range(20):
        batch = replay.sample(64)
        for reward, mask in zip(batch.returns.tolist(), batch.masks):
            assert torch.equal(mask, stored[int(reward)])
            drawn.add(int(reward))
    assert len(drawn) > 50


@pytest.mark.parametrize("probability", [1e-12, 0.3, 0.9, 1.0])
def test_masks_are_independent_with_the_given_probability(probability):
    torch.manual_seed(0)
    replay = make_replay(8000, num_heads=4, mask_probability=probability)
    zeros = torch.zeros(2)
    for _ in range(4000):
        replay.add(torch.zeros(2, SIZE, SIZE), zeros, zeros, zeros.bool(), zeros.bool())
    masks = replay.masks.float()
    assert masks.mean(0).tolist() == pytest.approx([probability] * 4, abs=0.02)
    if 0.1 < probability < 1:
        together = torch.corrcoef(torch.cat([masks.T, masks.roll(1, 0).T]))  # heads, and neighbours in the replay
        assert (together - torch.eye(8)).abs().max() < 0.05


def test_replay_survives_a_checkpoint(tmp_path):
    """A restored replay has the same masks and, with the random state, goes on drawing the same ones."""
    replay, other = (make_replay(70, num_heads=MAX_HEADS) for _ in range(2))
    for steps in (20, 80):
        fill(replay, steps, replay.num_steps)
        torch.save(replay.state_dict(), tmp_path / "replay.pt")
        other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True, mmap=True))
        assert replay.masks.any() and torch.equal(replay.masks, other.masks)
        batches = []
        for r in (replay, other):
            torch.manual_seed(5)
            fill(r, 3, r.num_steps)
            batches.append(r.sample(64))
        assert all(torch.equal(a, b) for a, b in zip(*batches))
    size = replay.state_dict()["masks"].nbytes + SIZE * SIZE * 70 + 70 + 4 * 70 + 70
    assert size == 70 * bootstrapped_dqn_atari.BYTES_PER_TRANSITION


# ------------------------------------------------------------------------------------------ acting and voting


def test_every_environment_follows_its_head():
    agent = make_agent(4)
    observations = random_batch(200)[0]
    q_values = agent.q_network(observations)
    for first_head in range(3):
        heads = (torch.arange(200) + first_head) % 3
        greedy = torch.tensor([q_values[i, head].argmax() for i, head in enumerate(heads.tolist())])
        assert torch.equal(agent.act(observations, torch.tensor(0.0), heads), greedy)
    assert any((q_values.argmax(2) != greedy[:, None]).any(1))
    explored = torch.stack([agent.act(observations, torch.tensor(1.0), heads) for _ in range(5)]).flatten()
    assert torch.bincount(explored, minlength=4).min() > 180  # of 250 expected
    half = torch.stack([agent.act(observations, torch.tensor(0.5), heads) == greedy for _ in range(5)]).float().mean()
    assert half.item() == pytest.approx(0.5 + 0.5 / 4, abs=0.06)


@pytest.mark.slow
def test_heads_change_when_games_end_and_only_then(monkeypatch, tmp_path):
    """A real run with lost lives, games that end and games that are cut off; 31 heads, so that most draws are others.

    Also what is logged of each game, and that a resumed run goes on with the heads that the checkpoint has.
    """
    acting, ended, lives_lost, cut_off, logged = [], [], [], 0, []
    plain_act, plain_recv = Agent.act, AtariVector.recv

    def act(self, observations, epsilon, heads):
        acting.append(heads.tolist())
        return plain_act(self, observations, epsilon, heads)

    def recv(self):
        nonlocal cut_off
        result = plain_recv(self)
        cut_off += result[3].sum()
        ended.append({game["env"]: game for game in result[-1]})
        lives_lost.append([env for env in np.flatnonzero(result[2]) if env not in ended[-1]])
        return result

    tracker = Mock(run_id="run", log=lambda metrics, global_step: logged.append(metrics))
    monkeypatch.setattr(Agent, "act", act)
    monkeypatch.setattr(AtariVector, "recv", recv)
    monkeypatch.setattr(bootstrapped_dqn_atari, "Tracker", lambda *_, **flags: tracker)
    monkeypatch.setattr(bootstrapped_dqn_atari, "QNetwork", with_small_trunk(QNetwork))
    monkeypatch.setattr(bootstrapped_dqn_atari, "evaluate", lambda *arguments, **flags: None)
    args = Args(env_id="Breakout", num_envs=3, batch_size=8, precision="float32", num_heads=31, num_workers=0)
    args.total_timesteps, args.learning_starts, args.buffer_size, args.start_e = 2400, 2399, 2400, 1.0
    args.end_e, args.max_episode_frames = 1.0, 600
    assert train(args, CPU, tmp_path, None) == 0
    draws = []
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved = checkpoint["heads"]["of_env"].tolist()
    for step, after in enumerate([*acting[1:], saved]):
        for env, head in enumerate(acting[step]):
            if env in ended[step]:
                draws.append((head, after[env]))
            else:
                assert after[env] == head
    assert sum(map(len, lives_lost)) > len(draws) > cut_off > 2
    assert np.mean([old != new for old, new in draws]) > 0.7
    assert len({new for _, new in draws}) > 5 and all(0 <= new < 31 for _, new in draws)
    heads_logged = [metrics for metrics in logged if any(name.startswith("heads/") for name in metrics)]
    assert heads_logged == [
        {f"heads/episodic_return_{acting[step][env]}": game["r"] for env, game in some.items()}
        for step, some in enumerate(ended)
        if some
    ]
    charts = [metrics["charts/episodic_return"] for metrics in logged if "charts/episodic_return" in metrics]
    assert charts == [np.mean([game["r"] for game in some.values()]) for some in ended if some]
    acting.clear()
    args.total_timesteps += 30
    assert train(args, CPU, tmp_path, tmp_path / "checkpoint.pt") == 0
    assert acting[0] == saved


def test_games_of_a_head_that_end_together_are_averaged(monkeypatch, tmp_path):
    """W&B keeps one number a step."""
    logged, plain_recv = [], AtariVector.recv

    def recv(self):
        game = {"l": 1, "repeated_rewards": 0.0}
        return *plain_recv(self)[:-1], [game | {"env": 0, "r": 10.0}, game | {"env": 1, "r": 20.0}]

    tracker = Mock(run_id="run", log=lambda metrics, global_step: logged.append(metrics))
    monkeypatch.setattr(AtariVector, "recv", recv)
    monkeypatch.setattr(bootstrapped_dqn_atari, "Tracker", lambda *_, **flags: tracker)
    monkeypatch.setattr(bootstrapped_dqn_atari, "QNetwork", with_small_trunk(QNetwork))
    monkeypatch.setattr(bootstrapped_dqn_atari, "evaluate", lambda *arguments, **flags: None)
    args = Args(env_id="Breakout", num_envs=2, num_heads=1, num_workers=0, total_timesteps=2, buffer_size=2000)
    assert train(args, CPU, tmp_path, None) == 0
    assert {"heads/episodic_return_0": 15.0} in logged


def test_first_heads_follow_the_seed_and_cover_all():
    """Every head gets its games, the first and the later ones: drawn uniformly."""
    torch.manual_seed(0)
    draws = torch.cat([ActingHeads(9, 8, CPU).of_env for _ in range(500)])
    assert torch.bincount(draws, minlength=9).min() > 380
    heads, draws = ActingHeads(9, 2, CPU), []
    first = heads.of_env[0].item()
    for _ in range(4000):
        heads.draw(1)
        draws.append(heads.of_env[1].item())
    assert np.bincount(draws, minlength=9).min() > 380
    assert heads.of_env[0] == first


def test_acting_heads_survive_a_checkpoint():
    heads, other = ActingHeads(9, 100, CPU), ActingHeads(9, 100, CPU)
    assert not torch.equal(heads.of_env, other.of_env)
    other.load_state_dict(copy.deepcopy(heads.state_dict()))
    assert torch.equal(heads.of_env, other.of_env)
    with pytest.raises(ValueError, match=r"no torch.int64 \[99\]"):
        ActingHeads(9, 99, CPU).load_state_dict(heads.state_dict())


def test_majority_wins_and_the_mean_breaks_ties():
    """Against the plainest count, for random Q-values whose scale differs between heads."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_heads, num_actions = rng.integers(1, 10), rng.integers(2, 6)
        q_values = (rng.normal(size=(num_heads, num_actions)) * rng.exponential(size=(num_heads, 1))).astype(np.float32)
        best = [max(range(num_actions), key=lambda a: row[a]) for row in q_values]  # noqa: B023
        counts = [best.count(action) for action in range(num_actions)]
        most = [action for action in range(num_actions) if counts[action] == max(counts)]
        winner = max(most, key=lambda a: q_values[:, a].sum())  # noqa: B023
        votes, action = decide(q_values, None)
        assert (votes.tolist(), action) == (counts, winner)
        for head in range(num_heads):
            assert decide(q_values, head)[1] == best[head]
    tie = np.array([[3.0, 1, 0], [0, 2, 0], [1, 0, 9]], np.float32)
    assert decide(tie, None)[1] == 2  # one vote each, means 4/3, 1 and 3
    majority = np.array([[1.0, 0], [1, 0], [0, 100]], np.float32)
    assert decide(majority, None)[1] == 0


@pytest.mark.parametrize("eval_head", [None, 0, 2])
def test_evaluation_follows_the_vote_or_one_head(eval_head):
    agent = make_agent(4, eval_head=eval_head)
    for observation in random_batch(20)[0]:
        q_values = agent.q_network(observation[None])[0].detach().numpy()
        (shown, head), action = agent.think(observation)
        np.testing.assert_array_equal(shown, q_values)
        assert head == eval_head and action == decide(q_values, eval_head)[1]


def test_flags_out_of_range():
    check_args(Args(num_heads=31, eval_head=30, mask_probability=1, prior_scale=0, end_e=0))
    check_args(Args(num_heads=1, eval_head=0))
    for flags, message in (
        ({"num_heads": 0}, "--num-heads is 0: it must be between 1 and 31"),
        ({"num_heads": 32}, "--num-heads is 32"),
        ({"eval_head": 9}, "--eval-head is 9: it must be between 0 and 8"),
        ({"eval_head": -1}, "--eval-head is -1"),
        ({"mask_probability": 0}, "--mask-probability is 0"),
        ({"mask_probability": 1.1}, "--mask-probability is 1.1"),
        ({"prior_scale": -1}, "--prior-scale is -1: it must be between 0 and 1,000"),
        ({"max_grad_norm": 0}, "--max-grad-norm is 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            check_args(Args(**flags))


# ----------------------------------------------------------------------------------------------------- overlay

GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}
TOP, LEFT = 114, 634  # of the map


@functools.cache
def started_overlay(num_actions: int) -> tuple[Overlay, dict]:
    """An overlay of a game that has begun, and the game's state: to load a cartridge takes longer than most tests."""
    game, full = GAMES[num_actions]
    env = Overlay(Atari(Args(env_id=game, full_action_space=full)), "test", 0.01)
    env.reset(seed=1)
    assert env.action_space.n == num_actions
    return env, env.env.state_dict()


def make_overlay(num_actions: int) -> Overlay:
    """Each has the start of the game before it, and attributes of its own."""
    env, state = started_overlay(num_actions)
    env = copy.copy(env)
    env.env = copy.copy(env.env)
    env.env.load_state_dict(state)
    env.new_game()
    return env


def is_color(picture: np.ndarray, color) -> np.ndarray:
    return np.abs(picture.astype(int) - np.array(color)).sum(-1) <= 1


def cells(picture, num_heads, num_actions):
    """Of every cell, [heads, actions]: its color beside the dot, and whether there is a dot."""
    pitch, width = min(36, 288 // num_actions), min(22, 198 // num_heads)
    y = TOP + np.arange(num_actions) * pitch
    x = LEFT + np.arange(num_heads)[:, None] * width
    return picture[y + 2, x + 1].astype(int), is_color(picture[y + pitch // 2, x + width // 2 - 1], VOTE)


@pytest.mark.parametrize("num_actions", [3, 6, 18])
@pytest.mark.parametrize("num_heads", [1, 9, 14])
@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, -5), (1e8, 0), (1e30, -1e30)])
@pytest.mark.slow
def test_map_shows_values_and_votes(num_actions, num_heads, scale, shift):
    """Shades run from the lowest to the highest distance from the head's mean; each column has one dot, on its best."""
    env, rng = make_overlay(num_actions), np.random.default_rng(num_actions)
    q_values = (rng.normal(size=(num_heads, num_actions)) + rng.normal(size=(num_heads, 1))) * scale + shift
    env.note((q_values, None), int(q_values.mean(0).argmax()))
    colors, dots = cells(env.render(), num_heads, num_actions)
    assert np.array_equal(dots, np.arange(num_actions) == q_values.argmax(1)[:, None])
    advantages = q_values - q_values.mean(1, keepdims=True)
    shades = (advantages - advantages.min()) / (advantages.max() - advantages.min())
    expected = LOWEST + shades[:, :, None] * (HIGHEST - LOWEST)
    expected[:, env.action] = colors[:, env.action]  # under the frame of the chosen action
    np.testing.assert_allclose(colors, expected, atol=1)
    assert np.ptp(expected) > 50


def test_equal_and_nan_values():
    env = make_overlay(6)
    with np.errstate(all="ignore"):
        for q_values in (np.full((9, 6), 2.0), np.full((9, 6), np.nan), np.full((9, 6), np.inf)):
            env.note((q_values, None), 5)
            colors, _ = cells(env.render(), 9, 6)
            assert (colors[:, :5] == LOWEST).all()
        q_values = np.random.default_rng(0).normal(size=(9, 6))
        q_values[3, 2] = np.nan
        env.note((q_values, None), 5)
        colors, dots = cells(env.render(), 9, 6)
        assert (colors[3, :5] == LOWEST).all() and (colors[4, :5] != LOWEST).any() and dots[3].tolist()[2]
        env.note((q_values.astype(np.float32) * 1e38, 2), 5)
        env.render()


def test_chosen_greedy_acting_and_exploring_are_marked(monkeypatch):
    env = make_overlay(6)
    q_values = np.tile(np.arange(6.0), (9, 1))
    q_values[7, 1] = 10  # head 7 disagrees

    def marks(head, action):
        env.note((q_values, head), action)
        picture = env.render()
        rows = is_color(picture[TOP : TOP + 216, LEFT - 4], CHOSEN)
        columns = is_color(picture[TOP + 18 :: 36, LEFT - 1 : 834][:6], CHOSEN).sum(0) > 4
        names = [is_color(picture[TOP + 36 * i : TOP + 36 * i + 36, 504:624], GREEDY).any() for i in range(6)]
        outlined = [head for head in range(9) if columns[22 * head] and columns[22 * head + 22]]
        exploring = "exploring" in drawn_texts(env, monkeypatch)
        return int(np.flatnonzero(rows).mean()) // 36, outlined, exploring, np.flatnonzero(names).tolist()

    assert marks(None, 5) == (5, [], False, [5])
    assert marks(None, 2) == (2, [], True, [5])
    assert marks(3, 5)[1:] == ([3], False, [5])
    assert marks(7, 1)[1:] == ([7], False, [1])
    assert marks(7, 5)[1:] == ([7], True, [1])


def test_vote_and_head_are_named(monkeypatch):
    """The texts that are drawn."""
    env = make_overlay(6)
    q_values = np.tile(np.arange(6.0), (9, 1))
    q_values[7, 1] = 10.5
    env.note((q_values, None), 5)
    texts = drawn_texts(env, monkeypatch)
    assert "the vote is for LEFTFIRE, 8 of 9 agree" in texts
    assert "2.056" in texts and "5.000" in texts and "8" in texts  # means of Q, and the votes
    env.note((q_values, 7), 1)
    assert "head 7 is for FIRE, 1 of 9 agree" in drawn_texts(env, monkeypatch)
    env.env.max_episode_frames = 1
    env.step(1)
    texts = drawn_texts(env, monkeypatch)
    assert "cut off at the frame limit" in texts and "votes" not in texts


def test_nothing_overlaps():
    """With the widest texts each column of the panel keeps a gap to the next one, and nothing leaves the canvas."""
    for num_heads, head in ((9, None), (9, 8), (10, 9), (31, 30)):
        env = make_overlay(18)
        q_values = np.tile(np.linspace(-9_999.9, -1_000, 18), (num_heads, 1))
        q_values[num_heads // 2 :, 17] -= 9_000
        env.note((q_values, head), 3)
        env.env.episode_return, env.env.episode_length = 1_234_567, 26_999
        env.notice = "the video is cut here"
        panel = np.abs(env.render()[:, 480:].astype(int) - GROUND).sum(2) > 60
        assert not panel[:, :20].any() and not panel[:, -20:].any()
        assert not panel[TOP:402, 144:148].any()  # between names and map
        assert not panel[TOP:402, 356:358].any() and not panel[TOP:402, 378:384].any()  # map, votes and values
        assert not panel[404:407].any() and not panel[557:562].any()  # between map, traces and facts
        for title in (panel[22:46], panel[76:93], panel[412:429], panel[486:503]):  # between its left and right
            assert np.diff(np.flatnonzero(title.any(0))).max() > 14


def test_traces_follow_value_and_disagreement_and_mark_rewards():
    env = make_overlay(6)
    for step in range(150):
        q_values = np.zeros((9, 6))
        q_values[:, 5] = step  # a rising value
        q_values[::2] += 150 - step  # and heads that come to agree
        env.note((q_values, None), 5)
        env.env.episode_return += {60: 1, 100: -1}.get(step, 0)
    assert env.values[-1] == pytest.approx(149 + 5 / 9) and env.disagreements[-1] == pytest.approx(math.sqrt(20) / 9)
    picture = env.render()
    for top, bottom, color, sign in ((438, 480, GREEDY, 1), (512, 554, VOTE, -1)):
        trace = np.abs(picture[top : bottom + 1].astype(int) - color).sum(2) < 30
        heights = [np.flatnonzero(trace[:, x]).mean() for x in range(510, 930, 20)]
        assert all(sign * earlier > sign * later for earlier, later in zip(heights, heights[1:]))
        for line, step in ((GAIN, 60), (LOSS, 100)):
            columns = np.flatnonzero(is_color(picture[top:bottom], line).sum(0) > 20)
            assert columns.tolist() == [pytest.approx(936 - (149 - step) * 432 / 149, abs=1)]
    env.note((q_values, 3), 5)
    assert env.values[-1] == 149  # the head that plays, not the mean
    assert is_color(picture[560:], QUIET).any()  # the facts


# -------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_update_equals_plain_update(precision):
    device = torch.device("cuda")
    plain, captured = (make_agent(4, device, precision=precision) for _ in range(2))
    captured.load_state_dict(copy.deepcopy(plain.state_dict()))
    update = CudaGraph(captured.update)
    batch = [x.to(device) for x in masked_batch(3, 4)]
    for step in range(100):
        batch[2] = torch.full_like(batch[2], (step % 7) / 7)
        plain.update(*batch)
        update(*batch)
    assert update.graph is not None
    torch.testing.assert_close(plain.metrics.sums, captured.metrics.sums, rtol=1e-3, atol=1e-4)
    for a, b in zip(plain.q_network.parameters(), captured.q_network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.gpu
def test_captured_acting_follows_the_heads():
    device = torch.device("cuda")
    agent = make_agent(4, device)
    observations, epsilon = random_batch(200)[0].to(device), torch.zeros((), device=device)
    act, q_values = CudaGraph(agent.act), agent.q_network(observations)
    for step in range(6):
        heads = (torch.arange(200, device=device) + step) % 3
        greedy = q_values[torch.arange(200, device=device), heads].argmax(1)
        assert torch.equal(act(observations, epsilon, heads), greedy)
    epsilon.fill_(1.0)
    assert torch.bincount(act(observations, epsilon, heads), minlength=4).min() > 20


@pytest.mark.gpu
def test_captured_sampling_returns_the_stored_masks():
    replay = make_replay(200, torch.device("cuda"))
    zeros = torch.zeros(2, device=replay.device)
    for step in range(100):
        frames = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8, device=replay.device)
        replay.add(frames, zeros, torch.tensor([2.0 * step, 2.0 * step + 1]), zeros.bool(), zeros.bool())
    sample = CudaGraph(lambda: replay.sample(64))
    for _ in range(6):
        batch = sample()
        assert torch.equal(batch.masks, replay.masks[batch.returns.long()])
