"""PPO's network, rollout, losses, overlay and ranks against direct computations and a decision process."""

import copy
import math

import numpy as np
import pytest
import torch
from test_learner import state_frame

import ppo_atari
from ppo_atari import METRICS, SIZE, STACK, ActorCritic, Agent, Args, Minibatch, Rollout, explained_variance, normalize

CPU = torch.device("cpu")


def make_agent(num_actions=4, **flags):
    torch.manual_seed(0)
    return Agent(Args(**({"precision": "float32"} | flags)), num_actions, CPU)


def random_minibatch(size=24, num_actions=4):
    """Old probabilities and values near the network's own, so that some are clipped at 0.1 and some are not."""
    generator = torch.Generator().manual_seed(3)
    agent = make_agent(num_actions)
    observations = torch.randint(0, 256, (size, STACK, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    actions = torch.randint(num_actions, (size,), generator=generator)
    with torch.no_grad():
        logits, values = agent.network(observations)
    logprobs = logits.log_softmax(1).gather(1, actions[:, None]).squeeze(1)
    logprobs = logprobs + 0.15 * torch.randn(size, generator=generator)
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
        for start in range(num_steps):
            weight = 1.0
            for t in range(start, num_steps):
                if terminated[t, env]:
                    next_value = 0.0
                elif truncated[t, env]:
                    next_value = final_values[t, env]
                else:
                    next_value = values[t + 1, env]
                advantages[start, env] += weight * (rewards[t, env] + gamma * next_value - values[t, env])
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
    rollout = Rollout(*shape, gamma, gae_lambda, CPU)
    rollout.values.copy_(torch.from_numpy(values))
    bootstrapped = (rewards + gamma * final_values * truncated).astype(np.float32)
    rollout.estimate_advantages(torch.from_numpy(bootstrapped), torch.from_numpy(terminated | truncated))
    np.testing.assert_allclose(rollout.advantages.numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rollout.returns.numpy(), expected + values[:-1], rtol=0, atol=1e-5)


def corridor(state, action, num_states=5):
    """Next state, reward, terminated: right in the last state ends with reward 1, left in the first costs 0.5."""
    if action == 1:
        return (state, 1.0, True) if state == num_states - 1 else (state + 1, 0.0, False)
    return (0, -0.5, False) if state == 0 else (state - 1, 0.0, False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_policy_and_values_converge(precision):
    """A corridor of five states shown as pictures; episodes are cut off at random, which must not change the values."""
    num_states, num_envs, num_steps, gamma = 5, 8, 16, 0.8
    agent = make_agent(2, learning_rate=5e-4, ent_coef=0.003, precision=precision, gamma=gamma)
    rollout = Rollout(num_steps, num_envs, gamma, 0.95, CPU)
    rng, states = np.random.default_rng(0), [0, 1, 2, 3, 4, 0, 1, 2]
    pictures = torch.stack([state_frame(state).expand(STACK, -1, -1) for state in range(num_states)])
    for iteration in range(60):
        rewards, ends = np.zeros((num_steps, num_envs), np.float32), np.zeros((num_steps, num_envs), bool)
        for t in range(num_steps):
            rollout.observations[t] = pictures[states]
            rollout.actions[t], rollout.logprobs[t], rollout.values[t] = agent.act(rollout.observations[t])
            outcomes = [corridor(state, action) for state, action in zip(states, rollout.actions[t].tolist())]
            rewards[t], ends[t] = [outcome[1] for outcome in outcomes], [outcome[2] for outcome in outcomes]
            cut_off = (rng.random(num_envs) < 0.2) & ~ends[t]
            final_values = agent.value(pictures[[outcome[0] for outcome in outcomes]]).numpy()
            rewards[t] += gamma * final_values * cut_off
            ends[t] |= cut_off
            starts = rng.integers(num_states, size=num_envs)
            states = [int(start) if end else outcome[0] for start, end, outcome in zip(starts, ends[t], outcomes)]
        rollout.observations[-1] = pictures[states]
        rollout.values[-1] = agent.value(rollout.observations[-1])
        rollout.estimate_advantages(torch.from_numpy(rewards), torch.from_numpy(ends))
        agent.learning_rate.fill_(5e-4 * (1 - iteration / 60))
        for _ in range(4):
            indices = torch.randperm(num_steps * num_envs).view(4, -1)
            for rows, advantages in zip(indices, normalize(rollout.advantages.flatten()[indices])):
                agent.compute_gradients(*rollout.minibatch(rows), advantages)
                agent.apply_gradients()
    with torch.no_grad():
        logits, values = agent.network(pictures)
    print(logits.softmax(1), values)
    optimal = [gamma ** (num_states - 1 - state) for state in range(num_states)]
    assert logits.softmax(1)[:, 1].min() > 0.95  # always to the right
    np.testing.assert_allclose(values.numpy(), optimal, atol=0.06)


def test_rollout_is_what_the_games_did(monkeypatch, tmp_path):
    """Two iterations of ``train`` on a real game with cut-off and ended episodes, against games played one by one.

    The games are given the actions that the rollout holds; their observations, rewards and ends, and the networks' own
    probabilities and values, must then be those of the rollout, and the advantages those of the direct sum.
    """
    args = Args(env_id="Breakout", num_envs=3, num_steps=80, num_minibatches=2, update_epochs=1, num_workers=0)
    args.max_episode_frames, args.total_timesteps, args.wandb_mode = 220, 480, "disabled"
    args.precision, args.seed = "float32", 5
    rollouts, networks, original = [], [], Rollout.estimate_advantages

    def estimate_advantages(self, *arguments):
        original(self, *arguments)
        rollouts.append(copy.deepcopy(self))
        networks.append(copy.deepcopy(agents[0].network))

    agents, init = [], Agent.__init__
    monkeypatch.setattr(Rollout, "estimate_advantages", estimate_advantages)
    monkeypatch.setattr(Agent, "__init__", lambda self, *arguments: (agents.append(self), init(self, *arguments))[1])
    monkeypatch.setattr(ppo_atari, "evaluate", lambda *arguments, **flags: None)
    assert ppo_atari.train(args, CPU, tmp_path, None) == 0
    assert len(rollouts) == 2
    games = [ppo_atari.Atari(args) for _ in range(3)]
    observations = np.stack([game.reset(seed=5 + i)[0] for i, game in enumerate(games)])
    kinds = np.zeros(2, int)
    for rollout, network in zip(rollouts, networks):
        rewards, terminated, truncated, final_values = np.zeros((4, 80, 3))
        for t in range(80):
            np.testing.assert_array_equal(rollout.observations[t].numpy(), observations)
            with torch.no_grad():
                logits, values = network(torch.from_numpy(observations))
            log_policy = logits.log_softmax(1)[range(3), rollout.actions[t]]
            torch.testing.assert_close(rollout.values[t], values)
            torch.testing.assert_close(rollout.logprobs[t], log_policy)
            for i, game in enumerate(games):
                observation, rewards[t, i], terminated[t, i], truncated[t, i], _ = game.step(int(rollout.actions[t, i]))
                truncated[t, i] *= not terminated[t, i]
                if truncated[t, i]:
                    final_values[t, i] = network(torch.from_numpy(observation[None]))[1].item()
                observations[i] = game.reset()[0] if terminated[t, i] or truncated[t, i] else observation
        np.testing.assert_array_equal(rollout.observations[80].numpy(), observations)
        kinds += [int(terminated.sum()), int(truncated.sum())]
        direct = (rewards, terminated, truncated, rollout.values.numpy(), final_values, args.gamma, args.gae_lambda)
        expected = direct_advantages(*direct)
        np.testing.assert_allclose(rollout.advantages.numpy(), expected, rtol=0, atol=1e-4)
    assert kinds.min() >= 3  # both kinds of endings occurred
