"""Training loops and evaluations against the games, the schedules and the flags."""

import importlib
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from helpers import with_small_trunk

CPU = torch.device("cpu")
SEED, NUM_ENVS, STEPS = 5, 3, 250


@pytest.mark.parametrize("script", ["dqn_atari", "c51_atari", "bootstrapped_dqn_atari"])
@pytest.mark.slow
def test_training_is_what_its_flags_say(monkeypatch, tmp_path, script):
    """A real game with lives that are lost and games that are cut off: what is stored is what the games did.

    They are played again, one by one, with the actions in the replay. Epsilon, batches, updates and target copies are
    compared with a direct count.
    """
    module = importlib.import_module(script)
    args = module.Args(env_id="Breakout", num_envs=NUM_ENVS, num_workers=0, seed=SEED, precision="float32")
    args.max_episode_frames, args.total_timesteps, args.learning_starts = 220, NUM_ENVS * STEPS, 300
    args.buffer_size, args.batch_size, args.train_frequency, args.target_network_frequency = 900, 7, 2, 50
    args.start_e, args.end_e, args.exploration_fraction = 0.9, 0.3, 0.4
    replays, epsilons, events, logged = [], [], [], []
    make_replay, act = module.Replay.__init__, module.Agent.act

    def noting_replay(self, *arguments):
        replays.append(self)
        make_replay(self, *arguments)

    def noting_act(self, observations, epsilon, *heads):
        epsilons.append(epsilon.item())
        return act(self, observations, epsilon, *heads)

    def noting_update(self, observations, *rest):
        assert len(observations) == 7
        events.append("update")

    tracker = Mock(run_id="run", log=lambda metrics, global_step: logged.append((global_step, metrics)))
    monkeypatch.setattr(module, "Tracker", lambda *_, **flags: tracker)
    monkeypatch.setattr(module, "evaluate", lambda *_, **flags: None)
    monkeypatch.setattr(module, "LOG_FREQUENCY", 100)
    monkeypatch.setattr(module, "QNetwork", with_small_trunk(module.QNetwork))
    monkeypatch.setattr(module.Replay, "__init__", noting_replay)
    monkeypatch.setattr(module.Agent, "act", noting_act)
    monkeypatch.setattr(module.Agent, "update", noting_update)
    monkeypatch.setattr(module.Agent, "update_target", lambda self: events.append("target"))
    assert module.train(args, CPU, tmp_path, None) == 0

    (replay,) = replays
    stored = [getattr(replay, name)[: NUM_ENVS * STEPS] for name in ("frames", "actions", "rewards", "ends")]
    frames, actions, rewards, ends = (array.unflatten(0, (STEPS, NUM_ENVS)).numpy() for array in stored)
    for env in range(NUM_ENVS):
        game = module.Atari(args)
        observation, _ = game.reset(seed=module.derive_seed(SEED, env))
        for step in range(STEPS):
            np.testing.assert_array_equal(frames[step, env], observation[-1])
            observation, reward, terminated, truncated, _ = game.step(int(actions[step, env]))
            assert rewards[step, env] == reward
            assert ends[step, env] == (module.TERMINATED if terminated else module.TRUNCATED if truncated else 0)
            if terminated or truncated:
                observation, _ = game.reset()
    assert min((ends == module.TERMINATED).sum(), (ends == module.TRUNCATED).sum()) > 3 and len(np.unique(rewards)) > 1

    expected_epsilons = [max(0.9 - 0.6 * step / 300, 0.3) for step in range(0, NUM_ENVS * STEPS, NUM_ENVS)]
    assert epsilons == pytest.approx(expected_epsilons)
    charts = {step: metrics["charts/epsilon"] for step, metrics in logged if "charts/epsilon" in metrics}
    assert charts == {step: epsilons[step // NUM_ENVS - 1] for step in (102, 201, 300, 402, 501, 600, 702)}
    expected_events = ["target"]  # of the agent that is made
    for step in range(NUM_ENVS, NUM_ENVS * STEPS + 1, NUM_ENVS):
        if step > 300:
            reached = range(step - NUM_ENVS + 1, step + 1)
            expected_events += ["update"] * sum(t % 2 == 0 for t in reached)
            expected_events += ["target"] * any(t % 50 == 0 for t in reached)
    assert events == expected_events


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize(
    "script", ["dqn_atari", "c51_atari", "bootstrapped_dqn_atari", "apex_dqn_atari", "ppo_atari", "dqn_atari_visual"]
)
@pytest.mark.slow
def test_evaluation_explores_and_reports_whole_games(monkeypatch, tmp_path, capsys, script, epsilon):
    """Three games of an agent that always wants to go right: its actions, and what is logged and said of the games."""
    module = importlib.import_module(script)
    args = module.Args(env_id="Breakout", capture_video=False, max_episode_frames=4000, eval_episodes=3)
    args.eval_epsilon = epsilon
    actions, games, step = [], [], module.Atari.step
    thoughts = np.array([0.0, 0.0, 1.0, 0.0], np.float32)

    def noting_step(self, action):
        actions.append(action)
        *outcome, info = step(self, action)
        games.extend([info["episode"]] if info else [])
        return *outcome, info

    monkeypatch.setattr(module.Atari, "step", noting_step)
    monkeypatch.setattr(module.Overlay, "note", lambda *_: None)
    agent = SimpleNamespace(think=lambda *_: (thoughts, 2), device=CPU)
    tracker = MagicMock()
    module.evaluate(args, agent, 1234, tmp_path, tracker)
    assert len(games) == 3
    assert np.mean(np.array(actions) != 2) == pytest.approx(epsilon * 3 / 4, abs=0.08)
    returns = [game["r"] for game in games]
    assert epsilon == 0 or np.std(returns) > 0
    expected = {"eval/episodic_return": np.mean(returns), "eval/episodic_return_std": np.std(returns)}
    expected["eval/episodic_length"] = np.mean([game["l"] for game in games])
    expected["eval/repeated_rewards"] = np.mean([game["repeated_rewards"] for game in games])
    logged, global_step = tracker.log.call_args_list[0].args
    assert logged == pytest.approx(expected) and global_step == 1234
    said = f"step 1,234: return {np.mean(returns):,.1f} \u00b1 {np.std(returns):,.1f} over 3 games"
    assert said in capsys.readouterr().out


OF_THE_GAMES = {"env_id", "exp_name", "seed", "full_action_space"}
OF_THE_REPLAY = OF_THE_GAMES | {"num_envs", "buffer_size"}


@pytest.mark.parametrize(
    "script, expected",
    [
        ("dqn_atari", OF_THE_REPLAY),
        ("dqn_atari_visual", OF_THE_REPLAY),
        ("c51_atari", OF_THE_REPLAY | {"n_atoms", "v_min", "v_max"}),
        ("bootstrapped_dqn_atari", OF_THE_REPLAY | {"num_heads", "prior_scale"}),
        (
            "apex_dqn_atari",
            OF_THE_REPLAY - {"num_envs"}
            | {"num_actors", "envs_per_actor", "gamma", "n_step", "prioritized_replay_alpha"},
        ),
        ("ppo_atari", OF_THE_GAMES | {"num_envs"}),
    ],
)
def test_what_the_checkpoint_depends_on_cannot_change(script, expected):
    """Its arrays have a shape, and Ape-X's returns and priorities and the networks' outputs a meaning."""
    assert set(importlib.import_module(script).FIXED_FLAGS) == expected
