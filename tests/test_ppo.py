"""PPO's network, rollout, losses, overlay and ranks against direct computations and a decision process."""

import copy
import functools
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import (
    IN_BFLOAT16,
    assert_group_is_gone,
    children,
    drawn_texts,
    run,
    run_folder,
    start,
    state_frame,
    wait_for,
    with_small_trunk,
)

import ppo_atari
from ppo_atari import (
    BAR,
    CHOSEN,
    GAIN,
    GREEDY,
    LOSS,
    SIZE,
    STACK,
    TEXT,
    ActorCritic,
    Agent,
    Args,
    Atari,
    CudaGraph,
    Halves,
    Minibatch,
    Overlay,
    Rollout,
    check_args,
    derive_seed,
    explained_variance,
    normalize,
)

CPU = torch.device("cpu")


def make_agent(num_actions=4, **flags):
    torch.manual_seed(0)
    return Agent(Args(**({"precision": "float32"} | flags)), num_actions, CPU)


def make_rollout(num_steps: int, num_envs: int, device=CPU, **flags) -> Rollout:
    return Rollout(Args(num_steps=num_steps, **flags), num_envs, device)


def random_minibatch(size=24, num_actions=4):
    """Old probabilities and values near the network's own, so that some are clipped at 0.1 and some are not."""
    generator = torch.Generator().manual_seed(3)
    agent = make_agent(num_actions)
    observations = torch.randint(0, 256, (size, STACK, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    actions = torch.randint(num_actions, (size,), generator=generator)
    with torch.no_grad():
        logits, values = agent.network(observations)
    logprobs = logits.log_softmax(1).gather(1, actions[:, None]).squeeze(1)
    logprobs = logprobs + 0.3 * torch.randn(size, generator=generator)
    values = values + 0.15 * torch.randn(size, generator=generator)
    returns = values + torch.randn(size, generator=generator)
    advantages = torch.randn(size, generator=generator)
    return Minibatch(observations, actions, logprobs, values, returns), advantages


# ------------------------------------------------------------------------------------------ rollout and statistics


def direct_advantages(rewards, terminated, truncated, values, final_values, gamma, gae_lambda):
    """The sum of (gamma lambda)^k delta_(t+k) up to the end of the episode, a double loop in float64.

    ``values`` has the state after the last step as its last row; ``final_values`` are those of the last states of
    truncated episodes.
    """
    num_steps, num_envs = rewards.shape
    advantages = np.zeros((num_steps, num_envs))
    for env in range(num_envs):
        for first in range(num_steps):
            weight = 1.0
            for t in range(first, num_steps):
                if terminated[t, env]:
                    next_value = 0.0
                elif truncated[t, env]:
                    next_value = final_values[t, env]
                else:
                    next_value = values[t + 1, env]
                advantages[first, env] += weight * (rewards[t, env] + gamma * next_value - values[t, env])
                if terminated[t, env] or truncated[t, env]:
                    break
                weight *= gamma * gae_lambda
    return advantages


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.0), (0.5, 1.0), (1.0, 1.0)])
def test_advantages_with_both_kinds_of_endings(gamma, gae_lambda):
    rng = np.random.default_rng(0)
    shape = (40, 5)
    rewards, final_values = rng.normal(size=shape), rng.normal(size=shape)
    values = rng.normal(size=(41, 5))
    kinds = rng.random(shape)
    terminated, truncated = kinds < 0.1, (kinds > 0.8)
    terminated[-1, 0], truncated[-1, 1] = True, True  # at the end of the rollout too
    truncated &= ~terminated
    expected = direct_advantages(rewards, terminated, truncated, values, final_values, gamma, gae_lambda)
    rollout = make_rollout(*shape, gamma=gamma, gae_lambda=gae_lambda)
    rollout.values.copy_(torch.from_numpy(values))
    bootstrapped = (rewards + gamma * final_values * truncated).astype(np.float32)
    rollout.estimate_advantages(torch.from_numpy(bootstrapped), torch.from_numpy(terminated | truncated))
    np.testing.assert_allclose(rollout.advantages.numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rollout.returns.numpy(), expected + values[:-1], rtol=0, atol=1e-5)


def test_rollout_larger_than_memory_is_refused():
    with pytest.raises(SystemExit, match=r"error: --num-steps 1000000000 needs 225792.0 GB and cpu has .* GB for it"):
        make_rollout(10**9, 8)


def test_minibatch_has_the_steps_of_its_indices():
    """... with observations in the memory format that the convolutions want."""
    rollout = make_rollout(5, 3)
    observations = torch.randint(0, 256, rollout.observations.shape, dtype=torch.uint8)
    rollout.observations.copy_(observations)
    rollout.actions.copy_(torch.arange(15).view(5, 3))
    for first, array in ((100, rollout.logprobs), (200, rollout.values[:-1]), (300, rollout.returns)):
        array.copy_(first + torch.arange(15.0).view(5, 3))
    indices = torch.tensor([14, 0, 4, 11])
    minibatch = rollout.minibatch(indices)
    for first, array in ((100, minibatch.logprobs), (200, minibatch.values), (300, minibatch.returns)):
        assert torch.equal(array, first + indices.float())
    assert torch.equal(minibatch.observations, observations.flatten(0, 1)[indices])
    assert minibatch.observations.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(minibatch.actions, indices)


def test_games_of_all_ranks_are_logged_in_the_order_of_their_ends(monkeypatch, tmp_path):
    def game(step: int, total: float) -> dict:
        return {"r": total, "l": 7, "repeated_rewards": 0.0, "global_step": step}

    monkeypatch.setattr(ppo_atari, "gather", lambda games: [games, [game(20, 3.0), game(50, 4.0)]])
    run = ppo_atari.Run(Args(), tmp_path, None, {})
    run.tracker, logged = Mock(), []
    run.tracker.log = lambda charts, step: logged.append((step, charts["charts/episodic_return"]))
    run.log_games([game(30, 1.0), game(50, 2.0)])
    assert logged == [(20, 3.0), (30, 1.0), (50, 3.0)]  # the last is the mean of two
    assert list(run.returns) == [3.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "restarts, local_world_size, flags, resumed",
    [(1, 2, "", "new"), (0, 2, "", None), (0, 1, "", "new"), (1, 2, "--resume mine", None)],
    ids=["restart", "first start", "restart of another machine's rank", "resumed already"],
)
def test_restart_finds_the_newest_checkpoint_of_its_launch(
    monkeypatch, tmp_path, restarts, local_world_size, flags, resumed
):
    """Checkpoints of other launches or algorithms, and damaged ones, are passed over."""
    launches = {"dqn": "a", "damaged": "a", "model": "a", "other": "b", "new": "a", "old": "a"}
    for age, (name, launch) in enumerate(launches.items()):
        path = tmp_path / f"Breakout__ppo_atari__1__{name}" / "checkpoint.pt"
        path.parent.mkdir()
        contents = {"algorithm": "PPO", "precision": "float32", "ranks": [{"launch": "c"}, {"launch": launch}]}
        if name == "dqn":
            contents["algorithm"] = "DQN"
        if name == "model":
            del contents["ranks"]
        torch.save(contents, path)
        if name == "damaged":
            path.write_bytes(b"PK")
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(sys, "argv", ["ppo_atari.py", "--run-dir", str(tmp_path), *flags.split()])
    for name, value in (("RESTARTS", restarts), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", local_world_size)):
        monkeypatch.setattr(ppo_atari, name, value)
    monkeypatch.setattr(ppo_atari, "LAUNCH", "a")
    before = list(sys.argv)
    ppo_atari.resume_after_restart()
    found = ["--resume", str(tmp_path / f"Breakout__ppo_atari__1__{resumed}" / "checkpoint.pt")] if resumed else []
    assert sys.argv == before + found


def test_statistics_of_rows():
    rows = torch.randn(3, 50) * torch.tensor([[1.0], [10.0], [0.1]]) + torch.tensor([[0.0], [100.0], [-1.0]])
    exact = rows.double()
    expected = (exact - exact.mean(1, keepdim=True)) / (exact.std(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(normalize(rows).double(), expected, rtol=0, atol=1e-4)

    returns, noise = rows[0] * 3 + 5, rows[2]
    expected = 1 - np.var(noise.numpy()) / np.var(returns.numpy())
    assert explained_variance(returns + noise, returns) == pytest.approx(expected, abs=1e-4)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full_like(returns, 3.0), returns) == pytest.approx(0, abs=1e-5)
    assert math.isnan(explained_variance(noise, torch.ones(50)))


@pytest.mark.parametrize(
    "num_envs, num_workers, precision",
    [(3, 0, "float32"), (3, 2, "bfloat16"), (4, 2, "float32")],
    ids=["one process", "two workers", "in halves"],
)
@pytest.mark.slow
def test_rollout_is_what_the_games_did(monkeypatch, tmp_path, num_envs, num_workers, precision):
    """Two iterations of ``train`` on a real game with cut-off and ended episodes, against games played one by one.

    The games are given the actions that the rollout holds; their observations, rewards and ends, and the networks' own
    probabilities and values, must then be those of the rollout, and the advantages those of the direct sum.
    """
    args = Args(env_id="Breakout", num_envs=num_envs, num_workers=num_workers, num_steps=80, num_minibatches=2)
    args.max_episode_frames, args.total_timesteps, args.wandb_mode = 220, 160 * num_envs, "disabled"
    args.update_epochs = 1
    args.precision, args.seed = precision, 5
    monkeypatch.setattr(ppo_atari, "ActorCritic", with_small_trunk(ActorCritic))
    monkeypatch.setattr(ppo_atari, "LOG_FREQUENCY", 1)
    args.learning_rate = 0.01  # after an iteration the network is another one: who plays with the old one is found out
    rollouts, networks, original = [], [], Rollout.estimate_advantages

    def estimate_advantages(self, *arguments):
        original(self, *arguments)
        rollouts.append(copy.deepcopy(self))
        networks.append(copy.deepcopy(agents[0].network))

    agents, init = [], Agent.__init__
    monkeypatch.setattr(Rollout, "estimate_advantages", estimate_advantages)
    monkeypatch.setattr(Agent, "__init__", lambda self, *arguments: (agents.append(self), init(self, *arguments))[1])
    monkeypatch.setattr(ppo_atari, "evaluate", lambda *arguments, **flags: None)
    tracker = Mock(run_id="1")
    made, halves = [], Halves.__init__
    monkeypatch.setattr(Halves, "__init__", lambda self, *arguments: (made.append(self), halves(self, *arguments))[1])
    monkeypatch.setattr(ppo_atari, "Tracker", lambda *_, **flags: tracker)
    assert ppo_atari.train(args, CPU, tmp_path, None) == 0
    assert len(rollouts) == 2
    assert [len(half.workers) for half in made[0].halves] == ([1, 1] if num_envs == 4 else [num_workers])
    tolerance = {"rtol": 0.05, "atol": 0.05} if precision == "bfloat16" else {}
    games = [ppo_atari.Atari(args) for _ in range(num_envs)]
    observations = np.stack([game.reset(seed=derive_seed(5, i))[0] for i, game in enumerate(games)])
    kinds, logged = np.zeros(2, int), []
    for iteration, (rollout, network) in enumerate(zip(rollouts, networks)):
        rewards, terminated, truncated, final_values = np.zeros((4, 80, num_envs))
        played, expected_ended = [observations.copy()], []
        for t in range(80):
            for i, game in enumerate(games):
                action = int(rollout.actions[t, i])
                observation, rewards[t, i], terminated[t, i], truncated[t, i], info = game.step(action)
                truncated[t, i] *= not terminated[t, i]
                expected_ended += [(t + 1, info["episode"]["r"])] if info else []
                if truncated[t, i]:
                    final_values[t, i] = network(torch.from_numpy(observation[None]))[1].item()
                observations[i] = game.reset()[0] if terminated[t, i] or truncated[t, i] else observation
            played.append(observations.copy())
        assert torch.equal(rollout.observations, torch.from_numpy(np.stack(played)))
        with torch.no_grad():
            logits, values = network(rollout.observations.flatten(0, 1))
        torch.testing.assert_close(rollout.values, values.view(81, num_envs), **tolerance)
        log_policy = logits.log_softmax(1).view(81, num_envs, -1)[:80]
        log_policy = log_policy.gather(2, rollout.actions[:, :, None]).squeeze(2)
        torch.testing.assert_close(rollout.logprobs, log_policy, **tolerance)
        logged += [((80 * iteration + step) * num_envs, episodic_return) for step, episodic_return in expected_ended]
        kinds += [int(terminated.sum()), int(truncated.sum())]
        direct = (rewards, terminated, truncated, rollout.values.numpy(), final_values, args.gamma, args.gae_lambda)
        expected = direct_advantages(*direct)
        np.testing.assert_allclose(rollout.advantages.numpy(), expected, rtol=0, atol=tolerance.get("atol", 1e-4))
    assert kinds.min() >= 3  # both kinds of endings occurred
    rows = [call.args for call in tracker.log.call_args_list if "charts/episodic_return" in call.args[0]]
    points = {step: metrics["charts/episodic_return"] for metrics, step in rows}
    returns = {step: [game[1] for game in logged if game[0] == step] for step, _ in logged}
    assert points == {step: np.mean(ended_together) for step, ended_together in returns.items()}
    charts = [call.args[0] for call in tracker.log.call_args_list if "charts/learning_rate" in call.args[0]]
    assert [chart["charts/learning_rate"] for chart in charts] == pytest.approx([0.01, 0.005])
    for chart, rollout in zip(charts, rollouts):
        errors = (rollout.returns - rollout.values[:-1]).numpy()
        explained = 1 - errors.var() / rollout.returns.numpy().var()
        assert chart["losses/explained_variance"] == pytest.approx(explained, rel=1e-3, abs=1e-4)


def play(games: Halves, actions: np.ndarray) -> np.ndarray:
    """The observations before and after each of the steps with ``actions`` [steps, envs]."""
    seen = [np.concatenate([half.observations for half in games.halves])]
    for of_step in actions:
        for half in games.halves:
            half.send(of_step[half.columns])
        seen.append(np.concatenate([half.recv()[0] for half in games.halves]))
    return np.stack(seen)


def assert_workers_have_ended(games: Halves) -> None:
    for half in games.halves:  # those that had to be killed held up the end of the run
        assert [worker.exitcode for worker in half.workers] == [0] * len(half.workers)


@pytest.fixture(scope="module")
def games_in_halves() -> tuple[list[dict], np.ndarray, np.ndarray]:
    """The states of four games that have begun, the actions of the 20 steps that follow, and what is seen of them."""
    actions = np.random.default_rng(0).integers(6, size=(40, 4))
    with closing(Halves(Args(env_id="Pong", num_envs=4, num_workers=2))) as games:
        games.reset(3, first=0)
        play(games, actions[:20])
        states = games.state_dict()
        seen = play(games, actions[20:])
    assert_workers_have_ended(games)
    return states, actions[20:], seen


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.slow
def test_games_go_on_where_they_were(games_in_halves, num_workers):
    """... however they are divided among halves and processes."""
    states, actions, seen = games_in_halves
    assert len({stack.tobytes() for stack in seen[-1]}) == 4  # no two games are alike
    with closing(Halves(Args(env_id="Pong", num_envs=4, num_workers=num_workers))) as others:
        others.load_state_dict(states)
        np.testing.assert_array_equal(play(others, actions), seen)
    assert_workers_have_ended(others)


# ----------------------------------------------------------------------------------------------- acting and learning


def test_network_starts_as_it_should():
    """Orthogonal weights of the gains that PPO is known to need, no biases, an almost uniform policy."""
    torch.manual_seed(0)
    network = ActorCritic(4)
    layers = [layer for layer in network.trunk if hasattr(layer, "weight")] + [network.actor, network.critic]
    for layer, gain in zip(layers, [2**0.5] * 4 + [0.01, 1.0]):
        weight = layer.weight.detach().flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), rtol=0, atol=1e-5)
        assert not layer.bias.any()
    logits, values = network(random_minibatch()[0].observations)
    assert logits.shape == (24, 4) and values.shape == (24,)
    assert logits.softmax(1).sub(0.25).abs().max() < 0.01


@pytest.mark.slow
def test_actions_are_drawn_from_the_policy(monkeypatch):
    """Frequencies of 3,000 actions in two states, with the log probabilities and values that belong to them."""
    monkeypatch.setattr(ppo_atari, "ActorCritic", with_small_trunk(ActorCritic))
    agent = make_agent(10)
    with torch.no_grad():
        agent.network.actor.weight.mul_(150)
        agent.network.actor.bias[3] += 2  # one action is probable: with few alike, a wrong draw may look right
        observations = torch.randint(0, 256, (2, STACK, SIZE, SIZE), dtype=torch.uint8)
        observations[1, :, : SIZE // 2] = 0  # another state, not only another noise
        logits, expected_values = agent.network(observations)
        policy = logits.softmax(1)
    assert policy.max() > 0.4 and policy.min() > 0.01 and (policy[0] - policy[1]).abs().max() > 0.05
    torch.manual_seed(0)
    actions, logprobs, values = agent.act(observations.repeat_interleave(1500, 0))
    torch.testing.assert_close(values, expected_values.repeat_interleave(1500))
    torch.testing.assert_close(logprobs.exp(), policy.repeat_interleave(1500, 0).gather(1, actions[:, None])[:, 0])
    for state in range(2):
        drawn = torch.bincount(actions[state * 1500 : (state + 1) * 1500], minlength=10) / 1500
        torch.testing.assert_close(drawn, policy[state], rtol=0, atol=0.052)  # four standard deviations

    rng = np.random.default_rng(0)
    thoughts = [agent.think(observations[0], rng) for _ in range(1500)]
    (probabilities, value), _ = thoughts[0]
    np.testing.assert_allclose(probabilities, policy[0], rtol=1e-4)
    assert value == pytest.approx(expected_values[0].item(), rel=1e-4)
    drawn = np.bincount([action for _, action in thoughts], minlength=10) / 1500
    np.testing.assert_allclose(drawn, policy[0], rtol=0, atol=0.052)


def test_evaluation_leaves_the_random_state_of_training_alone():
    agent, observation = make_agent(), torch.randint(0, 256, (STACK, SIZE, SIZE), dtype=torch.uint8)
    before = torch.get_rng_state()
    actions = [[agent.think(observation, rng)[1] for _ in range(20)] for rng in map(np.random.default_rng, (1, 1, 2))]
    assert torch.equal(before, torch.get_rng_state())
    assert actions[0] == actions[1] != actions[2]


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_update_is_the_formula(clip_vloss):
    """Metrics, gradients, clipping of their norm and Adam's step of one update, sample by sample in float64."""
    clip, ent_coef, vf_coef, size = 0.17, 0.02, 0.7, 24
    agent = make_agent(ent_coef=ent_coef, vf_coef=vf_coef, clip_vloss=clip_vloss, clip_coef=clip, learning_rate=0.5)
    agent.learning_rate.fill_(1e-3)
    minibatch, advantages = random_minibatch(size)
    exact = copy.deepcopy(agent.network).double()
    features = exact.trunk(minibatch.observations.double() / 255)
    policies, values = exact.actor(features).softmax(1), exact.critic(features)[:, 0]
    names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
    sums, clipped = dict.fromkeys(names, 0.0), {"up": 0, "down": 0, "value": 0}
    for i in range(size):
        action, advantage, target = minibatch.actions[i], advantages[i].double(), minibatch.returns[i].double()
        ratio = policies[i, action] / minibatch.logprobs[i].double().exp()
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        clipped["up"] += bool(ratio > 1 + clip and advantage > 0)
        clipped["down"] += bool(ratio < 1 - clip and advantage < 0)
        sums["policy_loss"] -= min(ratio * advantage, bounded * advantage)
        squared_error = (values[i] - target) ** 2
        if clip_vloss:
            old = minibatch.values[i].double()
            near = old + min(max(values[i] - old, torch.tensor(-clip)), torch.tensor(clip))
            clipped["value"] += bool((near - target) ** 2 > squared_error)
            squared_error = max(squared_error, (near - target) ** 2)
        sums["value_loss"] += squared_error / 2
        sums["entropy"] -= sum(p * p.log() for p in policies[i])
        sums["old_approx_kl"] -= ratio.log()
        sums["approx_kl"] += ratio - 1 - ratio.log()
        sums["clipfrac"] += float(abs(ratio - 1) > clip)
    assert min(clipped["up"], clipped["down"]) > 0 and (clipped["value"] > 0) == clip_vloss  # all cases occur
    expected = {name: total / size for name, total in sums.items()}
    (expected["policy_loss"] - ent_coef * expected["entropy"] + vf_coef * expected["value_loss"]).backward()

    before = copy.deepcopy(agent.network)
    approx_kl = agent.compute_gradients(*minibatch, advantages)
    first = agent.metrics.take()
    assert list(first) == list(names) and first["approx_kl"] == approx_kl.item()
    for name, value in first.items():
        assert value == pytest.approx(float(torch.as_tensor(expected[name]).detach()), rel=1e-4, abs=1e-6), name
    gradients = [parameter.grad.clone() for parameter in agent.network.parameters()]
    for ours, theirs in zip(gradients, exact.parameters()):
        torch.testing.assert_close(ours.double(), theirs.grad, rtol=1e-3, atol=1e-6)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert norm > agent.args.max_grad_norm  # so that clipping is seen
    agent.apply_gradients()
    for old, parameter, gradient in zip(before.parameters(), agent.network.parameters(), gradients):
        g = gradient * agent.args.max_grad_norm / norm  # Adam's first step is learning_rate * g / (|g| + eps)
        torch.testing.assert_close(parameter.detach(), (old - 1e-3 * g / (g.abs() + 1e-5)).detach(), rtol=0, atol=1e-6)


def test_metrics_are_means_over_minibatches():
    agent = make_agent()
    minibatch, advantages = random_minibatch()
    single = []
    for factor in (1, 2):
        agent.compute_gradients(*minibatch, factor * advantages)
        single.append(agent.metrics.take())
        assert agent.metrics.take() == {}
    for factor in (1, 2):
        agent.compute_gradients(*minibatch, factor * advantages)
    for name, mean in agent.metrics.take().items():
        assert mean == pytest.approx((single[0][name] + single[1][name]) / 2, rel=1e-5)


def test_loss_that_is_not_finite_ends_the_run():
    agent = make_agent()
    assert agent.metrics.means() == {}
    minibatch, advantages = random_minibatch()
    agent.compute_gradients(*minibatch, advantages * float("nan"))
    with pytest.raises(SystemExit, match="policy_loss became nan"):
        agent.metrics.means()


@pytest.mark.parametrize("precision, limit", [("float32", 1e-7), ("bfloat16", 1e-5)])
def test_acting_and_learning_agree_on_the_policy(precision, limit):
    """Before the first update the new policy is the old one: rounding in batches of another size is all there is."""
    agent = make_agent(precision=precision)
    with torch.no_grad():
        agent.network.actor.weight.mul_(100)
    observations = random_minibatch(64)[0].observations
    parts = [agent.act(part) for part in observations.split(4)]
    actions, logprobs, values = (torch.cat(part) for part in zip(*parts))
    agent.compute_gradients(observations, actions, logprobs, values, values, torch.ones(64))
    metrics = agent.metrics.means()
    assert metrics["approx_kl"] < limit and metrics["clipfrac"] == 0 and metrics["entropy"] < 1.35


def test_weights_are_cast_once_while_the_games_are_played(monkeypatch):
    """... on a CPU, and anew for the next iteration. A CUDA graph takes no cast from outside: it would be freed."""
    agent = make_agent(precision="bfloat16")
    observations = random_minibatch()[0].observations
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with ppo_atari.sharing_cores(CPU):
        assert threads == [1]
        before = agent.value(observations)
        with torch.no_grad():
            agent.network.trunk[7].weight.neg_()
        assert torch.equal(agent.value(observations), before)
    assert threads == [1, 3]
    with ppo_atari.sharing_cores(CPU):
        assert not torch.equal(agent.value(observations), before)
    with ppo_atari.sharing_cores(torch.device("cuda")):
        assert not torch.is_autocast_cache_enabled()


def count_updates(monkeypatch, tmp_path, **flags):
    """Runs two iterations of ``train`` and returns what each update was given: indices and learning rate."""
    updates, original = [], Rollout.minibatch

    def minibatch(self, indices):
        updates.append((indices.tolist(), agents[0].learning_rate.item()))
        return original(self, indices)

    agents, init = [], Agent.__init__
    monkeypatch.setattr(Rollout, "minibatch", minibatch)
    monkeypatch.setattr(Agent, "__init__", lambda self, *arguments: (agents.append(self), init(self, *arguments))[1])
    monkeypatch.setattr(ppo_atari, "evaluate", lambda *arguments, **flags: None)
    args = Args(env_id="Pong", num_envs=2, num_steps=6, num_minibatches=3, update_epochs=2, num_workers=0)
    args.total_timesteps, args.wandb_mode, args.precision = 24, "disabled", "float32"
    for name, value in flags.items():
        setattr(args, name, value)
    assert ppo_atari.train(args, CPU, tmp_path, None) == 0
    return updates


def test_every_step_is_learned_from_once_an_epoch(monkeypatch, tmp_path):
    """... in a new order, at a learning rate that falls from iteration to iteration."""
    updates = count_updates(monkeypatch, tmp_path)
    assert len(updates) == 2 * 2 * 3 and all(len(indices) == 4 for indices, _ in updates)
    epochs = [sum((indices for indices, _ in updates[i : i + 3]), []) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [rate for _, rate in updates] == pytest.approx([2.5e-4] * 6 + [1.25e-4] * 6)


def test_learning_rate_can_stay(monkeypatch, tmp_path):
    assert {rate for _, rate in count_updates(monkeypatch, tmp_path, anneal_lr=False)} == {np.float32(2.5e-4).item()}


@pytest.mark.parametrize("target_kl, epochs", [(1e-12, 1), (1e6, 5)])
def test_target_kl_ends_an_iteration(monkeypatch, tmp_path, target_kl, epochs):
    updates = count_updates(monkeypatch, tmp_path, target_kl=target_kl, update_epochs=5)
    assert len(updates) == 2 * epochs * 3


@pytest.mark.slow
def test_advantages_are_normalized_in_each_minibatch(monkeypatch, tmp_path):
    seen, original = [], Agent.compute_gradients
    spy = lambda self, *batch: (seen.append(batch[-1].clone()), original(self, *batch))[1]  # noqa: E731
    monkeypatch.setattr(Agent, "compute_gradients", spy)
    count_updates(monkeypatch, tmp_path)
    assert len(seen) == 12
    for advantages in seen:
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std().item() == pytest.approx(1, abs=1e-3)
    seen.clear()
    count_updates(monkeypatch, tmp_path, norm_adv=False)
    assert all(advantages.std().item() < 0.9 for advantages in seen)


def corridor(state, action, num_states=5):
    """Next state, reward, terminated: right in the last state ends with reward 1, left in the first costs 0.5."""
    if action == 1:
        return (state, 1.0, True) if state == num_states - 1 else (state + 1, 0.0, False)
    return (0, -0.5, False) if state == 0 else (state - 1, 0.0, False)


@pytest.mark.parametrize(
    "network, precision",
    [
        (ActorCritic, "auto"),
        (with_small_trunk(ActorCritic), "float32"),
        pytest.param(with_small_trunk(ActorCritic), *IN_BFLOAT16.values, marks=IN_BFLOAT16.marks),
    ],
    ids=["convolutions", "float32", "bfloat16"],
)
@pytest.mark.slow
def test_policy_and_values_converge(monkeypatch, network, precision):
    """A corridor of five states shown as pictures; episodes are cut off at random, which must not change the values."""
    num_states, num_envs, num_steps, gamma = 5, 8, 16, 0.8
    monkeypatch.setattr(ppo_atari, "ActorCritic", network)
    agent = make_agent(2, learning_rate=5e-4, ent_coef=0.003, precision=precision, gamma=gamma)
    rollout = make_rollout(num_steps, num_envs, gamma=gamma)
    rng, states = np.random.default_rng(0), [0, 1, 2, 3, 4, 0, 1, 2]
    pictures = torch.stack([state_frame(state).expand(STACK, -1, -1) for state in range(num_states)])
    for iteration in range(14):
        next_values = agent.value(pictures).numpy()
        rewards, ends = np.zeros((num_steps, num_envs), np.float32), np.zeros((num_steps, num_envs), bool)
        for t in range(num_steps):
            rollout.observations[t] = pictures[states]
            rollout.actions[t], rollout.logprobs[t], rollout.values[t] = agent.act(rollout.observations[t])
            outcomes = [corridor(state, action) for state, action in zip(states, rollout.actions[t].tolist())]
            rewards[t], ends[t] = [outcome[1] for outcome in outcomes], [outcome[2] for outcome in outcomes]
            cut_off = (rng.random(num_envs) < 0.2) & ~ends[t]
            rewards[t] += gamma * next_values[[outcome[0] for outcome in outcomes]] * cut_off
            ends[t] |= cut_off
            starts = rng.integers(num_states, size=num_envs)
            states = [int(start) if end else outcome[0] for start, end, outcome in zip(starts, ends[t], outcomes)]
        rollout.observations[-1] = pictures[states]
        rollout.values[-1] = agent.value(rollout.observations[-1])
        rollout.estimate_advantages(torch.from_numpy(rewards), torch.from_numpy(ends))
        agent.learning_rate.fill_(5e-4 * (1 - iteration / 14))
        for _ in range(4):
            indices = torch.randperm(num_steps * num_envs).view(4, -1)
            for rows, advantages in zip(indices, normalize(rollout.advantages.flatten()[indices])):
                agent.compute_gradients(*rollout.minibatch(rows), advantages)
                agent.apply_gradients()
    with torch.no_grad():
        logits, values = agent.network(pictures)
    optimal = [gamma ** (num_states - 1 - state) for state in range(num_states)]
    assert logits.softmax(1)[:, 1].min() > 0.95  # always to the right
    np.testing.assert_allclose(values.numpy(), optimal, atol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_update_equals_plain_update(precision):
    """50 updates at a changing learning rate: parameters and sums of metrics agree within rounding."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    plain, captured = (Agent(Args(precision=precision), 4, device) for _ in range(2))
    captured.load_state_dict(copy.deepcopy(plain.state_dict()))
    compute_gradients, apply_gradients = CudaGraph(captured.compute_gradients), CudaGraph(captured.apply_gradients)
    minibatch, advantages = random_minibatch()
    batch = [x.to(device) for x in (*minibatch, advantages)]
    for step in range(50):
        batch[-1] = batch[-1].roll(1)
        for agent in (plain, captured):
            agent.learning_rate.fill_(2.5e-4 * (1 - step / 50))
        plain.compute_gradients(*batch)
        plain.apply_gradients()
        compute_gradients(*batch)
        apply_gradients()
    assert compute_gradients.graph is not None and apply_gradients.graph is not None
    means = captured.metrics.means()
    for name, mean in plain.metrics.means().items():
        assert means[name] == pytest.approx(mean, rel=1e-2, abs=1e-3)
    for a, b in zip(plain.network.parameters(), captured.network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)


@pytest.mark.gpu
def test_captured_acting_draws_anew():
    """Each replay draws other actions, in the frequencies of the policy; advantages come out as without a graph."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    agent = Agent(Args(precision="float32"), 4, device)
    observations = random_minibatch(500)[0].observations.to(device)
    act = CudaGraph(agent.act)
    draws = [act(observations)[0].clone() for _ in range(8)]
    assert act.graph is not None and not torch.equal(draws[-1], draws[-2])
    assert torch.bincount(draws[-1], minlength=4).min() > 80  # of 125 expected

    rollout, rewards, ends = make_rollout(20, 3, device), torch.randn(20, 3).to(device), torch.rand(20, 3) < 0.1
    ends, estimate_advantages = ends.to(device), CudaGraph(rollout.estimate_advantages)
    for _ in range(5):
        rollout.values.normal_()
        estimate_advantages(rewards, ends)
        advantages = rollout.advantages.clone()
        rollout.estimate_advantages(rewards, ends)
        torch.testing.assert_close(rollout.advantages, advantages)


# ---------------------------------------------------------------------------------------------------------- overlay

GAMES = {3: ("Freeway", False), 6: ("Pong", False), 18: ("Seaquest", True)}


@functools.cache
def started_overlay(num_actions: int) -> tuple[Overlay, dict]:
    """An overlay of a game that has begun, and the game's state: to load a cartridge takes longer than most tests."""
    game, full = GAMES[num_actions]
    env = Overlay(Atari(Args(env_id=game, full_action_space=full)), "test", 0.0)
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


def exactly(region: np.ndarray, color: tuple) -> np.ndarray:
    return np.abs(region.astype(int) - color).sum(2) == 0


@pytest.mark.parametrize("num_actions", [3, 6, 18])
@pytest.mark.parametrize("sharpness", [0, 1, 10])
def test_bars_show_the_probabilities(num_actions, sharpness):
    env = make_overlay(num_actions)
    logits = np.random.default_rng(num_actions).normal(size=num_actions) * sharpness
    probabilities = np.exp(logits) / np.exp(logits).sum()
    env.note((probabilities.astype(np.float32), 1.0), int(probabilities.argmin()))
    picture, pitch = env.render(), min(36, 290 // num_actions)
    for i, probability in enumerate(probabilities):
        row = picture[104 + i * pitch + pitch // 2][None, 634:875]
        lengths = {color: int(exactly(row, color).sum()) for color in (GREEDY, BAR)}
        color = GREEDY if i == probabilities.argmax() else BAR
        assert lengths[color] == pytest.approx(240 * probability, abs=2)
        assert sum(lengths.values()) == lengths[color]


def test_taken_action_is_framed(monkeypatch):
    env = make_overlay(6)
    probabilities = np.array([0.05, 0.1, 0.1, 0.2, 0.25, 0.3], np.float32)
    for action in (5, 2):
        env.note((probabilities, 0.0), action)
        picture = env.render()
        rows = np.flatnonzero(exactly(picture[104:394, 620:885], CHOSEN).any(1))
        assert rows.mean() // 36 == action
        texts = drawn_texts(env, monkeypatch)  # an action is drawn from the policy: that is no exploring
        assert "taken" in texts and "most probable" in texts and "exploring" not in texts
    env.env.max_episode_frames = 1
    env.step(1)
    texts = drawn_texts(env, monkeypatch)
    assert "cut off at the frame limit" in texts and "taken" not in texts


def test_odd_numbers_are_drawn():
    env = make_overlay(6)
    uniform = np.full(6, 1 / 6, np.float32)
    for probabilities in (uniform * np.nan, np.eye(6, dtype=np.float32)[2]):
        for value in (np.nan, np.inf, -1e30, 1e30, 0.0):
            env.note((probabilities, value), 0)
            env.render()
    assert min(env.entropies) != min(env.entropies) or min(env.entropies) == pytest.approx(0, abs=1e-6)
    env.note((uniform, 0.0), 0)
    assert env.entropies[-1] == pytest.approx(math.log(6))
    env.new_game()
    assert not env.entropies and not env.values and not env.returns


def test_numbers_are_printed():
    """The same canvas drawn with one probability changed differs just where that action stands."""
    env = make_overlay(6)
    env.note((np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.5]), 0.0), 5)
    one = env.render().copy()
    env.probabilities = np.array([0.1, 0.1, 0.1, 0.101, 0.1, 0.5])
    changed = np.argwhere((one != env.render()).any(2))
    assert len(changed) and (changed[:, 0] >= 104 + 3 * 36).all() and (changed[:, 0] < 104 + 4 * 36).all()
    assert exactly(one[104:394, 880:940], TEXT).any()


def test_nothing_overlaps():
    """With the widest texts each column of the panel keeps a gap to the next one, and nothing leaves the canvas."""
    env = make_overlay(18)
    env.env.episode_return, env.env.episode_length = 1_234_567, 26_999
    env.notice = "the video is cut here"
    for value in (-9_999.94, -1_000.04):
        env.note((np.full(18, 1 / 18), value), 3)
    picture = env.render().astype(int)
    panel = np.abs(picture[:, 480:] - (18, 19, 23)).sum(2) > 60
    assert not panel[:, :20].any() and not panel[:, -20:].any()
    assert not panel[104:394, 144:148].any()  # between names and bars
    assert not panel[104:394, 402:406].any()  # between bars and values
    assert not panel[394:402].any() and not panel[483:486].any() and not panel[554:564].any()  # between the parts
    for title in (panel[22:46], panel[78:95], panel[408:425], panel[488:505]):  # between its left and right
        assert np.diff(np.flatnonzero(title.any(0))).max() > 14


def test_traces_follow_value_and_entropy_and_mark_rewards():
    env = make_overlay(6)
    for step in range(150):
        best = 1 / 6 + (5 / 6) * (149 - step) / 149  # from certain to uniform
        env.note((np.array([(1 - best) / 5] * 5 + [best]), float(-step)), 5)
        env.env.episode_return += {60: 1, 100: -1}.get(step, 0)
    picture = env.render()
    for top, bottom, rising in ((434, 480, False), (514, 550, True)):
        trace = np.abs(picture[top - 2 : bottom + 3].astype(int) - GREEDY).sum(2) < 30
        heights = [top - 2 + np.flatnonzero(trace[:, x]).mean() for x in range(510, 930, 40)]
        assert all((earlier > later) == rising for earlier, later in zip(heights, heights[1:]))
        assert sorted((heights[0], heights[-1])) == [pytest.approx(top, abs=4), pytest.approx(bottom, abs=6)]
        for color, step in ((GAIN, 60), (LOSS, 100)):
            columns = np.flatnonzero(exactly(picture[top : bottom + 1], color).sum(0) > 20)
            assert columns.tolist() == [pytest.approx(936 - (149 - step) * 432 / 149, abs=1)]


# ------------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_minibatches": 3}, "--num-minibatches 3 does not divide the 1024 steps"),
        ({"num_minibatches": 1024}, "into parts of 2 or more"),
        ({"gae_lambda": 1.5}, "--gae-lambda is 1.5: it must be between 0 and 1"),
        ({"clip_coef": 0.0}, "--clip-coef is 0.0"),
        ({"target_kl": -1.0}, "--target-kl is -1.0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm is 0.0"),
        ({"ent_coef": -0.01}, "--ent-coef is -0.01: it must be between 0 and 1,000"),
        ({"num_steps": 0}, "--num-steps is 0: it must be between 1 and 100,000"),
    ],
)
def test_bad_flags_end_with_one_sentence(flags, message):
    check_args(Args())
    with pytest.raises(SystemExit) as error:
        check_args(Args(**flags))
    assert str(error.value).startswith("error: ") and message in str(error.value)


# ------------------------------------------------------------------------------------------------------------ ranks

TWO_RANKS = dict(env_id="Breakout", num_envs=4, num_steps=32, num_minibatches=2, update_epochs=2, num_workers=0)
TWO_RANKS |= dict(total_timesteps=256, wandb_mode="disabled", precision="float32", seed=7)


def record_updates(path: Path) -> None:
    """Body of a rank: ``train`` with every minibatch, its raw advantages, metrics and the parameters after it noted."""
    records, minibatch = [], Rollout.minibatch
    compute_gradients, apply_gradients = Agent.compute_gradients, Agent.apply_gradients

    def noting_minibatch(self, indices):
        records.append({"raw_advantages": self.advantages.flatten()[indices], "first": self.observations[0].clone()})
        return minibatch(self, indices)

    def noting_gradients(self, *batch):
        records[-1] |= {"batch": [x.clone() for x in batch[:-1]], "learning_rate": self.learning_rate.item()}
        return compute_gradients(self, *batch)

    def noting_step(self):
        apply_gradients(self)
        parameters = [parameter.detach().clone() for parameter in self.network.parameters()]
        records[-1]["parameters"] = parameters

    Rollout.minibatch, Agent.compute_gradients, Agent.apply_gradients = noting_minibatch, noting_gradients, noting_step
    ppo_atari.evaluate = lambda *arguments, **flags: None
    assert ppo_atari.train(Args(**TWO_RANKS), CPU, path.parent, None) == 0
    torch.save(records, path)


def test_metrics_are_means_over_ranks(monkeypatch):
    """... of the sums and of the counts, in place."""
    metrics = make_agent().metrics
    metrics.add({"loss": torch.tensor([1.0, 3.0])})
    monkeypatch.setattr(ppo_atari, "average", lambda sums: sums.add_(torch.tensor([4.0, 1.0])).div_(2))
    ppo_atari.average_metrics(metrics)
    assert metrics.means() == {"loss": 3.0}


def as_ranks() -> list[dict]:
    """The environments of two ranks on this machine, as torchrun makes them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared = os.environ | address | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_learn_as_one_process(tmp_path):
    """Both ranks have the same parameters after every update, and those of one process fed the minibatches of both."""
    paths = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [start(tmp_path, str(path), __file__, environment) for path, environment in zip(paths, as_ranks())]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    torch.manual_seed(derive_seed(7, 0))
    agent = Agent(Args(**TWO_RANKS), 4, CPU)
    records = list(zip(*(torch.load(path) for path in paths)))
    assert len(records) == 8
    for first, second in records:
        for ours, theirs in zip(first["parameters"], second["parameters"]):
            assert torch.equal(ours, theirs)
        raw = torch.cat([first["raw_advantages"], second["raw_advantages"]])
        batch = [torch.cat(parts) for parts in zip(first["batch"], second["batch"])]
        agent.learning_rate.fill_(first["learning_rate"])
        agent.compute_gradients(*batch, (raw - raw.mean()) / (raw.std() + 1e-8))
        agent.apply_gradients()
        for ours, theirs in zip(agent.network.parameters(), first["parameters"]):
            torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=2e-5)
    games = [Atari(Args(**TWO_RANKS)).reset(seed=derive_seed(7, i))[0] for i in range(4)]  # the games of one process
    assert torch.equal(torch.cat([rank["first"] for rank in records[0]]), torch.from_numpy(np.stack(games)))
    actions = [rank["batch"][1].tolist() for rank in records[0]]
    assert actions[0] != actions[1]  # each draws its own


RANKS = "--env-id Breakout --num-envs 2 --num-steps 100 --num-minibatches 2 --update-epochs 1 --total-timesteps 1200"
RANKS += " --device cpu --checkpoint-minutes 0.001 --eval-frequency 0 --eval-episodes 1 --no-capture-video"
RANKS += " --wandb-mode disabled"


def start_ranks(folder: Path, flags: str) -> list[subprocess.Popen]:
    return [start(folder, flags, "ppo_atari.py", env=environment) for environment in as_ranks()]


@pytest.mark.slow
def test_ranks_end_together_and_go_on_alone(tmp_path):
    """What torchrun restarts after a kill goes on by itself and ends bit-identical to what was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    ranks = start_ranks(whole, RANKS)
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "step 1,200: return" in outputs[0][0] and not outputs[1][0]  # only rank 0 speaks

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    command += ["--master-port", as_ranks()[0]["MASTER_PORT"], ROOT / "ppo_atari.py", *RANKS.split()]
    torchrun = subprocess.Popen(command, cwd=killed, **options)
    wait_for(lambda: list(killed.glob("runs/*/checkpoint.pt")), torchrun)
    os.kill(children(torchrun.pid)[1], signal.SIGKILL)
    stdout, stderr = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, stderr
    assert "has lost another rank: go on from the last checkpoint" in stderr
    assert_group_is_gone(torchrun.pid)
    assert (run_folder(killed) / "model.pt").read_bytes() == (run_folder(whole) / "model.pt").read_bytes()


@pytest.mark.slow
def test_signal_to_one_rank_stops_all(tmp_path):
    """... with a checkpoint, which only as many ranks can go on from, and only if all of them find it."""
    ranks = start_ranks(tmp_path, RANKS.replace("1200", "1000000"))
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-signal.SIGTERM] * 2, outputs
    assert "--resume" in outputs[0][0] and not outputs[1][0]
    folder = run_folder(tmp_path)
    assert (
        f"stopped at step {torch.load(folder / 'checkpoint.pt', weights_only=True)['global_step']:,}" in outputs[0][0]
    )
    alone = run(tmp_path, f"--resume {folder} --wandb-mode disabled", script="ppo_atari.py")
    assert alone.returncode == 1 and "is of 2 ranks, here are 1: start as many" in alone.stderr
    assert len(alone.stderr.strip().splitlines()) == 1

    first, second = as_ranks()
    ranks = [
        start(tmp_path, f"--resume {folder} --wandb-mode disabled", "ppo_atari.py", env=first),
        start(tmp_path, RANKS, "ppo_atari.py", env=second),  # what a restart does on a machine without the checkpoint
    ]
    for rank in ranks:
        stderr = rank.communicate(timeout=60)[1]
        assert rank.returncode == 1 and "only some ranks find the last checkpoint" in stderr, stderr


@pytest.mark.parametrize("due", [True, False])
def test_rank_0_decides_when_to_save(monkeypatch, due):
    """Clocks differ, and a checkpoint is written by all ranks together."""
    run = ppo_atari.Run(Args(), None, None, {})
    run.checkpoint_time = ppo_atari.time.perf_counter() - (0 if due else 3600)  # this rank's own clock says otherwise
    monkeypatch.setattr(ppo_atari, "gather", lambda own: [due, own])
    assert run.checkpoint_is_due() == due


def test_environments_and_minibatches_must_be_divisible(monkeypatch):
    monkeypatch.setattr(ppo_atari, "WORLD_SIZE", 3)
    for flags, message in (
        ({}, "--num-envs 8 cannot be divided among 3 ranks"),
        ({"num_envs": 9, "num_steps": 10}, "--num-minibatches 4 does not divide the 30 steps"),
        ({"evaluate": "model.pt"}, "start it without torchrun"),
    ):
        with pytest.raises(SystemExit, match=message):
            check_args(Args(**flags))


def test_own_share_of_games_and_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for ranks, flags, num_envs, num_workers in (
        (1, {}, 8, 8),
        (2, {"num_envs": 64}, 32, 8),
        (4, {}, 2, 2),
        (32, {"num_envs": 64}, 2, 0),
        (2, {"num_workers": 4}, 4, 2),
        (2, {"num_workers": 0}, 4, 0),
    ):
        monkeypatch.setattr(ppo_atari, "WORLD_SIZE", ranks)
        monkeypatch.setattr(ppo_atari, "LOCAL_WORLD_SIZE", ranks)
        share = ppo_atari.own_share(Args(**flags))
        assert (share.num_envs, share.num_workers) == (num_envs, num_workers)


@pytest.mark.parametrize(
    "num_envs, num_workers, expected",
    [(8, 2, [(4, 1), (4, 1)]), (6, 5, [(3, 2), (3, 3)]), (8, 1, [(8, 1)]), (8, 0, [(8, 0)]), (7, 4, [(7, 4)])],
)
def test_games_are_halved_where_they_can_be(num_envs, num_workers, expected):
    halves = ppo_atari.halve(Args(num_envs=num_envs, num_workers=num_workers))
    assert [(half.num_envs, half.num_workers) for half in halves] == expected


if __name__ == "__main__":
    record_updates(Path(sys.argv[1]))
