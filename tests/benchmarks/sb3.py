"""Stable-Baselines3's PPO and DQN at the settings of ppo_atari.py and dqn_atari.py, as a run of its own.

    python tests/benchmarks/sb3.py ppo --env-id Breakout --seed 1 --total-timesteps 1000000

The run has a folder like those of the scripts, with a checkpoint.pt and at the end a model.pt in Stable-Baselines3's
format, and a W&B record that docs/compare.py reads. At its end the model plays 5 games. A signal ends it with a
checkpoint, and --resume goes on from there (with new games). DQN differs in what cannot be set: Huber's loss, gradients
clipped to a norm of 10.
"""

import argparse
import os
import signal
import time
from pathlib import Path

import numpy as np
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

LOG_FREQUENCY = 1000  # steps, as in dqn_atari.py
SAVE_FREQUENCY = 100_000  # steps
REPLAY = "replay.pkl"


def make_envs(game: str, num_envs: int, kind: str, seed: int) -> VecFrameStack:
    """Games in this process ("dummy") or in processes of theirs ("subproc"), preprocessed as by the scripts."""
    vec_env = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[kind]
    name = f"ale_py:{game}NoFrameskip-v4"  # with the module that registers it, for processes that have not imported it
    return VecFrameStack(make_atari_env(name, num_envs, seed=seed, vec_env_cls=vec_env), 4)


def make_ppo(envs: VecFrameStack, seed: int) -> PPO:
    num_steps = 128
    return PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda remaining: 2.5e-4 * remaining,
        n_steps=num_steps,
        batch_size=num_steps * envs.num_envs // 4,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.1,
        clip_range_vf=0.1,
        ent_coef=0.01,
        vf_coef=0.5,
        max_grad_norm=0.5,
        seed=seed,
    )


def make_dqn(envs: VecFrameStack, seed: int, **settings) -> DQN:
    """An update for every 4 steps; ``settings`` are those of the schedule."""
    num_envs = envs.num_envs
    return DQN(
        "CnnPolicy",
        envs,
        learning_rate=1e-4,
        batch_size=32,
        gamma=0.99,
        train_freq=(4, "step") if num_envs == 1 else (1, "step"),
        gradient_steps=1 if num_envs == 1 else num_envs // 4,
        target_update_interval=1000,
        exploration_final_eps=0.01,
        seed=seed,
        **settings,
    )


class Tracker(BaseCallback):
    """Logs what the scripts log, saves now and then, and ends the training when a signal has come."""

    def __init__(self, run, run_dir: Path):
        super().__init__()
        self.run = run
        self.run_dir = run_dir
        self.stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_) -> None:
        self.stopped = True

    def _on_training_start(self) -> None:
        self.clock = time.perf_counter()
        self.logged_step = self.saved_step = self.num_timesteps

    def _on_step(self) -> bool:
        step = self.num_timesteps
        returns = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        charts = {"charts/episodic_return": sum(returns) / len(returns)} if returns else {}
        if step >= self.logged_step + LOG_FREQUENCY:
            now = time.perf_counter()
            charts["charts/SPS"] = (step - self.logged_step) / (now - self.clock)
            self.clock = now
            self.logged_step = step
        if charts:
            self.run.log(charts | {"global_step": step}, step=step)
        if step >= self.saved_step + SAVE_FREQUENCY:
            self.saved_step = step
            self.save()
        return not self.stopped

    def save(self) -> None:
        """Replaces each file at once or not at all."""
        if isinstance(self.model, DQN):
            self.model.save_replay_buffer(self.run_dir / "replay.tmp")
            os.replace(self.run_dir / "replay.tmp", self.run_dir / REPLAY)
        self.model.save(self.run_dir / "checkpoint.tmp")
        os.replace(self.run_dir / "checkpoint.tmp", self.run_dir / "checkpoint.pt")


def evaluate(agent: PPO | DQN, game: str, seed: int) -> dict[str, float]:
    """Whole games as the training ends with them: PPO draws its actions, DQN explores a little."""
    envs = make_envs(game, 5, "dummy", seed)
    returns, _ = evaluate_policy(agent, envs, n_eval_episodes=5, deterministic=False, return_episode_rewards=True)
    envs.close()
    return {"eval/episodic_return": float(np.mean(returns)), "eval/episodic_return_std": float(np.std(returns))}


def main() -> None:
    import wandb

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=["ppo", "dqn"])
    parser.add_argument("--env-id", default="Breakout", help="name of the game (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (%(default)s)")
    parser.add_argument("--total-timesteps", type=int, default=1_000_000, help="steps (%(default)s)")
    parser.add_argument("--buffer-size", type=int, default=100_000, help="of DQN's replay (%(default)s)")
    parser.add_argument("--learning-starts", type=int, default=10_000, help="step of DQN's first update (%(default)s)")
    parser.add_argument("--exploration-fraction", type=float, default=0.1, help="of DQN's epsilon (%(default)s)")
    parser.add_argument("--resume", type=Path, help="the folder of a run to go on with, with the same flags")
    args = parser.parse_args()
    exp_name = f"sb3_{args.algorithm}"
    name = f"{args.env_id}__{exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = args.resume or Path("runs", name)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = vars(args) | {"game": args.env_id, "algorithm": f"{args.algorithm.upper()} of SB3", "exp_name": exp_name}
    del config["resume"]
    run = wandb.init(
        mode="offline", project="watchrl", id=run_dir.name, name=run_dir.name, resume="allow", config=config
    )
    envs = make_envs(args.env_id, 8, "dummy", args.seed)
    if args.algorithm == "ppo":
        agent = make_ppo(envs, args.seed)
    else:
        agent = make_dqn(
            envs,
            args.seed,
            buffer_size=args.buffer_size,
            learning_starts=args.learning_starts,
            exploration_fraction=args.exploration_fraction,
        )
    if args.resume:
        agent = type(agent).load(run_dir / "checkpoint.pt", env=envs)
        if args.algorithm == "dqn":
            agent.load_replay_buffer(run_dir / REPLAY)
    tracker = Tracker(run, run_dir)
    remaining = args.total_timesteps - agent.num_timesteps
    agent.learn(remaining, callback=tracker, reset_num_timesteps=not args.resume)
    tracker.save()
    if not tracker.stopped:
        step = agent.num_timesteps
        run.log(evaluate(agent, args.env_id, args.seed + 1000) | {"global_step": step}, step=step)
        agent.save(run_dir / "model.pt")
        (run_dir / REPLAY).unlink(missing_ok=True)
    run.finish()
    envs.close()


if __name__ == "__main__":
    main()
