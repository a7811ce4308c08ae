"""Ape-X: n-step returns, prioritised replay, actors, update and overlay against direct computations."""

import copy
import functools
import math
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ale_py import ALEState
from helpers import IN_BFLOAT16, Naive, drawn_texts, random_batch, state_frame, with_small_trunk

import apex_dqn_atari
from apex_dqn_atari import (
    BAR,
    CHOSEN,
    CHUNK,
    GREEDY,
    HISTORY,
    PRIORITY_EPS,
    SIZE,
    STACK,
    TERMINATED,
    TRUNCATED,
    Actor,
    Agent,
    Args,
    Atari,
    CudaGraph,
    Overlay,
    QNetwork,
    Replay,
    Run,
    capture_learning,
    check_args,
    epsilons,
    n_step_returns,
    prioritize,
)

CPU = torch.device("cpu")


def make_args(**flags) -> Args:
    return Args(**({"num_actors": 1, "envs_per_actor": 2, "precision": "float32"} | flags))


def make_agent(num_actions=2, device=CPU, **flags) -> Agent:
    torch.manual_seed(0)
    return Agent(make_args(**flags), num_actions, device)


# --------------------------------------------------------------------------------------------- n-step returns


@pytest.mark.parametrize("n_step", [1, 3, 7])
def test_n_step_returns_equal_the_direct_sum(n_step):
    """Random rewards with both kinds of ending, often several within n steps, one transition after another."""
    rng, steps, envs, gamma = np.random.default_rng(n_step), 400, 5, 0.9
    rewards = rng.integers(-1, 2, (steps, envs)).astype(np.float32)
    ends = rng.choice([0, TERMINATED, TRUNCATED], (steps, envs), p=[0.8, 0.12, 0.08]).astype(np.uint8)
    returns, discounts, valid = n_step_returns(rewards, ends, n_step, gamma)
    assert returns.shape == discounts.shape == valid.shape == (steps - n_step, envs)
    assert returns.dtype == discounts.dtype == np.float32
    for t in range(steps - n_step):
        for env in range(envs):
            total, discount, known = 0.0, gamma**n_step, True
            for k in range(n_step):
                total += gamma**k * float(rewards[t + k, env])
                if ends[t + k, env]:
                    discount, known = 0.0, ends[t + k, env] == TERMINATED
                    break
            assert valid[t, env] == known
            if known:
                assert returns[t, env] == pytest.approx(total, abs=1e-6)
                assert discounts[t, env] == pytest.approx(discount, abs=1e-6)


# ----------------------------------------------------------------------------- actors and replay, step by step


class Script:
    """Stands in for ``Game``: random frames, rewards and endings, and a record of all that happened.

    A frame is tagged with the number of its environment and of its step: every one that was made has its own.
    """

    made = []

    def __init__(self, args):
        self.number, self.rng = len(Script.made), np.random.default_rng([args.seed, len(Script.made)])
        Script.made.append(self)
        self.stack, self.step_number = np.zeros((STACK, SIZE, SIZE), np.uint8), 0
        self.naive = Naive(args.n_step, args.gamma)
        self.action_space = type("Discrete", (), {"n": 3})

    def reset(self, seed=None):
        self.stack[:-1] = 0
        self._draw()
        return self.stack, {}

    def step(self, action):
        reward = float(self.rng.integers(-1, 2))
        terminated, truncated = self.rng.random() < 0.06, self.rng.random() < 0.04
        self.naive.add(self.stack[-1].copy(), action, reward, terminated, truncated)
        self.step_number += 1
        self.stack[:-1] = self.stack[1:]
        self._draw()
        episode = {"r": 1.0, "l": 1, "repeated_rewards": 1.0}
        return self.stack, reward, terminated, truncated, {"episode": episode} if terminated else {}

    def _draw(self):
        self.stack[-1] = self.rng.integers(0, 256, (SIZE, SIZE), np.uint8)
        self.stack[-1, 0, :3] = self.number, self.step_number // 256, self.step_number % 256


def tag(frame) -> tuple[int, int]:
    number, high, low = (int(x) for x in frame[0, :3])
    return number, 256 * high + low


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(apex_dqn_atari, "Game", Script)
    Script.made = []
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.slow
def test_replay_of_actors_equals_full_transitions(scripted, monkeypatch, n_step):
    """What two actors play comes back as a naive list of whole transitions has it, and nothing else does.

    They go on at different paces and past the end of the ring; a chunk is lost, and an actor starts anew, twice.
    """
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    max_steps = 3 * CHUNK + 17
    args = make_args(num_actors=2, buffer_size=4 * max_steps, n_step=n_step, gamma=0.9, prioritized_replay_alpha=0.0)
    weights = make_agent(3).weights()
    actors = [Actor(args, number, 0) for number in range(2)]
    replay, next_steps = Replay(args, CPU), [None, None]
    stored = [[[] for _ in range(2)] for _ in range(2)]  # of each environment of each actor: tag, first step of its run
    runs = [0, 0]
    script = [0, 1, 0, 0, "lose 1", 1, 1, "restart 0", 0, 0, "lose 0", "restart 1", 1, 0, 1, 1, 1, 0]
    for event in script:
        if isinstance(event, str):
            what, number = event.split()
            if what == "lose":
                actors[int(number)].play(weights, 0)
            else:
                actors[int(number)] = Actor(args, int(number), 0)
            continue
        chunk = actors[event].play(weights, 0)
        follows = chunk["first_step"] == next_steps[event]
        next_steps[event] = chunk["first_step"] + CHUNK
        replay.add(event, chunk, follows)
        for env in range(2):
            numbered = [tag(frame) for frame in chunk["frames"][:, env]]
            assert [step for _, step in numbered] == list(range(chunk["first_step"], chunk["first_step"] + CHUNK))
            runs[event] = runs[event] if follows else chunk["first_step"]
            stored[event][env] += [(number, step, runs[event]) for number, step in numbered]

        valid = set()
        for column in (env for actor in stored for env in actor):
            for place in range(max(len(column) - max_steps, 0) + HISTORY, len(column) - n_step):
                number, step, first = column[place]
                contiguous = column[place + n_step] == (number, step + n_step, first) and step >= first + HISTORY
                if contiguous and Script.made[number].naive.transition(step) is not None:
                    valid.add((number, step))
        batch = replay.sample(2 * replay.capacity)  # all priorities are alike: each share holds half a transition
        tags, first_drawn = np.unique(batch.observations[:, -1, 0, :3], axis=0, return_index=True)
        drawn = [(number, 256 * high + low) for number, high, low in tags.tolist()]
        assert set(drawn) == valid
        batch = [array[first_drawn] for array in batch]
        observations, drawn_actions, drawn_returns, next_observations, drawn_discounts = batch[:5]
        transitions = [Script.made[number].naive.transition(step) for number, step in drawn]
        stacks, actions, returns, next_stacks, discounts = zip(*transitions)
        running = [i for i, next_stack in enumerate(next_stacks) if next_stack is not None]
        assert np.array_equal(observations, np.stack(stacks))
        assert drawn_actions.tolist() == list(actions)
        np.testing.assert_allclose(drawn_returns, returns, rtol=0, atol=1e-6)
        np.testing.assert_allclose(drawn_discounts, discounts, rtol=0, atol=1e-6)
        assert np.array_equal(next_observations[running], np.stack([next_stacks[i] for i in running]))
    assert replay.size == replay.capacity == 4 * max_steps and len(Script.made) == 8


def test_actor_computes_priorities_from_its_q_values(scripted):
    """|G + gamma^n max Q(s', a) - Q(s, a)| with the network that it acted with, across a chunk's border."""
    args = make_args(n_step=3, gamma=0.9, prioritized_replay_alpha=0.6)
    agent = make_agent(3)
    actor = Actor(args, 0, 0)
    actor.play(agent.weights(), 0)
    chunk = actor.play(agent.weights(), 0)
    assert chunk["priorities"].shape == (CHUNK, 2) and chunk["priorities"].dtype == np.float32
    checked = 0
    for env in range(2):
        for place in range(CHUNK):
            transition = Script.made[env].naive.transition(chunk["first_step"] - args.n_step + place)
            if transition is None:
                assert chunk["priorities"][place, env] == 0
                continue
            stack, action, total, next_stack, discount = transition
            with torch.no_grad():
                taken = agent.q_network(torch.from_numpy(stack)[None])[0, action].item()
                if next_stack is not None:
                    total += discount * agent.q_network(torch.from_numpy(next_stack)[None]).max().item()
            expected = (abs(total - taken) + PRIORITY_EPS) ** 0.6
            assert chunk["priorities"][place, env] == pytest.approx(expected, rel=1e-3)
            checked += 1
    assert checked > CHUNK


def test_actor_takes_the_weights_it_is_given(scripted):
    """New ones when their number changes, the same ones otherwise."""
    args, first, second = make_args(), make_agent(3), make_agent(3)
    with torch.no_grad():
        second.q_network.advantage.bias += torch.tensor([0.0, 100.0, 0.0])
    actor = Actor(args, 0, 0)
    actor.epsilons[:] = 0
    actor.play(second.weights(), 3)
    actor.play(first.weights(), 3)
    assert (actor.steps["actions"] == 1).all()
    with torch.no_grad():
        second.q_network.advantage.bias += torch.tensor([200.0, 0.0, 0.0])
    chunk = actor.play(second.weights(), 4)
    assert chunk["updates"] == 4 and chunk["first_step"] == 2 * CHUNK
    assert (actor.steps["actions"][args.n_step :] == 0).all()


def test_each_environment_explores_with_its_epsilon(scripted, monkeypatch):
    """The paper's schedule over all environments; every actor has greedy and curious ones."""
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    args = make_args(num_actors=3, envs_per_actor=4)
    expected = [0.4 ** (1 + 7 * i / 11) for i in range(12)]
    assert epsilons(args).tolist() == pytest.approx(expected)
    assert epsilons(make_args(envs_per_actor=1)).tolist() == pytest.approx([0.4])
    actors = [Actor(args, number, 0) for number in range(3)]
    numbers = np.stack([actor.numbers for actor in actors])
    assert sorted(numbers.flatten().tolist()) == list(range(12)) and numbers[:, 0].tolist() == [0, 1, 2]
    for actor in actors:
        assert actor.epsilons.tolist() == pytest.approx([expected[number] for number in actor.numbers])
    agent = make_agent(3)
    with torch.no_grad():
        agent.q_network.advantage.bias += torch.tensor([0.0, 100.0, 0.0])
    actor = Actor(make_args(envs_per_actor=4), 0, 0)
    actor.epsilons[:] = 0.0, 0.6, 0.6, 1.0
    actions = np.concatenate([actor.play(agent.weights(), 0)["actions"].copy() for _ in range(8)])[CHUNK:]
    greedy = (actions == 1).mean(0)
    np.testing.assert_allclose(greedy, [1, 0.6, 0.6, 1 / 3], atol=0.1)  # a random action is greedy in a third
    assert (actions[:, 1:3] != 1).all(1).mean() == pytest.approx(0.4**2, abs=0.06)  # each game draws on its own
    assert greedy[0] == 1 and np.bincount(actions[:, 3]).min() > 0.2 * len(actions)


def test_actors_play_different_games(monkeypatch):
    """Another actor, seed or start of the learner: other games and other exploration; the same: the same."""
    seeds = []

    class Seeded(Script):
        def reset(self, seed=None):
            seeds.append(seed)
            return super().reset(seed)

    monkeypatch.setattr(apex_dqn_atari, "Game", Seeded)
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    kinds = [
        (make_args(num_actors=2, seed=seed), number, start)
        for seed, number, start in [(1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 5000), (1, 0, 0)]
    ]
    draws = [Actor(*kind).rng.random() for kind in kinds]
    assert len(set(seeds[:8])) == 8 and seeds[8:] == seeds[:2]
    assert len(set(draws[:4])) == 4 and draws[4] == draws[0]


def test_waiting_is_the_share_of_time_without_a_request(scripted, monkeypatch):
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    actor, weights = Actor(make_args(), 0, 0), make_agent(3).weights()
    now, finished = 1000.0, 991.0
    times = iter([now, now + 3])
    monkeypatch.setattr(apex_dqn_atari.time, "perf_counter", lambda: next(times))
    actor.finished = finished
    assert actor.play(weights, 0)["waiting"] == pytest.approx(9 / 12) and actor.finished == now + 3


def test_games_carry_the_number_of_their_environment(scripted, monkeypatch):
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    args = make_args(num_actors=2, envs_per_actor=3)
    actor = Actor(args, 1, 0)
    games = [game for _ in range(4) for game in actor.play(make_agent(3).weights(), 0)["games"]]
    assert {game["env"] for game in games} == {1, 3, 5}


# ---------------------------------------------------------------------------------------- prioritised sampling


def filled_replay(priorities: torch.Tensor, **flags) -> Replay:
    """A replay with a transition for each of ``priorities`` [steps, envs], numbered in the returns."""
    steps, envs = priorities.shape
    replay = Replay(make_args(envs_per_actor=envs, buffer_size=steps * envs, **flags), CPU)
    replay.priorities.copy_(priorities.flatten())
    replay.returns.copy_(torch.arange(steps * envs))
    replay.num_steps = [steps]
    return replay


def test_sampling_is_proportional_to_the_priorities():
    """200,000 draws against p^alpha over its sum (chi-square, 1e-6 tail); priorities 0 never come up."""
    torch.manual_seed(0)
    td_errors = torch.rand(100, 3) ** 3
    priorities = prioritize(td_errors, 0.6)
    priorities[torch.rand(100, 3) < 0.3] = 0
    replay, counts = filled_replay(priorities), torch.zeros(300)
    for _ in range(400):
        batch = replay.sample(500)
        assert torch.equal(batch.indices, batch.returns.long())
        counts += torch.bincount(batch.indices, minlength=300)
    drawable = priorities.flatten() > 0
    assert (counts[~drawable] == 0).all() and (~drawable).sum() > 50
    expected = (td_errors.flatten() + PRIORITY_EPS).double() ** 0.6 * drawable
    expected = expected / expected.sum() * 200_000
    chi_square = ((counts - expected)[drawable] ** 2 / expected[drawable]).sum().item()
    freedom = drawable.sum().item() - 1
    assert chi_square < freedom + 4.75 * (2 * freedom) ** 0.5 + 15
    wrong = td_errors.flatten().double() * drawable  # alpha 1 would be told apart
    wrong = wrong / wrong.sum() * 200_000
    assert ((counts - wrong)[drawable] ** 2 / wrong[drawable]).sum().item() > 10 * freedom


def test_draws_of_a_batch_are_independent_within_their_shares():
    """A share that a single transition fills draws only that one; where in a share a draw falls is random."""
    torch.manual_seed(0)
    replay = filled_replay(torch.tensor([[1.0], [2.0], [1.0], [0.5], [0.5], [3.0]]))
    pairs = {tuple(replay.sample(2).indices.tolist()) for _ in range(300)}
    assert pairs == {(first, second) for first in (0, 1, 2) for second in (3, 4, 5)}
    draws = {tuple(replay.sample(8).indices.tolist()) for _ in range(50)}
    assert draws == {(0, 1, 1, 2, 3, 5, 5, 5), (0, 1, 1, 2, 4, 5, 5, 5)}


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights_are_the_formula(beta):
    torch.manual_seed(0)
    priorities = torch.rand(50, 4) + 0.01
    replay = filled_replay(priorities, prioritized_replay_beta=beta)
    batch = replay.sample(64)
    probabilities = (priorities.double() / priorities.double().sum()).flatten()[batch.indices]
    weights = (200 * probabilities) ** -beta
    torch.testing.assert_close(batch.weights.double(), weights / weights.max(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.6, 0.3])
def test_priorities_are_updated_in_place(alpha):
    torch.manual_seed(0)
    replay = filled_replay(torch.rand(50, 4), prioritized_replay_alpha=alpha)
    before = replay.priorities.clone()
    indices, td_errors = torch.tensor([3, 7, 199, 7]), torch.tensor([-2.0, 0.0, 0.5, 0.0])
    replay.update_priorities(indices, td_errors)
    after = replay.priorities
    assert after[[3, 7, 199]].tolist() == pytest.approx([(x + 1e-6) ** alpha for x in (2.0, 0.0, 0.5)], rel=1e-5)
    others = torch.ones(200, dtype=torch.bool)
    others[indices] = False
    assert torch.equal(before[others], after[others])


def test_sums_of_millions_of_priorities_are_exact(monkeypatch):
    """Behind one with all the weight, two million small ones are still told apart: float32 would merge ten of them."""
    replay = Replay(make_args(envs_per_actor=8, buffer_size=8 * (CHUNK + 10)), CPU)
    replay.capacity = 2_000_000
    replay.frames = torch.zeros(replay.capacity, 1, 1, dtype=torch.uint8)
    for name in ("ages", "actions", "returns", "discounts"):
        setattr(replay, name, torch.zeros(replay.capacity))
    replay.priorities = torch.full((replay.capacity,), 1e-4)
    replay.priorities[0] = 1e4
    cumulative = replay.priorities.double().numpy().cumsum()
    for draw in (0.1, 0.981, 0.985, 0.99, 0.995, 0.9999):
        monkeypatch.setattr(torch, "rand", lambda size, draw=draw, **options: torch.full((size,), draw))
        expected = np.searchsorted(cumulative, float(np.float32(draw)) * cumulative[-1], side="right")
        assert abs(replay.sample(1).indices.item() - expected) <= 1


def test_draws_at_the_edge_of_a_share_are_of_the_next(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.zeros(size))
    assert filled_replay(torch.tensor([[0.0], [1.0], [0.0], [1.0]])).sample(2).indices.tolist() == [1, 3]


@pytest.mark.parametrize("batch_size", [1, 32, 512])
def test_highest_draw_is_not_past_the_end(monkeypatch, batch_size):
    """1 - 2**-24 is the highest random number; what lies at the end with priority 0 is not drawn either."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full((size,), 1 - 2**-24))
    for _ in range(10):  # sums that would be rounded up or down
        priorities = torch.empty(500, 4).uniform_(0.01, 1, generator=generator)
        priorities[490:] = 0
        indices = filled_replay(priorities).sample(batch_size).indices
        assert indices[-1] == 490 * 4 - 1
        assert (priorities.flatten()[indices] > 0).all()


@pytest.mark.parametrize(
    "num_steps", [None, 2 * CHUNK, [], [2 * CHUNK, 0], [CHUNK], [3 * CHUNK], [-1], [2.0 * CHUNK], ["many"], [2**70]]
)
def test_counters_that_are_not_of_the_arrays_are_refused(num_steps):
    args = make_args(buffer_size=2 * 4 * CHUNK)
    replay = Replay(args, CPU)
    replay.num_steps = [2 * CHUNK]
    state = replay.state_dict()
    Replay(args, CPU).load_state_dict(state)
    with pytest.raises((TypeError, ValueError)):
        Replay(args, CPU).load_state_dict(state | {"num_steps": num_steps})


@pytest.mark.parametrize("name", Replay.ARRAYS)
def test_array_of_another_kind_is_refused(name):
    args = make_args(buffer_size=2 * 4 * CHUNK)
    replay = Replay(args, CPU)
    replay.num_steps = [2 * CHUNK]
    state = replay.state_dict()
    for spoiled in (state[name][:, None], state[name][:1], state[name].double(), state[name].tolist()):
        with pytest.raises(ValueError):
            Replay(args, CPU).load_state_dict(state | {name: spoiled})
    del state[name]
    with pytest.raises(KeyError):
        Replay(args, CPU).load_state_dict(state)


def test_actors_find_their_own_precision(monkeypatch):
    """bfloat16 only if the CPU that an actor runs on has instructions for it, whatever the learner runs on."""
    for found in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=found: found)
        for precision in ("float32", "bfloat16", "auto"):
            expected = "bfloat16" if found and precision != "float32" else "float32"
            actor = Actor(make_args(envs_per_actor=1, precision=precision), 0, 0)
            assert actor.network.dtype == actor.network.trunk[0].weight.dtype == getattr(torch, expected)


def test_replay_survives_a_checkpoint(scripted, tmp_path):
    """With its priorities: a restored replay draws the same; the next chunk does not follow, and is stored behind."""
    args = make_args(buffer_size=2 * (2 * CHUNK + 20))
    actor, replay, other = Actor(args, 0, 0), Replay(args, CPU), Replay(args, CPU)
    weights = make_agent(3).weights()
    for chunks in range(1, 5):
        replay.add(0, actor.play(weights, 0), chunks > 1)
        torch.save(replay.state_dict(), tmp_path / "replay.pt")
        stored = min(chunks * CHUNK * 2, replay.capacity)
        assert (tmp_path / "replay.pt").stat().st_size < 1.05 * stored * apex_dqn_atari.BYTES_PER_TRANSITION + 10_000
        other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True, mmap=True))
        samples = []
        for r in (replay, other):
            torch.manual_seed(1)
            samples.append(r.sample(32))
        assert all(torch.equal(a, b) for a, b in zip(*samples))
    chunk = actor.play(weights, 0)
    for r in (replay, other):
        r.add(0, chunk, False)
    assert torch.equal(replay.priorities, other.priorities) and replay.num_steps == other.num_steps == [5 * CHUNK]


# ------------------------------------------------------------------------------------------------------ learner


def test_dueling_head_is_value_plus_advantages():
    """Q = V + A - mean A of Wang et al. 2016, eq. 9, from the weights in float64."""
    agent = make_agent(4)
    observations = random_batch(8)[0]
    with torch.no_grad():
        value, advantages = agent.q_network.streams(observations)
        network = copy.deepcopy(agent.q_network).double()
        features = network.trunk(observations.double() / 255)
        v = network.value(features[:, :512])
        a = network.advantage(features[:, 512:])
        q_values = agent.q_network(observations)
    assert value.shape == (8, 1) and advantages.shape == (8, 4) and q_values.dtype == torch.float32
    torch.testing.assert_close(value.double(), v, rtol=0, atol=1e-5)
    torch.testing.assert_close(q_values.double(), v + a - a.mean(1, keepdim=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(8), rtol=0, atol=1e-6)
    (shown_value, shown_advantages), greedy = agent.think(observations[0])
    assert shown_value == pytest.approx(v[0].item(), abs=1e-5) and greedy == q_values[0].argmax()
    np.testing.assert_allclose(shown_advantages, advantages[0].numpy(), atol=1e-6)


def test_bfloat16_trunk_stays_close_to_float32():
    torch.manual_seed(0)
    network, half = QNetwork(4), QNetwork(4, torch.bfloat16)
    half.load_state_dict(network.state_dict())
    observations = random_batch()[0]
    q_values = half(observations)
    assert q_values.dtype == torch.float32
    torch.testing.assert_close(q_values, network(observations), rtol=0, atol=5e-3)
    assert not torch.equal(q_values, q_values.bfloat16().float())  # the output layer is exact


@pytest.mark.parametrize("max_grad_norm", [40.0, 1e-3])
def test_update_is_the_formula(max_grad_norm):
    """Weighted loss, double-Q target, gradient, its norm and the step of centered RMSProp, directly in float64."""
    agent = make_agent(max_grad_norm=max_grad_norm)
    with torch.no_grad():
        for parameter in agent.target_network.parameters():
            parameter.mul_(1.1)
        agent.target_network.advantage.bias += torch.tensor([0.3, 0.0])  # the networks disagree on the best action
    observations, actions, returns, next_observations, discounts = random_batch()
    weights = torch.rand(32, generator=torch.Generator().manual_seed(5))
    network, target = copy.deepcopy(agent.q_network).double(), copy.deepcopy(agent.target_network).double()

    def q(model, observation):
        features = model.trunk(observation[None].double() / 255)
        advantages = model.advantage(features[:, 512:])
        return (model.value(features[:, :512]) + advantages - advantages.mean())[0]

    loss, expected_errors, disagreements = 0.0, [], 0
    for i in range(32):
        with torch.no_grad():
            online, offline = q(network, next_observations[i]), q(target, next_observations[i])
            disagreements += int(online.argmax() != offline.argmax())
            td_target = returns[i] + discounts[i] * offline[online.argmax()]
        error = td_target - q(network, observations[i])[actions[i]]
        expected_errors.append(error.item())
        loss = loss + 0.5 * weights[i].double() * error**2 / 32
    assert disagreements > 3
    loss.backward()
    before = copy.deepcopy(agent.q_network)
    td_errors = agent.update(observations, actions, returns, next_observations, discounts, weights)
    np.testing.assert_allclose(td_errors.numpy(), expected_errors, atol=1e-5)
    metrics = agent.metrics.means()
    assert set(metrics) == {"td_loss", "q_values", "abs_td_error"}
    assert metrics["td_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["abs_td_error"] == pytest.approx(np.abs(expected_errors).mean(), rel=1e-4)
    norm = sum(parameter.grad.square().sum() for parameter in network.parameters()).sqrt().item()
    assert (norm > max_grad_norm) == (max_grad_norm < 1)
    for old, ours, theirs in zip(before.parameters(), agent.q_network.parameters(), network.parameters()):
        gradient = theirs.grad * min(1, max_grad_norm / norm)
        torch.testing.assert_close(ours.grad.double(), gradient, rtol=1e-2, atol=1e-7)
        gradient = ours.grad  # RMSProp's first step: averages start at 0 and move by a twentieth
        deviation = (0.05 * gradient**2 - (0.05 * gradient) ** 2).sqrt()
        expected = old - 6.25e-5 * gradient / (deviation + 1.5e-7**0.5)
        torch.testing.assert_close(ours.detach(), expected.detach(), rtol=0, atol=1e-7)


def test_update_leaves_the_target_network_alone():
    agent = make_agent()
    before = copy.deepcopy(agent.target_network.state_dict())
    agent.update(*random_batch(), torch.ones(32))
    assert all(torch.equal(before[name], value) for name, value in agent.target_network.state_dict().items())
    agent.update_target()
    after = agent.q_network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in agent.target_network.state_dict().items())


class Corridor(Script):
    """Five states shown as pictures: right in the last ends the episode with reward 1, left in the first costs 0.5.

    Episodes are cut off at random, which must not change the values.
    """

    def __init__(self, args):
        super().__init__(args)
        self.action_space, self.state = type("Discrete", (), {"n": 2}), 0

    def reset(self, seed=None):
        self.state = int(self.rng.integers(5))
        return self._show()

    def step(self, action):
        terminated = action == 1 and self.state == 4
        reward = 1.0 if terminated else -0.5 if action == 0 and self.state == 0 else 0.0
        self.state = min(self.state + 1, 4) if action == 1 else max(self.state - 1, 0)
        truncated = not terminated and self.rng.random() < 0.1
        return self._show()[0], reward, terminated, truncated, {}

    def _show(self):
        self.stack[:] = 0
        self.stack[-1] = state_frame(self.state)
        return self.stack, {}


class Endless(Script):
    """A life that does not end."""

    def __init__(self, args):
        super().__init__(args)
        self.rng = SimpleNamespace(integers=self.rng.integers, random=lambda: 1.0)


def test_age_counts_the_older_frames_of_a_long_life(scripted, monkeypatch):
    monkeypatch.setattr(apex_dqn_atari, "Game", Endless)
    actor, weights = Actor(make_args(), 0, 0), make_agent(3).weights()
    ages = np.concatenate([actor.play(weights, 0)["ages"].copy() for _ in range(6)])
    assert ages[3:7].T.tolist() == [[0, 1, 2, 3]] * 2  # n steps come first that nobody has played
    assert (ages[6:] == HISTORY).all()


def test_an_update_changes_the_priorities_of_what_it_drew(monkeypatch):
    agent, replay = make_agent(), filled_replay(torch.ones(100, 3))
    drawn, errors = [], []
    sample, update = replay.sample, agent.update
    monkeypatch.setattr(replay, "sample", lambda size: drawn.append(sample(size)) or drawn[-1])
    monkeypatch.setattr(agent, "update", lambda *batch: errors.append(update(*batch)) or errors[-1])
    capture_learning(agent.args, agent, replay)()
    priorities = replay.priorities[drawn[0].indices]
    torch.testing.assert_close(priorities, prioritize(errors[0], agent.args.prioritized_replay_alpha))


@pytest.mark.parametrize("precision", ["float32", IN_BFLOAT16])
@pytest.mark.slow
def test_update_converges_to_value_iteration(scripted, monkeypatch, precision):
    """One-step returns of a random policy in prioritised replay give the Q-values of the best one."""
    monkeypatch.setattr(apex_dqn_atari, "Game", Corridor)
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    gamma, expected = 0.8, np.zeros((5, 2))
    for _ in range(100):
        for state in range(5):
            left, right = max(state - 1, 0), state + 1
            expected[state, 0] = (-0.5 if state == 0 else 0) + gamma * expected[left].max()
            expected[state, 1] = 1 if state == 4 else gamma * expected[right].max()
    args = make_args(gamma=gamma, n_step=1, buffer_size=3000, epsilon_base=1.0, learning_rate=1e-3)
    args.precision = precision
    torch.manual_seed(0)
    agent, actor, replay = Agent(args, 2, CPU), Actor(args, 0, 0), Replay(args, CPU)
    for chunk in range(20):
        replay.add(0, actor.play(agent.weights(), 0), chunk > 0)
    for update in range(400):
        if update == 240:
            agent.optimizer.param_groups[0]["lr"] /= 6
        *batch, indices = replay.sample(32)
        replay.update_priorities(indices, agent.update(*batch))
        if update % 25 == 0:
            agent.update_target()
    batch = replay.sample(512)
    with torch.no_grad():
        q_values = agent.q_network(batch.observations).numpy()
    in_state = batch.observations[:, -1].float().mean(1).argmax(1).numpy() // 16
    np.testing.assert_allclose(q_values, expected[in_state], atol=0.01)


@pytest.mark.slow
def test_importance_weights_undo_the_bias_of_the_priorities(monkeypatch):
    """A coin that pays 1 in a tenth of its tosses: worth 0.1 with beta 1; drawn by surprise alone it seems worth 0.25.

    Where draws are proportional to the error, the errors' squares balance: 0.1 (1 - q)^2 = 0.9 q^2, so q = 1/4.
    """
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    learned = {}
    for beta in (0.0, 1.0):
        agent = make_agent(learning_rate=2e-4)
        replay = filled_replay(torch.ones(400, 1), prioritized_replay_alpha=1.0, prioritized_replay_beta=beta)
        replay.returns.zero_()
        replay.returns[::10] = 1.0
        torch.manual_seed(0)
        estimates = []
        for _ in range(150):
            *batch, indices = replay.sample(20)
            replay.update_priorities(indices, agent.update(*batch))
            # all priorities follow, as after many updates of each
            replay.priorities.copy_(prioritize(replay.returns - agent.q_network(batch[0][:1])[0, 0].item(), 1.0))
            estimates.append(agent.q_network(batch[0][:1])[0, 0].item())
        learned[beta] = np.mean(estimates[90:])
    assert learned[0.0] == pytest.approx(0.25, abs=0.03)
    assert learned[1.0] == pytest.approx(0.1, abs=0.03)


class ActorHere:
    """Stands in for ``Actors``: one actor, which plays in this process. ``events`` are what training did, in order."""

    events = []
    clock = [0.0]  # seconds: a chunk takes 10
    starts = []

    def __init__(self, args, start):
        self.actor, self.args = Actor(args, 0, start), args
        ActorHere.starts.append(start)

    def publish(self, weights, updates):
        self.weights, self.updates = copy.deepcopy(weights), updates
        ActorHere.events.append(("publish", updates, float(sum(array.sum() for array in weights.values()))))

    def receive(self, patience):
        chunk = self.actor.play(self.weights, self.updates)
        ActorHere.clock[0] += 10
        ActorHere.events.append(("games", {game["env"] for game in chunk["games"]}, patience))
        yield 0, chunk, True

    def close(self):
        ActorHere.events.append(("close",))


@pytest.mark.slow
def test_training_copies_and_publishes_the_weights_in_time(scripted, monkeypatch, tmp_path):
    """1,600 steps of two games, an update for each 20 after the first 400, in chunks of 100 steps."""
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    args = make_args(total_timesteps=1600, learning_starts=400, steps_per_update=20, batch_size=4, buffer_size=2000)
    args.target_network_frequency, args.weights_frequency, args.wandb_mode = 7, 150, "disabled"
    ActorHere.events = events = []
    update, update_target = Agent.update, Agent.update_target

    def record_update(agent, *batch):
        result = update(agent, *batch)
        events.append(("update", float(sum(array.sum() for array in agent.weights().values()))))
        return result

    def record_copy(agent):
        update_target(agent)
        events.append(("copy",))

    monkeypatch.setattr(apex_dqn_atari, "Actors", ActorHere)
    monkeypatch.setattr(apex_dqn_atari, "start_ray", lambda args: None)
    monkeypatch.setattr(apex_dqn_atari, "evaluate", lambda *arguments, **flags: None)
    logged = []
    tracker = Mock(run_id="run", log=lambda metrics, global_step: logged.append(metrics))
    monkeypatch.setattr(apex_dqn_atari, "Tracker", lambda *arguments, **flags: tracker)
    monkeypatch.setattr(Agent, "update", record_update)
    monkeypatch.setattr(Agent, "update_target", record_copy)
    assert apex_dqn_atari.train(args, CPU, tmp_path, None) == 0

    updates = np.cumsum([event[0] == "update" for event in events])
    assert updates[-1] == 60
    assert [updates[i] for i, event in enumerate(events) if event[0] == "copy"] == [0, *range(7, 60, 7)]
    published = {updates[i]: event[1:] for i, event in enumerate(events) if event[0] == "publish"}
    # every 150 steps of each game, when steps 600, 900, 1,200 and 1,500 have been learned from
    assert list(published) == [0, 10, 25, 40, 55]
    sums = [event[1] for event in events if event[0] == "update"]
    assert len(set(sums)) == 60 and all(published[i] == (i, sums[i - 1]) for i in (10, 25, 40, 55))
    assert events[-1] == ("close",)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (checkpoint["global_step"], checkpoint["agent"]["updates"]) == (1600, 60)

    ended = [event[1] for event in events if event[0] == "games"]
    charts = [name for metrics in logged for name in metrics if name.startswith("charts/episodic_return_")]
    # the last of the two explores least; a point is of all games that a chunk has ended
    assert charts.count("charts/episodic_return_greediest") == sum(1 in games for games in ended) > 0
    assert charts.count("charts/episodic_return_explorers") == sum(0 in games for games in ended) > 0


@pytest.mark.slow
def test_free_running_learner_never_waits(scripted, monkeypatch, tmp_path):
    """Without ``steps_per_update``: an update whenever the chunks that are there are stored, and none is waited for."""
    monkeypatch.setattr(apex_dqn_atari, "QNetwork", with_small_trunk(QNetwork, 2 * 512))
    args = make_args(total_timesteps=1600, learning_starts=400, batch_size=4, buffer_size=2000, wandb_mode="disabled")
    assert args.steps_per_update is None
    ActorHere.events, ActorHere.clock, logged = [], [0.0], []

    def tick():
        ActorHere.clock[0] += 1e-6
        return ActorHere.clock[0]

    tracker = Mock(run_id="run", log=lambda metrics, global_step: logged.append((global_step, metrics)))
    monkeypatch.setattr(apex_dqn_atari, "Actors", ActorHere)
    monkeypatch.setattr(apex_dqn_atari, "start_ray", lambda args: None)
    monkeypatch.setattr(apex_dqn_atari, "evaluate", lambda *arguments, **flags: None)
    monkeypatch.setattr(apex_dqn_atari, "Tracker", lambda *arguments, **flags: tracker)
    monkeypatch.setattr(apex_dqn_atari, "LOG_FREQUENCY", 400)
    monkeypatch.setattr(apex_dqn_atari.time, "perf_counter", tick)
    assert apex_dqn_atari.train(args, CPU, tmp_path, None) == 0
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (checkpoint["global_step"], checkpoint["agent"]["updates"]) == (1600, 12)  # one for each chunk from 500 on
    patience = [event[2] for event in ActorHere.events if event[0] == "games"]
    assert patience == [1] * 5 + [0] * 11
    speeds = {step: metrics["charts/updates_per_second"] for step, metrics in logged if "charts/SPS" in metrics}
    assert speeds == pytest.approx({400: 0, 800: 4 / 40, 1200: 4 / 40, 1600: 4 / 40}, rel=1e-3)

    ActorHere.starts.clear()  # a run that goes on plays other games than at first
    args.total_timesteps = 1700
    assert apex_dqn_atari.train(args, CPU, tmp_path, tmp_path / "checkpoint.pt") == 0
    assert ActorHere.starts == [1600]


@pytest.fixture
def fake_ray(monkeypatch):
    """Chunks that are asked of an actor are all there: ``answers`` has life and first step of each, or an error."""
    fake = SimpleNamespace(answers=[], asked=[], cancelled=[], dead=False, shut_down=0, made=[], timeouts=[])

    def play(weights, updates):
        fake.asked.append(updates)
        return len(fake.asked) - 1

    def wait(references, timeout, num_returns=1):
        if fake.dead:
            raise BrokenPipeError("Broken pipe")
        fake.timeouts.append(timeout)
        return [reference for reference in references if reference in range(len(fake.answers))][:num_returns], []

    def shutdown():
        fake.shut_down += 1

    def get(reference):
        if isinstance(answer := fake.answers[reference], Exception):
            raise answer
        life, first_step = answer
        return {"incarnation": life, "first_step": first_step}

    actor = SimpleNamespace(play=SimpleNamespace(remote=play))
    remote = SimpleNamespace(remote=lambda *arguments: fake.made.append(arguments) or actor)
    monkeypatch.setattr(apex_dqn_atari.ray, "remote", lambda **options: lambda cls: remote)
    monkeypatch.setattr(apex_dqn_atari.ray, "put", lambda weights: weights)
    monkeypatch.setattr(apex_dqn_atari.ray, "wait", wait)
    monkeypatch.setattr(apex_dqn_atari.ray, "get", get)
    monkeypatch.setattr(apex_dqn_atari.ray, "cancel", fake.cancelled.append)
    monkeypatch.setattr(apex_dqn_atari.ray, "shutdown", shutdown)
    return fake


def test_chunk_follows_the_one_before_or_not(fake_ray, capsys):
    """A chunk is lost on the way. A started actor's chunks come in any order; its step 50 does not follow another's."""
    lost = apex_dqn_atari.ray.exceptions.ObjectLostError("0" * 56, None, "")
    first = [("first", 0), ("first", 50), lost, ("first", 150)]
    second = [("second", 100), ("second", 50), ("second", 0), ("second", 150), ("second", 200)]
    third = [("third", 0)]
    fourth = [("fourth", 50), ("fourth", 100)]
    fake_ray.answers = first + second + third + fourth
    actors = apex_dqn_atari.Actors(make_args(), 0)
    actors.publish("weights", 7)
    received = [item for _ in fake_ray.answers for item in actors.receive(patience=0)]
    assert [item[1]["first_step"] for item in received] == [0, 50, 150, 100, 50, 0, 150, 200, 0, 50, 100]
    follows = [item[1]["first_step"] for item in received if item[2]]
    assert follows == [50, 200, 100]
    loss, *restarts = capsys.readouterr().err.splitlines()
    assert loss.startswith("a chunk of actor 0 was lost: ")
    assert restarts == ["actor 0 died and has been started again"] * 3
    assert list(actors.receive(patience=0)) == []
    actors.close()
    assert fake_ray.cancelled == [12, 13, 14]  # as many as are asked for in advance
    assert fake_ray.shut_down == 1


def test_chunks_are_asked_for_with_the_weights_published_last(fake_ray):
    """Those that follow a chunk which has arrived count, so that a chunk's weights are as new as can be."""
    actors = apex_dqn_atari.Actors(make_args(), 0)
    for updates, first_step in ((7, 0), (8, 50), (9, 100)):
        fake_ray.answers.append(("first", first_step))
        actors.publish("weights", updates)
        assert len(list(actors.receive(patience=0))) == 1
    assert fake_ray.asked == [7, 7, 7, 7, 8, 9]


def test_every_actor_is_heard_in_turn(fake_ray):
    """Each is an actor of its own. A call that may wait hands over a chunk of each, one that may not all there are."""
    args = make_args(num_actors=2)
    actors = apex_dqn_atari.Actors(args, 400)
    assert fake_ray.made == [(args, 0, 400), (args, 1, 400)]
    fake_ray.answers = [("life", 0)] * 8
    actors.publish("weights", 7)
    fake_ray.timeouts.clear()
    assert [actor for actor, _, _ in actors.receive(patience=5)] == [0, 1]
    assert fake_ray.timeouts == [0, 5, 0]  # the first asks whether Ray lives
    assert [actor for actor, _, _ in actors.receive(patience=0)] == [0, 1, 0, 1, 0, 1]
    assert not any(fake_ray.timeouts[3:])
    assert fake_ray.asked == [7] * 12  # three of each in advance, and one for each that has arrived but for the last


def test_actor_that_cannot_be_made_ends_the_run(fake_ray):
    fake_ray.answers = [apex_dqn_atari.ray.exceptions.ActorDiedError()]
    actors = apex_dqn_atari.Actors(make_args(), 0)
    actors.publish("weights", 7)
    with pytest.raises(SystemExit, match="error: actor 0 failed"):
        list(actors.receive(patience=0))


def test_actor_that_sends_nothing_is_missed(fake_ray, capsys, monkeypatch):
    """Once, after a minute; and anew when it has been heard in between."""
    now = 1000.0
    monkeypatch.setattr(apex_dqn_atari.time, "monotonic", lambda: now)
    actors = apex_dqn_atari.Actors(make_args(), 0)
    actors.publish("weights", 7)
    for wait, arrive, missed in (
        (59, 0, False),
        (2, 0, True),
        (900, 0, False),
        (1, 1, False),
        (59, 0, False),
        (2, 0, True),
    ):
        now += wait
        fake_ray.answers += [("first", 0)] * arrive
        assert len(list(actors.receive(patience=0))) == arrive
        assert ("actor 0 has sent nothing for 60 s" in capsys.readouterr().err) == missed


def test_dead_ray_is_one_sentence(fake_ray, capsys):
    """Before ``ray.get`` and ``ray.put``, which would end the program without a word, and before Ray is closed."""
    actors = apex_dqn_atari.Actors(make_args(), 0)
    actors.publish("weights", 7)
    list(actors.receive(patience=0))
    fake_ray.dead = True
    for ask in (lambda: actors.publish("weights", 8), lambda: next(actors.receive(patience=0))):
        with pytest.raises(SystemExit) as end:
            ask()
        assert end.value.code == 1
        sentence = "error: the raylet, Ray's process on this machine, has died: go on with --resume\n"
        assert capsys.readouterr().err == sentence
    actors.close()
    assert fake_ray.shut_down == 1


@pytest.mark.parametrize(
    "address, message",
    [
        ("local", "Ray cannot start"),
        ("auto", "--ray-address auto is no running cluster of this RAY_AUTH_TOKEN .ray start --head starts one."),
    ],
)
def test_ray_that_does_not_start_is_one_sentence(monkeypatch, address, message):
    def init(address, **options):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(apex_dqn_atari.ray, "init", init)
    with pytest.raises(SystemExit, match=f"^error: {message}: no room$"):
        apex_dqn_atari.start_ray(make_args(ray_address=address))


def test_small_buffer_is_refused_before_ray_starts(monkeypatch):
    """Each game needs the steps of a chunk, n of the chunk before and 3 older frames: 56 with n = 3."""
    started = Mock()
    monkeypatch.setattr(apex_dqn_atari.ray, "init", started)
    monkeypatch.setattr(apex_dqn_atari, "count_cores", lambda: 5)
    args = make_args(num_actors=None, envs_per_actor=2, buffer_size=4 * 2 * 56 - 1)
    message = (
        "^error: --buffer-size 447 is too small for chunks of 4 actors with 2 games each: it must be at least 448$"
    )
    with pytest.raises(SystemExit, match=message):
        apex_dqn_atari.start_ray(args)
    assert not started.called
    args = make_args(num_actors=None, envs_per_actor=2, buffer_size=4 * 2 * 56)
    apex_dqn_atari.start_ray(args)
    assert args.num_actors == started.call_args.kwargs["num_cpus"] == 4


@pytest.mark.parametrize("given, settled", [(None, 4), (5, 5), (6, "is more than the cluster's 5 free CPUs")])
def test_actors_have_all_free_cpus_of_a_cluster_but_one(monkeypatch, given, settled):
    monkeypatch.setattr(apex_dqn_atari.ray, "init", Mock())
    monkeypatch.setattr(apex_dqn_atari.ray, "available_resources", lambda: {"CPU": 5.0})
    args = make_args(num_actors=given, ray_address="auto")
    if given == 6:
        with pytest.raises(SystemExit, match=f"^error: --num-actors 6 {settled}"):
            apex_dqn_atari.start_ray(args)
    else:
        apex_dqn_atari.start_ray(args)
        assert args.num_actors == settled


def test_step_of_another_replay_is_refused(tmp_path):
    """The step of a checkpoint is the sum of its actors' steps."""
    args = make_args(num_actors=2, buffer_size=1000)
    replay = Replay(args, CPU)
    replay.num_steps = [CHUNK, 3 * CHUNK]
    run = Run(args, tmp_path, make_agent(), {"replay": replay})
    run.check_step(8 * CHUNK)
    with pytest.raises(ValueError, match="does not belong to a replay"):
        run.check_step(6 * CHUNK)


def test_loss_that_is_not_finite_ends_the_run():
    agent = make_agent()
    assert agent.metrics.means() == {}
    observations, actions, returns, next_observations, discounts = random_batch()
    agent.update(observations, actions, returns * float("nan"), next_observations, discounts, torch.ones(32))
    with pytest.raises(SystemExit, match="loss became nan"):
        agent.metrics.means()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_end_the_run_with_a_sentence(number):
    """... and not the draw of the next transitions, whose priorities are then nan as well."""
    agent, replay = make_agent(), filled_replay(torch.ones(100, 3))
    agent.q_network.value.bias.data.fill_(number)
    learn = capture_learning(agent.args, agent, replay)
    with pytest.raises(SystemExit, match="became nan|became inf"):
        for _ in range(3):
            learn()
        agent.metrics.means()


@pytest.mark.parametrize("ray_address, free, fits", [("local", 8.2, False), ("local", 8.4, True), ("auto", 8.2, True)])
def test_actors_on_this_machine_need_memory_too(monkeypatch, ray_address, free, fits):
    """Four of them beside a million transitions of 7,070 bytes."""
    monkeypatch.setattr(apex_dqn_atari, "free_memory", lambda device: free * 1e9)
    args = Args(buffer_size=1_000_000, num_actors=4, ray_address=ray_address)
    if fits:
        assert apex_dqn_atari.find_replay_device(args, CPU) == CPU
    else:
        with pytest.raises(
            SystemExit, match="--buffer-size 1000000 with 4 actors on this machine needs 8.3 GB and cpu has 8.2 GB"
        ):
            apex_dqn_atari.find_replay_device(args, CPU)


def test_settings_are_those_of_the_paper():
    args = Args()
    assert (args.n_step, args.batch_size, args.buffer_size, args.learning_starts) == (3, 512, 2_000_000, 50_000)
    assert (args.prioritized_replay_alpha, args.prioritized_replay_beta) == (0.6, 0.4)
    assert (args.learning_rate, args.max_grad_norm, args.target_network_frequency) == (6.25e-5, 40, 2500)
    assert args.weights_frequency == 100
    group = make_agent().optimizer.param_groups[0]
    assert (group["alpha"], group["centered"], group["momentum"]) == (0.95, True, 0)
    assert group["eps"] ** 2 == pytest.approx(1.5e-7)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"n_step": 47}, "--n-step is 47: it must be between 1 and 46"),
        ({"num_actors": 0}, "--num-actors is 0: it must be between 1 and 1,000"),
        ({"prioritized_replay_alpha": 1.5}, "--prioritized-replay-alpha is 1.5: it must be between 0 and 1"),
        ({"steps_per_update": 0.0}, "--steps-per-update is 0.0"),
        ({"learning_starts": 500}, "--batch-size 512 is more than the 500 transitions"),
        ({"buffer_size": 500}, "--batch-size 512 is more than the 500 transitions"),
        ({"max_episode_frames": 399}, "--max-episode-frames is 399"),
    ],
)
def test_flags_out_of_range(flags, message):
    with pytest.raises(SystemExit, match=message):
        check_args(Args(**flags))


def test_missing_ray_is_one_sentence(monkeypatch):
    """A model can be played without it."""
    monkeypatch.setattr(apex_dqn_atari, "ray", None)
    check_args(Args(evaluate="model.pt"))
    with pytest.raises(SystemExit, match="^error: Ray is not installed: pip install"):
        check_args(Args())


# ------------------------------------------------------------------------------------------------------ overlay


GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}


@functools.cache
def started_overlay(num_actions: int) -> tuple[Overlay, ALEState]:
    """An overlay of a game that has begun, and the emulator's state: a cartridge takes long to load."""
    game, full = GAMES[num_actions]
    env = Overlay(Atari(Args(env_id=game, full_action_space=full)), "test", 0.0)
    env.reset(seed=1)
    assert env.action_space.n == num_actions
    return env, env.env.ale.cloneSystemState()


def make_overlay(num_actions: int) -> Overlay:
    """Each has the start of the game before it, and attributes of its own."""
    env, state = started_overlay(num_actions)
    env = copy.copy(env)
    env.env = copy.copy(env.env)
    env.env.ale.restoreSystemState(state)
    env.env.stack, env.env.screens = env.env.stack.copy(), env.env.screens.copy()
    env.new_game()
    return env


def bars(picture: np.ndarray, num_actions: int) -> list[tuple[int, int, tuple]]:
    """Pixels to the left and to the right of the middle, and colour of every bar."""
    pitch = min(36, 324 // num_actions)
    found = []
    for i in range(num_actions):
        row = picture[104 + i * pitch + pitch // 2, 636:765].astype(int)
        masks = {color: np.abs(row - color).sum(1) == 0 for color in (GREEDY, BAR)}
        color = max(masks, key=lambda color: masks[color].sum())
        found.append((int(masks[color][:64].sum()), int(masks[color][65:].sum()), color))
    return found


@pytest.mark.parametrize("num_actions", [3, 6, 18])
@pytest.mark.parametrize("scale, value", [(1, 0.0), (1e-3, 2.0), (1e8, -5.0), (1e30, 1e30)])
def test_bars_show_the_advantages(num_actions, scale, value):
    """From the middle to the right the positive ones, to the left the negative, the largest over the whole half."""
    env = make_overlay(num_actions)
    advantages = np.random.default_rng(num_actions).normal(size=num_actions) * scale
    advantages -= advantages.mean()
    env.note((value, advantages), int(advantages.argmin()))
    for i, (left, right, color) in enumerate(bars(env.render(), num_actions)):
        length = 66 * advantages[i] / np.abs(advantages).max()
        assert right == pytest.approx(max(length, 0), abs=3) and left == pytest.approx(max(-length, 0), abs=3)
        assert color == (GREEDY if i == advantages.argmax() else BAR)


@pytest.mark.parametrize("num_actions", [3, 18])
def test_equal_and_nan_advantages(num_actions):
    env = make_overlay(num_actions)
    for value, advantages in ((0.0, 0.0), (1.0, 1e-7), (np.nan, np.nan), (np.inf, np.inf)):
        env.note((value, np.full(num_actions, advantages)), 0)
        assert all(left <= 2 and right <= 2 for left, right, _ in bars(env.render(), num_actions))


def test_chosen_and_exploring_are_marked(monkeypatch):
    env = make_overlay(6)

    def marked(action):
        env.note((1.0, np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])), action)
        picture = env.render().astype(int)
        frame = np.abs(picture[104:428, 620:775] - CHOSEN).sum(2) == 0
        return np.flatnonzero(frame.any(1)).mean() // 36, "exploring" in drawn_texts(env, monkeypatch)

    assert marked(5) == (5, False)
    assert marked(2) == (2, True)


def test_value_advantage_and_their_sum_are_printed(monkeypatch):
    env = make_overlay(6)
    env.note((2.0, np.array([-0.5, 0.25, 0, 0, 0, 0.25])), 1)
    texts = drawn_texts(env, monkeypatch)
    assert {"V(s) = 2.000", "-0.500", "0.250", "1.500", "2.250", "Pong"} <= set(texts)
    assert texts[texts.index("epsilon") + 1] == "0"
    env.env.max_episode_frames = 1
    env.step(1)
    texts = drawn_texts(env, monkeypatch)
    assert "cut off at the frame limit" in texts and "A(s, a)" not in texts


def test_nothing_overlaps():
    """With the widest texts each column of the panel keeps a gap to the next one, and nothing leaves the canvas."""
    env = make_overlay(18)
    advantages = np.linspace(-9_999.9, 9_999.9, 18)
    for value in (-9_999.9, -1_000.0):
        env.note((value, advantages), 3)
    env.notice = "the video is cut here"
    env.env.episode_return, env.env.episode_length = 1_234_567, 26_999
    panel = np.abs(env.render().astype(int)[:, 480:] - (18, 19, 23)).sum(2) > 60
    assert not panel[:, :20].any() and not panel[:, -20:].any()
    assert not panel[104:428, 145:149].any()  # between names and bars
    assert not panel[104:428, 293:297].any()  # between bars and advantages
    assert not panel[104:428, 371:375].any()  # between advantages and Q-values
    assert not panel[430:434].any() and not panel[552:562].any()  # between bars, trace and facts
    for title in (panel[22:46], panel[78:95], panel[440:457]):  # between title and legend and what is at the right
        assert np.diff(np.flatnonzero(title.any(0))).max() > 14


def test_trace_is_the_value():
    env = make_overlay(6)
    for step in range(5):
        env.note((float(step), np.zeros(6)), 0)
    assert list(env.values) == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
def test_captured_learning_equals_plain_learning(monkeypatch):
    """Sampling, update and priorities in one graph: parameters and priorities agree within float32 rounding."""
    device, results = torch.device("cuda"), []
    # the middle of every share is drawn
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.full(size, 0.5, device=device))
    for captured in (False, True):
        args = make_args(envs_per_actor=4, buffer_size=4000, batch_size=64)
        agent = make_agent(4, device)
        replay = Replay(args, device)
        generator = torch.Generator().manual_seed(0)
        for name in replay.ARRAYS:
            array = getattr(replay, name)
            high = {"frames": 256, "ages": 4, "actions": 4}.get(name)
            shape, options = array.shape, {"generator": generator}
            array.copy_(torch.randint(high, shape, **options) if high else torch.empty(shape).uniform_(**options))

        def learn(agent=agent, replay=replay) -> None:
            *batch, indices = replay.sample(64)
            replay.update_priorities(indices, agent.update(*batch))

        if captured:
            learn = capture_learning(args, agent, replay)
            assert isinstance(learn, CudaGraph)
        for _ in range(20):
            learn()
        results.append((agent, replay))
    (plain, plain_replay), (captured, captured_replay) = results
    means = captured.metrics.means()
    for name, mean in plain.metrics.means().items():
        assert mean == pytest.approx(means[name], rel=1e-3, abs=1e-5)
    torch.testing.assert_close(plain_replay.priorities, captured_replay.priorities, rtol=1e-2, atol=1e-3)
    for a, b in zip(plain.q_network.parameters(), captured.q_network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
