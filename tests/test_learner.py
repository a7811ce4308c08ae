"""DQN's network, acting and update against direct computations and a decision process with a known answer."""

import copy
import inspect
import platform
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import IN_BFLOAT16, random_batch, state_frame, with_small_trunk

import dqn_atari
import ppo_atari
from dqn_atari import SIZE, STACK, Agent, Args, Means, QNetwork, Replay, linear_schedule, multiples

CPU = torch.device("cpu")


def make_agent(num_actions=2, **flags):
    torch.manual_seed(0)
    return Agent(Args(**({"precision": "float32"} | flags)), num_actions, CPU)


@pytest.mark.parametrize(
    "network, precision, rate, limit, num_updates, copy_frequency",
    [
        (QNetwork, "auto", 5e-4, 0.03, 200, 15),
        (with_small_trunk(QNetwork), "float32", 1e-3, 0.01, 500, 25),
        pytest.param(with_small_trunk(QNetwork), *IN_BFLOAT16.values, 1e-3, 0.02, 500, 25, marks=IN_BFLOAT16.marks),
    ],
    ids=["convolutions", "float32", "bfloat16"],
)
@pytest.mark.slow
def test_update_converges_to_value_iteration(monkeypatch, network, precision, rate, limit, num_updates, copy_frequency):
    """A corridor of five states shown as pictures; episodes are cut off at random, which must not change the values.

    Left and right move; right in the last state ends the episode with reward 1; left in the first costs 0.5.
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

    monkeypatch.setattr(dqn_atari, "QNetwork", network)
    agent = make_agent(learning_rate=rate, precision=precision, gamma=gamma)
    replay = Replay(4000, 2, CPU)
    rng, states = np.random.default_rng(0), [0, 2]
    for _ in range(600):
        actions = rng.integers(2, size=2)
        outcomes = [step(state, action) for state, action in zip(states, actions)]
        terminated = np.array([outcome[2] for outcome in outcomes])
        truncated = (rng.random(2) < 0.2) & ~terminated
        frames = torch.stack([state_frame(state) for state in states])
        rewards = torch.tensor([outcome[1] for outcome in outcomes])
        replay.add(frames, torch.tensor(actions), rewards, torch.tensor(terminated), torch.tensor(truncated))
        ended = terminated | truncated
        states = [int(rng.integers(num_states)) if end else outcome[0] for end, outcome in zip(ended, outcomes)]

    for update in range(num_updates):
        agent.update(*replay.sample(16))
        if update % copy_frequency == 0:
            agent.update_target()
    batch = replay.sample(128)
    with torch.no_grad():
        q_values = agent.q_network(batch.observations).numpy()
    in_state = batch.observations[:, -1].float().mean(1).argmax(1).numpy() // 16
    learned = np.stack([q_values[in_state == state].mean(0) for state in range(num_states)])
    np.testing.assert_allclose(learned, expected, atol=limit)


def test_update_is_the_formula():
    """Loss, gradient and Adam's step of one update, computed directly in float64."""
    agent = make_agent()
    with torch.no_grad():
        for parameter in agent.target_network.parameters():
            parameter.mul_(1.1)
    observations, actions, rewards, next_observations, terminated = batch = random_batch()
    network, target = copy.deepcopy(agent.q_network).double(), copy.deepcopy(agent.target_network).double()
    network.dtype = target.dtype = torch.float64
    for model in (network, target):
        model.forward = lambda x, model=model: torch.nn.functional.linear(
            model.trunk(x.double() / 255), model.head.weight, model.head.bias
        )
    expected_loss = 0.0
    values = []
    for i in range(len(actions)):
        value = network(observations[i : i + 1])[0, actions[i]]
        best = target(next_observations[i : i + 1])[0].max().detach()
        td_target = rewards[i] + (0 if terminated[i] else 0.99 * best)
        expected_loss = expected_loss + (td_target - value) ** 2 / len(actions)
        values.append(value.item())
    expected_loss.backward()
    agent.update(*batch)
    expected = {"td_loss": expected_loss.item(), "q_values": np.mean(values)}
    assert agent.metrics.means() == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(agent.q_network.parameters(), network.parameters()):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6)
    before = make_agent().q_network
    for old, parameter in zip(before.parameters(), agent.q_network.parameters()):
        gradient = parameter.grad  # Adam's first step is learning_rate * g / (|g| + eps)
        expected = old - 1e-4 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=0, atol=1e-7)


def test_update_leaves_the_target_network_alone():
    agent = make_agent()
    before = copy.deepcopy(agent.target_network.state_dict())
    agent.update(*random_batch())
    assert all(torch.equal(before[name], value) for name, value in agent.target_network.state_dict().items())
    agent.update_target()
    now = agent.q_network.state_dict()
    assert all(torch.equal(now[name], value) for name, value in agent.target_network.state_dict().items())


class Still:
    """Stands in for ``Game``, which takes long to load: a game in which nothing happens."""

    game_ended = False

    def __init__(self, args):
        self.action_space = SimpleNamespace(n=2)
        self.stack = np.zeros((STACK, SIZE, SIZE), np.uint8)

    def reset(self, seed=None):
        return self.stack, {}

    def step(self, action):
        return self.stack, 0.0, False, False, {}

    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    "num_envs, train_frequency, copy_frequency", [(1, 4, 40), (2, 4, 30), (8, 4, 40), (8, 1, 100), (6, 4, 50)]
)
@pytest.mark.slow
def test_updates_and_target_copies_come_in_time(monkeypatch, tmp_path, num_envs, train_frequency, copy_frequency):
    """The sequence of both, counted in steps as the serial algorithm counts them."""
    events = []
    monkeypatch.setattr(Agent, "update", lambda self, *batch: events.append("update"))
    monkeypatch.setattr(dqn_atari, "evaluate", lambda *arguments, **flags: None)
    original = Agent.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self.update_target = lambda: events.append("target")

    monkeypatch.setattr(Agent, "__init__", init)
    monkeypatch.setattr(dqn_atari, "Game", Still)
    args = Args(env_id="Pong", num_envs=num_envs, train_frequency=train_frequency, batch_size=8, precision="float32")
    args.target_network_frequency, args.total_timesteps, args.learning_starts = copy_frequency, 300, 101
    args.buffer_size, args.wandb_mode, args.num_workers = 400, "disabled", 0
    dqn_atari.train(args, CPU, tmp_path, None)
    expected = []
    for step in range(num_envs, 300 + num_envs, num_envs):
        if step > 101:
            reached = range(step - num_envs + 1, step + 1)
            expected += ["update"] * sum(t % train_frequency == 0 for t in reached)
            expected += ["target"] * any(t % copy_frequency == 0 for t in reached)
    assert events == expected


def test_acting_is_epsilon_greedy():
    agent = make_agent(num_actions=4)
    observations = random_batch(200)[0]
    greedy = agent.q_network(observations).argmax(1)
    assert torch.equal(agent.act(observations, torch.tensor(0.0)), greedy)
    explored = torch.stack([agent.act(observations, torch.tensor(1.0)) for _ in range(5)]).flatten()
    assert torch.bincount(explored, minlength=4).min() > 180  # of 250 expected
    half = torch.stack([agent.act(observations, torch.tensor(0.5)) == greedy for _ in range(5)]).float().mean()
    assert half.item() == pytest.approx(0.5 + 0.5 / 4, abs=0.06)


def test_epsilon_schedule():
    values = [linear_schedule(1.0, 0.1, 100, t) for t in (0, 50, 100, 1000)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert linear_schedule(0.0, 0.0, 100, 50) == 0.0


def decayed(agent) -> torch.optim.Optimizer:
    return torch.optim.AdamW(agent.q_network.parameters(), 1e-2, weight_decay=0.1, fused=True)


def grouped(agent) -> torch.optim.Optimizer:
    """Two groups, and a parameter on which no loss depends."""
    unused = torch.nn.Parameter(torch.zeros(3))
    groups = [{"params": agent.q_network.trunk.parameters()}]
    groups += [{"params": [unused, *agent.q_network.head.parameters()], "lr": 1e-2}]
    return torch.optim.Adam(groups, 1e-3)


@pytest.mark.parametrize("make_optimizer", [decayed, grouped])
def test_agent_with_another_optimizer_goes_on_where_it_was_saved(make_optimizer):
    agents = [make_agent(), make_agent()]
    for agent in agents:
        agent.optimizer = make_optimizer(agent)
    first, moved = agents
    for _ in range(3):
        first.update(*random_batch())
    moved.load_state_dict(copy.deepcopy(first.state_dict()))
    for agent in agents:
        agent.update(*random_batch())
    for ours, theirs in zip(moved.q_network.parameters(), first.q_network.parameters()):
        assert torch.equal(ours, theirs)


def test_bfloat16_trunk_stays_close_to_float32():
    torch.manual_seed(0)
    network, half = QNetwork(4), QNetwork(4, torch.bfloat16)
    half.load_state_dict(network.state_dict())
    observations = random_batch()[0]
    q_values = half(observations)
    assert q_values.dtype == torch.float32
    torch.testing.assert_close(q_values, network(observations), rtol=0, atol=5e-3)
    assert not torch.equal(q_values, q_values.bfloat16().float())  # the output layer is exact


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.slow
def test_freed_memory_is_kept(kept):
    """90 MB that come and go cost no page fault after the first time, and thousands if nothing is done for it.

    In a process that has nothing but this function: to import the script takes much longer.
    """
    lines = ["import ctypes, resource, sys", inspect.getsource(dqn_atari.keep_freed_memory)]
    lines += ["keep_freed_memory()"] if kept else []
    lines += ["faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt"]
    lines += ["use = lambda: len([bytearray(30 * 2**20) for _ in range(3)])", "use(), use()", "before = faults()"]
    lines += ["use(), use(), use()", "print(faults() - before)"]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(result.stdout) < 100) == kept


def test_loss_that_is_not_finite_ends_the_run():
    agent = make_agent()
    assert agent.metrics.means() == {}
    observations, actions, rewards, next_observations, terminated = random_batch()
    agent.update(observations, actions, rewards * float("nan"), next_observations, terminated)
    with pytest.raises(SystemExit, match="td_loss became nan"):
        agent.metrics.means()


def test_metrics_are_means_since_they_were_taken():
    metrics = Means(CPU)
    metrics.add({"loss": torch.tensor([1.0, 3.0]), "share": torch.tensor([True, False])})
    metrics.add({"loss": torch.tensor(5.0), "rare": torch.tensor(7)})
    saved = copy.deepcopy(metrics.state_dict())
    means = {"loss": 3.5, "share": 0.5, "rare": 7.0}
    assert metrics.means() == metrics.take() == means
    assert metrics.take() == {}
    metrics.add({"loss": torch.tensor(2.0)})
    assert metrics.means() == {"loss": 2.0}
    metrics.load_state_dict(saved)
    assert metrics.means() == means


@pytest.mark.parametrize("frequency, expected", [(0, 0), (1, 8), (4, 2), (5, 2), (8, 1), (17, 0), (100, 0)])
def test_multiples_that_were_passed(frequency, expected):
    assert multiples(frequency, 8, 16) == expected


def test_log_without_a_progress_bar_has_a_line_a_minute(monkeypatch, tmp_path, capsys):
    args = Args(wandb_mode="disabled", total_timesteps=100_000)
    clock = [0.0]
    monkeypatch.setattr(dqn_atari.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(dqn_atari, "catch_signals", list)
    run = dqn_atari.Run(args, tmp_path, make_agent(), {})
    run.start(None)
    with closing(run):
        for step in range(1000, 7000, 1000):
            clock[0] += 25
            run.log({"charts/epsilon": 0.5}, step)
            if step == 4000:
                run.log_games([{"r": r, "l": 100, "repeated_rewards": 0.0} for r in (3.0, 6.0)], step)
    assert capsys.readouterr().out.splitlines() == [
        "step 3,000 of 100,000: SPS 40, epsilon 0.5, return nan, 0.7 hours left at this speed",
        "step 6,000 of 100,000: SPS 40, epsilon 0.5, return 4.5, 0.7 hours left at this speed",
    ]


def test_time_of_checkpoints_and_evaluations_is_no_part_of_the_speed(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(dqn_atari.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(dqn_atari, "catch_signals", list)
    monkeypatch.setattr(dqn_atari, "evaluate", lambda *arguments: clock.__setitem__(0, clock[0] + 100))
    monkeypatch.setattr(dqn_atari, "save", lambda *arguments: clock.__setitem__(0, clock[0] + 1000))
    logged = []
    run = dqn_atari.Run(Args(wandb_mode="disabled"), tmp_path, make_agent(), {})
    run.start(None)
    run.tracker.log = lambda metrics, global_step: logged.append(metrics["charts/SPS"])
    with closing(run):
        clock[0] += 10
        run.evaluate(1000)
        run.save_checkpoint(1000)
        run.log({}, 1000)
    assert logged == [100]


@pytest.mark.parametrize(
    "frequency, start, expected",
    [
        (1000, 0, [100, 1000, 2000]),
        (1000, 100, [1000, 2000]),  # resumed right after the first
        (1000, 1996, [2000]),
        (7, 2380, [2388, 2396]),  # the multiples 2387 and 2394 lie between steps of 4 games
        (0, 0, []),
    ],
)
def test_evaluations_come_after_a_tenth_and_at_multiples(monkeypatch, tmp_path, frequency, start, expected):
    args = Args(wandb_mode="disabled", total_timesteps=2400, eval_frequency=frequency, checkpoint_minutes=0)
    run = dqn_atari.Run(args, tmp_path, make_agent(), {})
    run.checkpoint_time, run.evaluated_step, run.stop_signals = 0.0, start, []
    evaluated = []
    monkeypatch.setattr(run, "evaluate", evaluated.append)
    for step in range(start + 4, 2404, 4):
        run.save_and_evaluate(step)
    assert evaluated == expected


@pytest.mark.parametrize("module", [dqn_atari, ppo_atari])
def test_checkpoints_come_by_the_clock(monkeypatch, module):
    """15 minutes after the end of the last one, which may have failed; in the last step it is the end that saves."""
    clock, saved = [0.0], []

    def save(step):
        saved.append((step, clock[0]))
        clock[0] += 450

    run = module.Run(module.Args(total_timesteps=4000, eval_frequency=0), None, None, {})
    run.checkpoint_time, run.evaluated_step, run.stop_signals = 0, 0, []
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run, "save_checkpoint", save)
    for step in range(1000, 5000, 1000):
        clock[0] += 500
        run.save_and_evaluate(step)
    assert saved == [(2000, 1000)]
    clock[0] += 1000
    run.args.checkpoint_minutes = 0
    run.save_and_evaluate(2000)
    assert len(saved) == 1
