# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8,<2.14",
#   "gymnasium>=1.2",
#   "ale-py>=0.12",
#   "wandb>=0.31",
#   "numpy>=2.0",
#   "opencv-python-headless>=5.0",
#   "moviepy>=2.2",
#   "tyro>=1.0",
#   "tqdm>=4.66",
#   "ray>=2.60",
# ]
# ///
"""Ape-X DQN on Atari, in one file: many actors play, one learner replays large TD errors most often.

Horgan et al. 2018, "Distributed Prioritized Experience Replay", https://arxiv.org/abs/1803.00933, with double
Q-learning (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461), the dueling network (Wang et al. 2016,
https://arxiv.org/abs/1511.06581) and prioritized replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    python apex_dqn_atari.py --env-id Pong --seed 2
    python apex_dqn_atari.py --env-id Pong --ray-address auto    (actors on all machines of a Ray cluster)
    python apex_dqn_atari.py --resume runs/Pong__apex_dqn_atari__2__20260131-120000
    python apex_dqn_atari.py --evaluate runs/Pong__apex_dqn_atari__2__20260131-120000/model.pt

The learner is the process that is started; the actors are Ray actors. They run at their own pace: two runs with the
same seed differ.

Unlike the paper: an actor plays 8 games, each with an epsilon of its own, as the paper's actors have; it takes newer
weights only between chunks of 50 steps (charts/weights_age says how old they are); the learner holds the replay, in
which an actor's chunk overwrites the oldest of that actor; FIRE at the start of a game or life.

Also unlike CleanRL's DQN: zeros before an episode's first frame, not copies of it; grayscale before the maximum of two
frames, not after it; no second action after FIRE and no NOOP after a lost life; TF32 on CUDA; bfloat16 in all but the
output layers on CPUs with AVX512_BF16. Sticky actions are off unless you turn them on, even for ALE/Pong-v5, where
Gymnasium has 0.25.

In this order:

    the flags        AlgorithmFlags, GameFlags, EvaluationFlags, WandbFlags, RunFlags
    the algorithm    QNetwork, Replay, Actor, Agent, train
    the games        Atari, Actors
    what you see     Overlay, Recorder, evaluate, Tracker
    the machinery    devices and CUDA graphs, Run, checkpoints, checks of the flags, main
"""

from __future__ import annotations

import atexit
import ctypes
import io
import math
import os
import re
import secrets
import signal
import socket
import sys
import textwrap
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NamedTuple, NoReturn, TypedDict, Union, get_args, get_origin, get_type_hints

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else torch's idle threads spin, on cores that others need

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads these when it is imported: no report to its makers,
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # and actors run in this environment, under uv too
try:
    import ray
except ImportError:  # playing a model does without
    ray = None
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # those from Ray, which are only read

ALGORITHM = "Ape-X DQN"  # written into checkpoints: those of another algorithm are refused
FIXED_FLAGS = (  # on --resume
    "env_id",
    "exp_name",
    "seed",
    "num_actors",
    "envs_per_actor",
    "buffer_size",
    "gamma",
    "n_step",
    "prioritized_replay_alpha",
    "full_action_space",
)
LOG_FREQUENCY = 1000  # steps between two points of the loss and speed charts
STACK = 4  # frames in an observation
HISTORY = STACK - 1  # frames of an observation that are older than the newest
SIZE = 84  # height and width of a frame
FRAME_SKIP = 4  # emulator frames in an agent step
NOOP_MAX = 30  # most idle frames at the start of a game
CHUNK = 50  # steps of each environment that an actor sends at a time, as in the paper
REQUESTS = 3  # chunks asked of each actor in advance, so that it seldom waits for the learner
ACTOR_BYTES = 3e8  # main memory that an actor takes with its games
SILENCE = 60  # seconds without a chunk after which an actor is missed
PRIORITY_EPS = 1e-6  # added to the error, so that no transition is lost for good


@dataclass
class AlgorithmFlags:
    learning_rate: float = 6.25e-5
    """learning rate of RMSProp"""
    buffer_size: int = 2_000_000
    """transitions in the replay, 7,070 bytes each: 14.1 GB for two million"""
    replay_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay is stored; auto is the GPU if it is CUDA and has room, else main memory"""
    gamma: float = 0.99
    """discount factor"""
    n_step: int = 3
    """rewards in an n-step return"""
    batch_size: int = 512
    """transitions in an update"""
    target_network_frequency: int = 2500
    """updates after which the target network becomes a copy of the Q-network"""
    epsilon_base: float = 0.4
    """epsilon of game i of N is base ** (1 + exponent * i / (N - 1)), the same all through the run; this is the base"""
    epsilon_exponent: float = 7.0
    """the exponent in the epsilon of a game, see --epsilon-base"""
    prioritized_replay_alpha: float = 0.6
    """exponent of the TD error in a transition's priority; 0 draws all alike"""
    prioritized_replay_beta: float = 0.4
    """exponent of the importance weights; 1 undoes the bias of the priorities, 0 leaves it"""
    learning_starts: int = 50_000
    """steps before the first update"""
    steps_per_update: float | None = None
    """steps for each update, so that learner and actors wait for each other; None lets each go as fast as it can"""
    weights_frequency: int = 100
    """steps of each game after which the actors get new weights; they use them about 100 steps later"""
    max_grad_norm: float = 40.0
    """a gradient with a larger norm is scaled down to this"""


@dataclass
class GameFlags:
    env_id: str = "Breakout"
    """name of the game: Breakout, ALE/Breakout-v5 and BreakoutNoFrameskip-v4 are the same here"""
    num_actors: int | None = None
    """processes that play; None is one for each core or CPU of the cluster but one, which is the learner's"""
    envs_per_actor: int = 8
    """games that an actor plays side by side, each with an epsilon of its own"""
    ray_address: str = "local"
    """Ray cluster that runs the actors: an address or auto; local starts one on this machine alone"""
    sticky_actions: float = 0.0
    """probability that the emulator repeats the last action in a frame instead of taking the new one"""
    max_episode_frames: int = 108_000
    """a game is cut off after this many emulator frames, 60 a second: 108000 are 30 minutes"""
    episodic_life: bool = True
    """end an episode of learning when a life is lost; the game goes on"""
    full_action_space: bool = False
    """every action of the joystick (18, in Skiing and LostLuggage 9) instead of those that the game uses"""

    @property
    def num_envs(self) -> int:
        """games of all actors"""
        return self.num_actors * self.envs_per_actor


@dataclass
class EvaluationFlags:
    evaluate: str | None = None
    """play this model.pt, checkpoint.pt or run folder, train nothing; flags that are not given are as in the file"""
    capture_video: bool = True
    """make a video of the first game of each evaluation"""
    video_length: int = 4500
    """longest video in steps, 15 a second; 4500 are 5 minutes"""
    eval_frequency: int = 1_000_000
    """steps from one evaluation to the next, the first after a tenth of that; 0 evaluates only at the end"""
    eval_episodes: int = 5
    """games played in an evaluation"""
    eval_epsilon: float = 0.0
    """probability of a random action in an evaluation"""


@dataclass
class WandbFlags:
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """where W&B records the run; auto is online if you have logged in, else offline"""
    wandb_project_name: str = "watchrl"
    """W&B project of the run"""
    wandb_entity: str | None = None
    """W&B team or user of the run; None is your own account"""
    wandb_group: str | None = None
    """W&B group of the run; None is one for each game and --exp-name"""


@dataclass
class RunFlags:
    exp_name: str = Path(__file__).stem
    """name of the experiment, a part of the run's name"""
    seed: int = 1
    """random seed"""
    total_timesteps: int = 10_000_000
    """steps of the whole run, of all games together; a step is 4 emulator frames"""
    device: str = "auto"
    """cpu, cuda, cuda:1 or, untested, mps; auto is cuda if this machine has it, else cpu"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of all but the output layers; auto is bfloat16 on CPUs with AVX512_BF16, else float32 (TF32 on CUDA)"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic algorithms only"""
    run_dir: str = "runs"
    """folder in which each run gets a folder of its own"""
    checkpoint_minutes: float = 15.0
    """minutes from one checkpoint to the next; 0 writes one only at the end and when the run is stopped"""
    resume: str | None = None
    """go on with the run in this folder; flags that are not given are as they were, except W&B's: give those again"""


@dataclass
class Args(RunFlags, WandbFlags, EvaluationFlags, GameFlags, AlgorithmFlags):
    """All flags. ``--help`` shows them in these groups, the algorithm's first."""


# ---------------------------------------------------------------------------------------------------- network


class QNetwork(nn.Module):
    """The dueling network of Wang et al. 2016, without their scaling of the trunk's gradient by 1/sqrt(2).

    Observations uint8 [batch, 4, 84, 84] to Q-values float32 [batch, actions]. ``dtype`` is the precision in which
    the trunk computes. Weights are float32, but a network that is never trained may have those of its ``trunk`` cast
    to ``dtype``.
    """

    def __init__(self, num_actions: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.trunk = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 2 * 512),  # the hidden layers of both streams, in one product
            nn.ReLU(),
        )
        self.value = nn.Linear(512, 1)
        self.advantage = nn.Linear(512, num_actions)

    def streams(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value, float32 [batch, 1], and advantages, float32 [batch, actions], less their mean (eq. 9)."""
        mixed = self.dtype != torch.float32
        with torch.autocast(observations.device.type, self.dtype, enabled=mixed):
            pixels = observations.to(self.dtype) / 255
            features = self.trunk(pixels)
        value_features, advantage_features = features.float().chunk(2, 1)
        value = self.value(value_features)
        advantages = self.advantage(advantage_features)
        return value, advantages - advantages.mean(1, keepdim=True)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        value, advantages = self.streams(observations)
        return value + advantages


# ----------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    observations: torch.Tensor  # uint8 [batch, 4, 84, 84]
    actions: torch.Tensor  # int64 [batch]
    returns: torch.Tensor  # float32 [batch], sum of gamma^k r_(t+k) over n steps, up to the end of the episode
    next_observations: torch.Tensor  # uint8 [batch, 4, 84, 84], n steps later; arbitrary where discounts are 0
    discounts: torch.Tensor  # float32 [batch], gamma^n, or 0 where the episode terminated within the n steps
    weights: torch.Tensor  # float32 [batch], for the loss: less where a transition is drawn more often
    indices: torch.Tensor  # int64 [batch], where the transitions are stored


BYTES_PER_TRANSITION = SIZE * SIZE + 1 + 1 + 4 + 4 + 4  # frame, age, action, return, discount, priority


def prioritize(td_errors, alpha: float):
    """Priorities to which the chances to be drawn are proportional, p^alpha (Schaul et al. 2016, eq. 1)."""
    return (abs(td_errors) + PRIORITY_EPS) ** alpha


class Replay:
    """The last transitions of each environment, ``buffer_size`` in all, and their priorities, on ``device``.

    Each array has one place for each environment and step: the newest frame of an observation; its age, the number of
    older frames (up to 3) that belong to it; the action; and what the actor made of the next n steps: return, discount
    and priority. The environments of a step lie side by side, the steps in a ring, which each actor fills at its own
    pace. A sample gathers the 4 + n frames around a step and blanks those from before the episode. A step is never
    drawn (its priority is 0) before its n successors are stored, after a part of its frames is overwritten, or if
    truncation cut it off.
    """

    ARRAYS = ("frames", "ages", "actions", "returns", "discounts", "priorities")

    def __init__(self, args: Args, device: torch.device):
        self.args = args
        self.max_steps = args.buffer_size // args.num_envs
        self.capacity = self.max_steps * args.num_envs
        self.device = device
        self.frames = blank_frames((self.capacity, SIZE, SIZE), device)
        self.ages = torch.zeros(self.capacity, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(self.capacity, dtype=torch.uint8, device=device)
        self.returns = torch.zeros(self.capacity, device=device)
        self.discounts = torch.zeros(self.capacity, device=device)
        self.priorities = torch.zeros(self.capacity, device=device)
        self.num_steps = [0] * args.num_actors  # stored of each environment of an actor

    @property
    def size(self) -> int:
        """Transitions stored, those that are not to be drawn included."""
        return sum(min(steps, self.max_steps) for steps in self.num_steps) * self.args.envs_per_actor

    def add(self, actor: int, chunk: dict, follows: bool) -> None:
        """Stores a chunk of ``Actor.play``: the frames of its steps, and the transitions that they complete.

        Those began ``n_step`` steps earlier. Unless the chunk ``follows`` the one that was stored last, its first
        ``n_step`` + 3 transitions are left out: they need frames that are not stored.
        """
        start = self.num_steps[actor]
        steps = torch.arange(start - self.args.n_step, start + CHUNK + HISTORY, device=self.device)
        envs_per_actor = self.args.envs_per_actor
        envs = torch.arange(envs_per_actor, device=self.device) + actor * envs_per_actor
        places = (steps[:, None] * self.args.num_envs + envs) % self.capacity  # [n + CHUNK + 3, envs_per_actor]
        for name in self.ARRAYS:
            # the frames are those of the chunk's own steps, its transitions began n_step steps before
            first = self.args.n_step if name == "frames" else 0
            values = upload(chunk[name], self.device)
            getattr(self, name)[places[first : first + CHUNK]] = values
        if not follows:
            without_frames = places[: self.args.n_step + HISTORY].flatten()
            self.priorities.index_fill_(0, without_frames, 0)  # priorities[...] = 0 would wait for the GPU
        # the newest, whose successors are still to come, and the oldest, whose older frames have just gone
        stale = places[CHUNK:].flatten()
        self.priorities.index_fill_(0, stale, 0)
        self.num_steps[actor] += CHUNK

    def sample(self, batch_size: int) -> Batch:
        """Draws transitions in proportion to their priorities, without waiting for the device.

        One is drawn from each of ``batch_size`` equal shares of the priorities' sum (Schaul et al. 2016, B.2.1).
        """
        # float64: a sum of millions of terms, and the highest draw, 1 - 2**-24, must stay below it
        cumulative = self.priorities.cumsum(0, dtype=torch.float64)
        shares = torch.arange(batch_size, device=self.device)
        draws = shares + torch.rand(batch_size, device=self.device).double()
        indices = torch.searchsorted(cumulative, draws / batch_size * cumulative[-1], right=True)
        indices.clamp_(max=self.capacity - 1)  # after a nan priority: its loss, nan too, will end the run

        offsets = torch.arange(-HISTORY, self.args.n_step + 1, device=self.device) * self.args.num_envs
        places = (indices[:, None] + offsets) % self.capacity  # [batch, 4 + n]: 3 steps before, the drawn one, n after
        frames = self.frames.index_select(0, places.flatten())  # many times faster than self.frames[places]
        frames = frames.unflatten(0, places.shape)
        ages = self.ages.take(indices)
        for i in range(HISTORY):  # a frame that is older than the episode is blank
            same_episode = ages >= HISTORY - i
            frames[:, i] *= same_episode[:, None, None]

        # (N P(i))^-beta over its largest value in the batch (section 3.4), from which N and the sum vanish
        weights = self.priorities.take(indices) ** -self.args.prioritized_replay_beta
        return Batch(
            observations=frames[:, :STACK],
            actions=self.actions.take(indices).long(),
            returns=self.returns.take(indices),
            next_observations=frames[:, self.args.n_step :],
            discounts=self.discounts.take(indices),
            weights=weights / weights.max(),
            indices=indices,
        )

    def update_priorities(self, indices: torch.Tensor, td_errors: torch.Tensor) -> None:
        self.priorities[indices] = prioritize(td_errors, self.args.prioritized_replay_alpha)

    def state_dict(self) -> dict:
        """The filled part of the arrays; on the CPU these are views, not copies."""
        filled = min(max(self.num_steps) * self.args.num_envs, self.capacity)
        state = {"num_steps": self.num_steps}
        for name in self.ARRAYS:
            array = getattr(self, name)[:filled].cpu()
            state[name] = torch.from_numpy(array.numpy())  # else torch.save would write the whole array
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises an error unless the state is of such a replay."""
        num_steps = list(state["num_steps"])
        sane = all(type(steps) is int and 0 <= steps < 2**62 for steps in num_steps)
        if not sane or len(num_steps) != len(self.num_steps):
            raise ValueError(f"num_steps is {num_steps}")
        filled = min(max(num_steps) * self.args.num_envs, self.capacity)
        for name in self.ARRAYS:
            fill(getattr(self, name)[:filled], state[name])
        self.num_steps = num_steps


# ------------------------------------------------------------------------------------------------------ actor

RUNNING, TERMINATED, TRUNCATED = 0, 1, 2  # whether and how an episode ended at a step


def epsilons(args: Args) -> np.ndarray:
    """Epsilon of each environment of all actors, the greediest last (Horgan et al. 2018, section 4.1)."""
    last = args.num_envs - 1
    exponents = 1 + args.epsilon_exponent * np.arange(args.num_envs) / max(last, 1)
    return args.epsilon_base**exponents


def n_step_returns(rewards: np.ndarray, ends: np.ndarray, n_step: int, gamma: float) -> tuple[np.ndarray, ...]:
    """Returns, discounts and validity of all but the last ``n_step`` of the steps in ``rewards`` and ``ends``.

    Float32, float32 and bool, [steps - n_step, envs]. A return is the sum of gamma^k r_(t+k) up to the end of the
    episode; the discount of what follows is gamma^n, or 0 if the episode terminated; cut off within the n steps, a
    transition is not valid, for what would have followed is not known.
    """
    steps = len(rewards) - n_step
    returns = np.zeros_like(rewards[:steps])
    alive = np.ones(returns.shape, np.bool_)
    valid = np.ones(returns.shape, np.bool_)
    for k in range(n_step):
        end = ends[k : k + steps]
        returns += gamma**k * rewards[k : k + steps] * alive
        valid &= ~(alive & (end == TRUNCATED))
        alive &= end == RUNNING
    return returns, np.float32(gamma**n_step) * alive, valid


class Actor:
    """Plays ``envs_per_actor`` games with one forward pass a step, on one core: a Ray actor.

    Each of its environments has an epsilon of its own, as each actor has in the paper. ``start`` is the learner's
    step: a resumed run plays other games. An actor that Ray has started again has the seeds that it had at first.
    """

    def __init__(self, args: Args, number: int, start: int):
        # Ray sends this class, not the script: what the script sets when it starts must be set here too
        cv2.setNumThreads(1)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        torch.set_num_threads(1)
        self.args = args
        # every num_actors-th of all environments, so that each actor has small and large epsilons
        self.numbers = number + args.num_actors * np.arange(args.envs_per_actor)
        self.epsilons = epsilons(args)[self.numbers]
        self.rng = np.random.default_rng([args.seed, number, start])
        self.envs = [Game(args) for _ in self.numbers]
        precision = "float32" if args.precision == "float32" else "auto"  # the learner's may be too slow on this CPU
        dtype = getattr(torch, find_precision(precision, torch.device("cpu")))
        self.network = QNetwork(int(self.envs[0].action_space.n), dtype)
        self.network.to(memory_format=torch.channels_last)
        self.network.trunk.to(dtype)  # never trained: cast once for all steps
        seeds = self.rng.integers(2**31, size=len(self.envs)).tolist()
        self.observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds)])
        self.ages = np.zeros(len(self.envs), np.uint8)
        # the last n_step steps of the chunk before and those of this one: q_taken is Q(s, a), q_best max_a Q(s, a)
        shape = (self.args.n_step + CHUNK, len(self.envs))
        self.steps = {name: np.zeros(shape, np.uint8) for name in ("ages", "actions", "ends")}
        self.steps |= {name: np.zeros(shape, np.float32) for name in ("rewards", "q_taken", "q_best")}
        self.steps["frames"] = np.zeros((*shape, SIZE, SIZE), np.uint8)
        self.incarnation = time.time_ns()  # tells this actor from one that Ray starts in its place
        self.num_steps = 0
        self.updates = None  # that the learner had made when it published these weights
        self.finished = time.perf_counter()

    @torch.inference_mode()
    def play(self, weights: dict[str, np.ndarray], updates: int) -> dict:
        """Plays the next ``CHUNK`` steps with the learner's ``weights``, those after ``updates`` updates.

        Returns ``frames``, uint8 [CHUNK, envs, 84, 84], of these steps, and the transitions that they complete, which
        began ``n_step`` earlier, [CHUNK, envs] each: ``ages`` and ``actions``, uint8, ``returns``, ``discounts`` and
        ``priorities``, float32; the ``games`` that ended; this actor's ``incarnation``, and the number of the
        ``first_step`` in it; ``updates``; and ``waiting``, the share of time in which nothing was asked of it. The
        arrays may be views that the next call overwrites.
        """
        called = time.perf_counter()
        if updates != self.updates:
            self.network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
            self.updates = updates
        steps = self.steps
        for array in steps.values():
            array[: self.args.n_step] = array[CHUNK:]
        games = []
        for t in range(self.args.n_step, self.args.n_step + CHUNK):
            games += self.step(t)
        first_step = self.num_steps
        self.num_steps += CHUNK

        returns, discounts, valid = n_step_returns(steps["rewards"], steps["ends"], self.args.n_step, self.args.gamma)
        td_errors = returns + discounts * steps["q_best"][self.args.n_step :] - steps["q_taken"][:CHUNK]
        idle = called - self.finished
        busy = time.perf_counter() - called
        self.finished = called + busy
        return {
            "frames": steps["frames"][self.args.n_step :],
            "ages": steps["ages"][:CHUNK],
            "actions": steps["actions"][:CHUNK],
            "returns": returns,
            "discounts": discounts,
            "priorities": prioritize(td_errors, self.args.prioritized_replay_alpha) * valid,
            "games": games,
            "incarnation": self.incarnation,
            "first_step": first_step,
            "updates": updates,
            "waiting": idle / (idle + busy),
        }

    def step(self, t: int) -> list[dict]:
        """Makes one step of all environments, number ``t`` in ``steps``; returns the games that ended."""
        q_values = self.network(torch.from_numpy(self.observations)).numpy()
        greedy = q_values.argmax(1)
        random = self.rng.integers(q_values.shape[1], size=greedy.shape)
        explore = self.rng.random(greedy.shape) < self.epsilons
        actions = np.where(explore, random, greedy)
        steps = self.steps
        steps["frames"][t] = self.observations[:, -1]
        steps["ages"][t] = self.ages
        steps["actions"][t] = actions
        steps["q_taken"][t] = np.take_along_axis(q_values, actions[:, None], 1).squeeze(1)
        steps["q_best"][t] = q_values.max(1)
        games = []
        for i, env in enumerate(self.envs):
            observation, reward, terminated, truncated, info = env.step(int(actions[i]))
            steps["rewards"][t, i] = reward
            steps["ends"][t, i] = TERMINATED if terminated else truncated * TRUNCATED
            self.ages[i] = min(self.ages[i] + 1, HISTORY)
            if "episode" in info:
                games.append(info["episode"] | {"env": int(self.numbers[i])})
            if terminated or truncated:
                observation, _ = env.reset()
                self.ages[i] = 0
            self.observations[i] = observation
        return games


# ------------------------------------------------------------------------------------------------------ agent


class Agent:
    """Q-network, target network and optimizer."""

    # what a checkpoint holds of the agent; add a part to load_state_dict as well
    PARTS = ("q_network", "target_network", "optimizer", "metrics")

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.args = args
        self.device = device
        self.precision = find_precision(args.precision, device)
        dtype = getattr(torch, self.precision)
        layout = conv_layout(device)
        self.q_network = QNetwork(num_actions, dtype).to(device, memory_format=layout)
        self.target_network = QNetwork(num_actions, dtype).to(device, memory_format=layout)
        self.target_network.trunk.to(dtype)  # never trained: cast when copied, not in each update
        self.update_target()
        self.optimizer = torch.optim.RMSprop(
            self.q_network.parameters(),
            args.learning_rate,
            alpha=0.95,
            eps=1.5e-7**0.5,  # TensorFlow's (1.5e-7) stands under the root: where it matters, our steps are smaller
            centered=True,
            capturable=device.type == "cuda",
        )
        self.updates = 0  # made so far
        self.metrics = Means(device)

    def update(self, observations, actions, returns, next_observations, discounts, weights) -> torch.Tensor:
        """One step on the weighted squared TD errors of a ``Batch``; returns these errors, float32 [batch].

        The online network chooses the action that the target network evaluates (van Hasselt et al. 2016).
        """
        with torch.no_grad():
            best = self.q_network(next_observations).argmax(1, keepdim=True)
            next_values = self.target_network(next_observations).gather(1, best).squeeze(1)
            td_target = returns + discounts * next_values
        q_values = self.q_network(observations)
        q_values = q_values.gather(1, actions[:, None]).squeeze(1)
        td_errors = td_target - q_values
        loss = 0.5 * (weights * td_errors**2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.q_network.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.metrics.add({"td_loss": loss, "q_values": q_values, "abs_td_error": td_errors.abs()})
        return td_errors.detach()

    def update_target(self) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())

    def weights(self) -> dict[str, np.ndarray]:
        """The Q-network's weights for the actors; on the CPU these are views, not copies."""
        return {name: tensor.cpu().numpy() for name, tensor in self.q_network.state_dict().items()}

    @torch.no_grad()
    def think(self, observation: torch.Tensor) -> tuple[tuple[float, np.ndarray], int]:
        """What the overlay shows of one observation, value and advantages float32 [actions], and the greedy action."""
        value, advantages = self.q_network.streams(observation[None])
        advantages = advantages[0].cpu().numpy()
        return (value.item(), advantages), int(advantages.argmax())

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {"updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        load_moments(self.optimizer, state["optimizer"])  # before the weights: it may make a step
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        self.metrics.load_state_dict(state["metrics"])
        self.updates = int(state["updates"])


# --------------------------------------------------------------------------------------------------- training


def train(args: Args, device: torch.device, run_dir: Path, resume: Path | None) -> int:
    """Trains anew or from the checkpoint ``resume``; returns the exit code, 128 + the signal if one stopped it."""
    start_ray(args)
    set_up_learner(args, device)
    agent = Agent(args, int(Game(args).action_space.n), device)
    replay = Replay(args, find_replay_device(args, device))
    run = Run(args, run_dir, agent, {"replay": replay})
    global_step = run.start(resume)
    actors = Actors(args, global_step)
    actors.publish(agent.weights(), agent.updates)

    learn = one_ahead(capture_learning(args, agent, replay), device)
    free_running = args.steps_per_update is None  # no fixed ratio of steps to updates
    owed = 0.0  # updates still to be made
    logged_updates = agent.updates
    weights_ages = []  # of each chunk since the last log, in updates
    waiting = []  # of the same chunks, the share of time in which their actors had nothing to do

    def passed(frequency: int) -> int:
        """How many multiples of ``frequency`` the chunks received last have reached."""
        return multiples(frequency, before, global_step)

    with closing(run), closing(actors):
        while global_step < args.total_timesteps and not run.stop_signals:
            # store what the actors have played; wait for it only if there is nothing to learn
            before = global_step
            can_learn = free_running and global_step > args.learning_starts
            for actor, chunk, follows in actors.receive(patience=0 if can_learn else 1):
                replay.add(actor, chunk, follows)
                global_step += CHUNK * args.envs_per_actor
                run.log_games(chunk["games"], global_step)
                weights_ages.append(agent.updates - chunk["updates"])
                waiting.append(chunk["waiting"])

            # learn
            if global_step > args.learning_starts:
                steps = global_step - max(before, args.learning_starts)
                owed = 1 if free_running else owed + steps / args.steps_per_update
            while owed >= 1 and not run.stop_signals:
                learn()
                owed -= 1
                agent.updates += 1
                if agent.updates % args.target_network_frequency == 0:
                    agent.update_target()
            if passed(args.weights_frequency * args.num_envs) and agent.updates > actors.updates:
                actors.publish(agent.weights(), agent.updates)

            # log, save, evaluate
            if passed(LOG_FREQUENCY):
                seconds = time.perf_counter() - run.logged_time
                charts = {
                    "charts/updates_per_second": (agent.updates - logged_updates) / seconds,
                    "charts/replay_size": replay.size,
                    "charts/weights_age": np.mean(weights_ages),
                    "charts/actors_waiting": np.mean(waiting),
                }
                run.log(charts, global_step)
                logged_updates = agent.updates
                weights_ages.clear()
                waiting.clear()
            run.save_and_evaluate(global_step)
        run.finish(global_step)
    return run.exit_code


def capture_learning(args: Args, agent: Agent, replay: Replay) -> Callable[[], None]:
    """A function that samples and updates: on CUDA one graph, or only its update if the replay is in main memory."""

    def learn() -> None:
        *batch, indices = replay.sample(args.batch_size)
        td_errors = agent.update(*batch)
        replay.update_priorities(indices, td_errors)

    if replay.device == agent.device:
        return capture(learn, agent.device)
    update = capture(agent.update, agent.device)

    def learn_from_main_memory() -> None:
        *batch, indices = replay.sample(args.batch_size)
        td_errors = update(*(upload(x, agent.device) for x in batch))
        replay.update_priorities(indices, td_errors.to(replay.device))

    return learn_from_main_memory


# =============================================================================================================
#                Nothing below is part of the algorithm: games, videos, W&B, checkpoints, flags
# =============================================================================================================


# ------------------------------------------------------------------------------------------------ Atari games


class Atari(gym.Wrapper):
    """One Atari game as the network sees it (Mnih et al. 2015, Methods).

    Observations are ``uint8 [4, 84, 84]``, the newest frame last, zeros before an episode's first frame; they are
    views that the next ``step`` or ``reset`` overwrites. A frame is the maximum of the last two of 4 emulator frames
    in ALE's grayscale, resized by area. Rewards are clipped to their sign. When a game ends, ``info["episode"]`` has
    its true return ``r``, its length ``l`` in agent steps, and ``repeated_rewards``, the share of its rewards that were
    earned in a picture in which one had been earned before: it rises when one reward is earned again and again.

    With ``episodic_life``, an episode is one life of a game, else a whole one; but in names that come from Gymnasium
    and CleanRL (``info["episode"]``, ``episode_return``, the chart ``episodic_return``) it is always a whole game. An
    episode is ``terminated`` when the life or game is lost, and ``truncated`` at the frame limit. ``reset`` starts the
    next life, or the next game if ``game_ended``, and presses FIRE if there is such an action.

    A class that takes its place (see ``Game``) is a ``gym.Env`` made from the flags, with ``reset``, ``step``,
    ``screen``, ``find_game``, ``action_space``, and what the overlay shows: ``game``, ``action_names``, ``lives``,
    ``game_ended``, ``episode_return``, ``episode_length``, ``repeated_rewards`` and ``recording``.
    """

    def __init__(self, args: Args):
        self.game = self.find_game(args.env_id)
        env = gym.make(
            f"ALE/{self.game}-v5",
            obs_type="grayscale",
            frameskip=1,
            repeat_action_probability=0,  # actions stick here: the emulator's state does not hold the last one
            full_action_space=args.full_action_space,
            max_num_frames_per_episode=0,  # the limit is kept here, where it is told from the end of a game
            render_mode="rgb_array",
        )
        super().__init__(env.unwrapped)
        self.ale = self.unwrapped.ale
        self.action_names = self.unwrapped.get_action_meanings()
        self.emulator_actions = [ale_py.Action[name] for name in self.action_names]
        self.fire_action = self.action_names.index("FIRE") if "FIRE" in self.action_names else None
        self.max_episode_frames = args.max_episode_frames
        self.episodic_life = args.episodic_life
        self.sticky_actions = args.sticky_actions
        self.last_action = ale_py.Action.NOOP  # the action of the last emulator frame
        self.observation_space = gym.spaces.Box(0, 255, (STACK, SIZE, SIZE), np.uint8)
        self.screens = np.zeros((2, *self.ale.getScreenDims()), np.uint8)  # the last two emulator frames
        self.recording = False  # set it before ``reset``
        self.colors = np.zeros((*self.screens.shape, 3), np.uint8)  # the same in RGB, while recording
        self.stack = np.zeros((STACK, SIZE, SIZE), np.uint8)
        self.game_ended = True
        self.lives = 0
        self.episode_return = 0.0
        self.episode_length = 0
        self.num_rewards = 0  # only those above zero
        self.rewarded_pictures = set()  # checksums of the frames in which they were earned

    @staticmethod
    def find_game(env_id: str) -> str:
        """'Breakout' for 'Breakout', 'ALE/Breakout-v5' and 'BreakoutNoFrameskip-v4'.

        Ends the program if there is no such game.
        """
        game = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d)?$", "", env_id)
        try:
            gym.spec(f"ALE/{game}-v5")
        except gym.error.Error as error:
            sys.exit(f"error: --env-id {env_id} is no Atari game: {error}")
        return game

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts the next game if the last one has ended or a seed is given, otherwise the next life."""
        if self.game_ended or seed is not None:
            self._start_game(seed)
        if self.fire_action is not None:
            self._repeat_action(self.fire_action)
            if self.game_ended:
                return self.reset()
        self.stack[:-1] = 0  # nothing of the last episode is seen, and nothing from before FIRE
        self.lives = self.ale.lives()
        return self.stack, {}

    def _start_game(self, seed: int | None) -> None:
        self.env.reset(seed=seed)
        self.episode_return = 0.0
        for _ in range(self.unwrapped.np_random.integers(1, NOOP_MAX + 1)):
            self.episode_return += self.ale.act(ale_py.Action.NOOP)  # the clock of Skiing runs
            if self.ale.game_over(with_truncation=False):
                self.env.reset()
                self.episode_return = 0.0
        self.ale.getScreenGrayscale(self.screens[0])
        self.screens[1] = 0
        self.colors[:] = self.ale.getScreenRGB()
        self.last_action = ale_py.Action.NOOP
        self.game_ended = False
        self.episode_length = 0
        self.num_rewards = 0
        self.rewarded_pictures.clear()
        self._push_frame()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeats the action for 4 emulator frames; the reward is the sign of their sum."""
        reward = self._repeat_action(action)
        lives = self.ale.lives()
        life_lost = 0 < lives < self.lives  # some games show 0 lives for a few frames before they end
        self.lives = lives
        terminated = self.game_ended or (self.episodic_life and life_lost)
        at_limit = self.ale.getEpisodeFrameNumber() >= self.max_episode_frames
        truncated = at_limit and not self.game_ended
        self.game_ended |= truncated
        info = {}
        if self.game_ended:
            info["episode"] = {
                "r": self.episode_return,
                "l": self.episode_length,
                "repeated_rewards": self.repeated_rewards,
            }
        return self.stack, float(np.sign(reward)), terminated, truncated, info

    @property
    def repeated_rewards(self) -> float:
        repeated = self.num_rewards - len(self.rewarded_pictures)
        return repeated / max(self.num_rewards, 1)

    def screen(self) -> np.ndarray:
        """The game's picture, uint8 [height, width, 3], RGB: the current emulator frame.

        While ``recording``, the maximum of the last two, as the network sees it: many games draw a sprite in every
        other frame only. Of a game that has ended, these are its very last frames, which the network does not see.
        """
        return np.maximum(*self.colors) if self.recording else self.ale.getScreenRGB()

    def _repeat_action(self, action: int) -> float:
        reward = 0.0
        for frame in range(FRAME_SKIP):
            if not self.sticky_actions or self.np_random.random() >= self.sticky_actions:
                self.last_action = self.emulator_actions[action]
            reward += self.ale.act(self.last_action)
            if self.recording:
                self.ale.getScreenRGB(self.colors[frame % 2])
            self.game_ended = self.ale.game_over(with_truncation=False)
            if self.game_ended:
                break
            if frame == FRAME_SKIP - 2:
                self.ale.getScreenGrayscale(self.screens[1])
            elif frame == FRAME_SKIP - 1:
                self.ale.getScreenGrayscale(self.screens[0])
        reward = undo_rollover(reward)
        self.episode_return += reward
        self.episode_length += 1
        self._push_frame()
        if reward > 0:
            self._note_reward()
        return reward

    def _note_reward(self) -> None:
        """Counts a reward, and remembers the frame in which it was earned too coarsely for the score to show in it."""
        coarse = cv2.resize(self.stack[-2], (28, 28), interpolation=cv2.INTER_AREA) // 64
        self.rewarded_pictures.add(zlib.crc32(coarse))
        self.num_rewards += 1

    def _push_frame(self) -> None:
        brightest = self.screens[0]
        np.maximum(*self.screens, out=brightest)
        self.stack[:-1] = self.stack[1:]
        cv2.resize(brightest, (SIZE, SIZE), dst=self.stack[-1], interpolation=cv2.INTER_AREA)


Game = Atari  # the environment of this script: another class can stand here


def undo_rollover(reward: float) -> float:
    """The true points of a step in which the score ran over its last digit, as from 999,950 to 50.

    The emulator reports the difference, -999,900 for 100. A score of 5 digits or more falls by nine tenths of its
    range for no other reason.
    """
    if abs(reward) > 1e8:  # MiniatureGolf: a restored game has lost the count of its strokes (ale-py 0.12.1)
        return 0.0
    for limit in (1e5, 1e6, 1e7):
        if -limit < reward <= -0.9 * limit:
            return reward + limit
    return reward


# ------------------------------------------------------------------------------------------- actors under Ray


class Actors:
    """The learner's side of all actors: keeps ``REQUESTS`` chunks asked of each, and hands them over in order.

    Ray starts an actor that has died again, on another machine if its own is gone, and repeats the requests that were
    open, in any order. A request carries the weights published last; two older ones are played before it.
    """

    def __init__(self, args: Args, start: int):
        remote_actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Actor)
        self.actors = [remote_actor.remote(args, number, start) for number in range(args.num_actors)]
        self.requests = [deque() for _ in self.actors]  # the oldest first
        self.expected = [None] * args.num_actors  # incarnation and first step of the chunk after each actor's last
        self.heard = [time.monotonic()] * args.num_actors  # when each actor's last chunk arrived
        self.probe = ray.put(None)

    def publish(self, weights: dict[str, np.ndarray], updates: int) -> None:
        """Puts the weights where all actors find them, once; they count from the next request on."""
        self.check_ray()
        self.weights = ray.put(weights)
        self.updates = updates

    def receive(self, patience: float) -> Iterator[tuple[int, dict, bool]]:
        """Yields (actor, chunk, whether it follows the one before) for the next chunk of each actor that has one.

        Waits up to ``patience`` seconds for the first; without patience it goes on with the chunks after these, up to
        ``REQUESTS`` of each. Warns of an actor that has sent nothing for ``SILENCE`` seconds; ends the program if an
        actor has raised an error or Ray has died.
        """
        self.check_ray()
        for _ in range(1 if patience else REQUESTS):
            self.ask()
            oldest = {requests[0]: actor for actor, requests in enumerate(self.requests)}
            arrived = self.wait(list(oldest), timeout=patience)
            if not arrived:
                break
            arrived = self.wait(list(oldest), num_returns=len(oldest), timeout=0)  # perhaps others as well
            for reference in arrived:
                actor = oldest[reference]
                chunk = self.get(actor, reference)
                if chunk:
                    yield actor, chunk, self.follows(actor, chunk)
        self.miss_silent_actors()

    def ask(self) -> None:
        """Keeps ``REQUESTS`` chunks asked of each actor."""
        for actor, requests in enumerate(self.requests):
            while len(requests) < REQUESTS:
                requests.append(self.actors[actor].play.remote(self.weights, self.updates))

    def get(self, actor: int, reference) -> dict | None:
        """The chunk that answers an actor's oldest request; None, with a warning, if it was lost."""
        self.requests[actor].popleft()
        self.heard[actor] = time.monotonic()
        try:
            return ray.get(reference)
        except (ray.exceptions.RayTaskError, ray.exceptions.ActorDiedError) as error:
            sys.exit(f"error: actor {actor} failed:\n{error}")
        except ray.exceptions.RayError as error:  # lost with its machine, or on the way
            say(f"a chunk of actor {actor} was lost: {str(error).splitlines()[0]}", file=sys.stderr)

    def follows(self, actor: int, chunk: dict) -> bool:
        """Whether the chunk goes on where the actor's last one ended; tells if the actor was started again."""
        incarnation = chunk["incarnation"]
        first_step = chunk["first_step"]
        expected = self.expected[actor]
        self.expected[actor] = (incarnation, first_step + CHUNK)
        if expected and incarnation != expected[0]:
            say(f"actor {actor} died and has been started again", file=sys.stderr)
        return (incarnation, first_step) == expected

    def miss_silent_actors(self) -> None:
        """Warns once of each actor that has sent nothing for too long."""
        for actor, heard in enumerate(self.heard):
            if time.monotonic() - heard > SILENCE:
                problem = f"actor {actor} has sent nothing for {SILENCE} s: its machine is gone, busy or out of memory"
                remedy = "see raylet.out in Ray's logs, free memory or lower --buffer-size"
                say(f"{problem} (if memory is short, Ray kills it again and again: {remedy})", file=sys.stderr)
                self.heard[actor] = math.inf  # once is enough

    def check_ray(self) -> None:
        """Ends the program with a sentence if Ray has died: ``ray.get`` and ``ray.put`` would end it without a word."""
        self.wait([self.probe], timeout=0)

    def wait(self, references: list, **options) -> list:
        """``ray.wait``: those of the references that have arrived. Ends the program with a sentence if Ray has died."""
        try:
            arrived, _ = ray.wait(references, **options)
        except OSError:  # to be told at once: ``close`` asks Ray once more, which can end the program without a word
            say("error: the raylet, Ray's process on this machine, has died: go on with --resume", file=sys.stderr)
            sys.exit(1)
        return arrived

    def close(self) -> None:
        """Ends Ray. Takes the requests back first: Ray would complain of each that is open."""
        requests = [request for requests in self.requests for request in requests]
        with suppress(OSError):  # Ray has died
            for request in requests:
                ray.cancel(request)
            ray.wait(requests, num_returns=len(requests), timeout=10)
        ray.shutdown()


def start_ray(args: Args) -> None:
    """Starts Ray or joins the cluster, and settles ``num_actors``; ends the program if they do not fit."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if args.ray_address == "local":
        settle_num_actors(args, count_cores())
        options |= local_ray_options(args)
        problem = "Ray cannot start"
        # A signal to all processes of a terminal or job must not end Ray before the learner has saved.
        services = ray._private.services
        services.ConsolePopen = partial(services.ConsolePopen, start_new_session=True)
    else:
        problem = f"--ray-address {args.ray_address} is no running cluster of this RAY_AUTH_TOKEN"
        problem += " (ray start --head starts one)"
    try:
        if args.ray_address not in ("local", "auto"):  # Ray itself would try for minutes
            host, _, port = args.ray_address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(args.ray_address, **options)
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        sys.exit(f"error: {problem}: {reason.splitlines()[0]}")
    ray._private.worker._worker_logs_enabled = False  # nothing of Ray's about an actor that died: ``receive`` tells it
    if args.ray_address != "local":
        free = int(ray.available_resources().get("CPU", 0))
        settle_num_actors(args, free)
        if args.num_actors > free:
            advice = "start more nodes" if args.resume else "lower it, or start more nodes"
            sys.exit(f"error: --num-actors {args.num_actors} is more than the cluster's {free} free CPUs: {advice}")


def settle_num_actors(args: Args, num_cpus: int) -> None:
    """One actor for each CPU but the learner's, unless it is given; ends the program if the replay is too small."""
    args.num_actors = args.num_actors or max(num_cpus - 1, 1)
    needed = args.num_envs * (CHUNK + args.n_step + HISTORY)
    if args.buffer_size < needed:
        games = f"{args.num_actors} actors with {args.envs_per_actor} games each"
        problem = f"--buffer-size {args.buffer_size} is too small for chunks of {games}"
        sys.exit(f"error: {problem}: it must be at least {needed}")


def local_ray_options(args: Args) -> dict:
    """What ``ray.init`` needs to start Ray on this machine alone."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # else Ray writes one into the home folder
    os.environ.setdefault("RAY_worker_niceness", "0")  # else every other program's work comes before the actors'
    in_flight = REQUESTS * CHUNK * args.num_envs * BYTES_PER_TRANSITION
    options = {"num_cpus": args.num_actors, "object_store_memory": 2 * in_flight + 2**28}
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "")
    if len(os.fsencode(folder)) > 35:
        options["_temp_dir"] = "/tmp/ray"  # the path of a socket has at most 103 bytes, 68 of them are Ray's
    return options


def set_up_learner(args: Args, device: torch.device) -> None:
    """Seeds torch and sets up the device, beside actors on the same machine."""
    set_up_torch(args, device)
    if device.type != "cuda" and args.ray_address == "local":  # leave their cores to the actors
        torch.set_num_threads(max(torch.get_num_threads() - args.num_actors, 1))
    torch.set_flush_denormal(True)  # RMSProp's averages of gradients that have stopped fade into slow tiny numbers


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


# -------------------------------------------------------------------------------------- overlay and recorder

GROUND = (18, 19, 23)
TEXT = (236, 237, 240)
QUIET = (139, 143, 151)  # words that stand back
GRID = (52, 55, 62)
BAR = (86, 110, 142)
GREEDY = (80, 176, 240)  # the action that the network prefers
CHOSEN = (255, 196, 92)  # the action taken
GAIN = (112, 200, 104)  # a reward
LOSS = (232, 92, 92)  # a penalty
TRACE_STEPS = 150  # 10 seconds of play
TRACE_SPAN = 0.01  # the least that a trace spans, so that noise does not fill it
BAR_SPAN = 1e-5  # the least that a full bar stands for: below lie rounding errors
if not hasattr(cv2, "FontFace"):  # OpenCV 4 was installed over OpenCV 5
    advice = "pip uninstall opencv-python, then pip install --force-reinstall --no-deps opencv-python-headless"
    sys.exit(f"error: OpenCV 5 is needed and cv2 is {cv2.__version__}: {advice}")
FONT = cv2.FontFace("sans")


def number(value: float) -> str:
    """The most exact of four forms that has at most 8 characters: 2.413, -1,250.5, 123,457, 3.2e+30; nan, inf."""
    value = round(value, 3) + 0.0  # no -0.000
    for form in (",.3f", ",.1f", ",.0f", ".2g"):
        text = format(value, form)
        if len(text) <= 8:
            break
    return text


def finite_range(values: np.ndarray, least: float = 0.0) -> tuple[float, float]:
    """The lowest and the highest finite value, the latter at least ``low + least * max(1, largest magnitude)``."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        finite = np.zeros(1)
    low = float(finite.min())
    high = float(finite.max())
    span = least * max(1.0, abs(low), abs(high))
    return low, max(high, low + span)


class Overlay(gym.Wrapper):
    """Draws the game beside what the network thinks of it, 960x630, RGB.

    Call ``note`` with the values of the state before each ``step``; ``render`` then returns the picture of that
    state (one array, overwritten by the next call). Once the game has ended it returns the picture of its end, without
    thoughts. Drawing is left to ``render``: steps that are not recorded cost nothing.
    """

    WIDTH, HEIGHT = 960, 630
    LEFT, RIGHT = 504, 936  # of the panel's content

    def __init__(self, env: Atari, subtitle: str, epsilon: float):
        super().__init__(env)
        self.subtitle = subtitle
        self.epsilon = epsilon
        self.notice = ""  # what the recorder has to say about this picture
        self.canvas = np.empty((self.HEIGHT, self.WIDTH, 3), np.uint8)

    def new_game(self) -> None:
        self.values = deque(maxlen=TRACE_STEPS)  # V(s) of the last states
        self.returns = deque(maxlen=TRACE_STEPS)  # return of the game up to each of them

    def reset(self, **kwargs):
        new_game = self.env.game_ended
        outcome = self.env.reset(**kwargs)
        if new_game:
            self.new_game()
            self.has_lives = self.env.lives > 0
        return outcome

    def step(self, action: int):
        outcome = self.env.step(action)
        *_, self.truncated, _ = outcome
        return outcome

    def note(self, thoughts: tuple[float, np.ndarray], action: int) -> None:
        """Notes value and advantages (float [actions]) of the current state and the action about to be taken."""
        self.value, self.advantages = thoughts
        self.action = action
        self.greedy = int(np.argmax(self.advantages))
        self.values.append(self.value)
        self.returns.append(self.env.episode_return)

    def render(self) -> np.ndarray:
        self.draw_game()
        if self.env.game_ended:
            self.draw_end()
        else:
            self.draw_streams(top=104, bottom=428)
        self.draw_trace(self.values, "V(s) = mean Q, last 10 s", GREEDY, top=466, bottom=548)
        self.draw_facts(top=581)
        return self.canvas

    def draw_game(self) -> None:
        """The game on the left, its name on the empty panel on the right."""
        middle = self.WIDTH // 2
        game = self.canvas[:, :middle]
        cv2.resize(self.env.screen(), game.shape[1::-1], dst=game, interpolation=cv2.INTER_NEAREST)
        self.box(middle, 0, self.WIDTH, self.HEIGHT, GROUND)
        self.text(self.env.game, self.LEFT, 40, TEXT, 22, 600)
        self.text(self.notice, self.RIGHT, 40, CHOSEN, 14, 600, right=True)
        self.text(self.subtitle, self.LEFT, 64, QUIET, 14)

    def draw_end(self) -> None:
        """What the game came to, in the place of thoughts."""
        ending = "cut off at the frame limit" if self.truncated else "game over"
        self.text(ending, self.LEFT, 200, TEXT, 22, 600)
        outcome = f"return {self.env.episode_return:,.0f} after {self.env.episode_length:,} steps"
        self.text(outcome, self.LEFT, 232, QUIET, 18)

    def draw_streams(self, top: int, bottom: int) -> None:
        """Value, advantages and their sums, the Q-values; a bar an action, from the middle: its advantage."""
        advantages = self.advantages
        right = self.LEFT + 346
        self.title(top - 14, f"V(s) = {number(self.value)}", "Q = V + A", self.action_legend())
        self.text("A(s, a)", right, top - 14, QUIET, 14, right=True)
        pitch = min(36, (bottom - top) // len(advantages))
        size = min(15, pitch - 4)
        middle = self.LEFT + 196
        half = 66
        largest = max(*map(abs, finite_range(advantages)), BAR_SPAN)
        self.box(middle, top, middle, top + pitch * len(advantages) - 1, GRID)
        for i, advantage in enumerate(advantages.tolist()):
            y = top + i * pitch
            baseline = y + (pitch + size) // 2 - 2
            length = 0
            if math.isfinite(advantage):
                length = round(half * advantage / largest)
            color = GREEDY if i == self.greedy else BAR
            self.box(middle, y + 3, middle + length, y + pitch - 4, color)
            if i == self.action:
                self.box(middle - half - 4, y, middle + half + 4, y + pitch - 1, CHOSEN, 2)
            self.text(number(advantage), right, baseline, QUIET, size, right=True)
            self.label(i, self.value + advantage, baseline, size)

    def draw_trace(self, values: deque, title: str, color: tuple, top: int, bottom: int) -> None:
        """Values of the last seconds; a line at a state is the reward that its action brought."""
        values = np.array(values)
        low, high = finite_range(values, TRACE_SPAN)
        self.title(top - 14, title, f"{number(low)} to {number(high)}", {"reward": GAIN, "penalty": LOSS})
        self.box(self.LEFT, bottom, self.RIGHT, bottom, GRID)
        age = np.arange(len(values))[::-1]
        x = self.RIGHT - age * (self.RIGHT - self.LEFT) / (TRACE_STEPS - 1)
        y = bottom - (values - low) / (high - low) * (bottom - top)
        rewards = np.diff([*self.returns, self.env.episode_return])
        for at, reward in zip(x.round().astype(int).tolist(), rewards):
            if reward:
                self.box(at, top, at, bottom, GAIN if reward > 0 else LOSS)
        shown = np.isfinite(values)
        points = np.stack([x, y], 1)[shown].round().astype(np.int32)
        cv2.polylines(self.canvas, [points], False, color, 2, cv2.LINE_AA)

    def draw_facts(self, top: int) -> None:
        env = self.env
        facts = {
            "return": f"{env.episode_return:,.0f}",
            "step": f"{env.episode_length:,}",
            "epsilon": f"{self.epsilon:g}",
            "repeated rewards": f"{env.repeated_rewards:.2f}",
        }
        if self.has_lives:
            facts["lives"] = str(env.lives)
        columns = (0, 100, 180, 262, 392)
        for column, (name, value) in zip(columns, facts.items()):
            self.text(name, self.LEFT + column, top, QUIET, 14)
            self.text(value, self.LEFT + column, top + 23, TEXT, 18, 600)

    def action_legend(self) -> dict:
        """What the colors of actions mean, for ``title``."""
        taken = "taken" if self.action == self.greedy else "exploring"
        return {"greedy": GREEDY, taken: CHOSEN}

    def label(self, action: int, value: float, y: int, size: int) -> None:
        """Name and value of an action, those that count in bright letters."""
        name = self.env.action_names[action]
        marked = action in (self.action, self.greedy)
        color = TEXT if marked else QUIET
        weight = 600 if marked else 400
        self.text(name, self.LEFT, y, color, size, weight)
        self.text(number(value), self.RIGHT, y, color, size, weight, right=True)

    def box(self, left, top, right, bottom, color, border=-1) -> None:
        """A filled rectangle, or an empty one with so wide a border; its last pixels are ``right`` and ``bottom``."""
        cv2.rectangle(self.canvas, (left, top), (right, bottom), color, border)

    def title(self, y: int, text: str, figure: str, legend: dict) -> None:
        """Heads a part: its name, words in the colors that they explain, a figure at the right."""
        x = self.text(text, self.LEFT, y, QUIET, 14)
        for word, color in legend.items():
            x = self.text(word, x + 14, y, color, 14)
        self.text(figure, self.RIGHT, y, QUIET, 14, right=True)

    def text(self, text, x, y, color, size, weight=400, right=False) -> int:
        """Writes on the baseline y, from x or, with ``right``, up to x; returns the x at which the text ends."""
        align = cv2.PUT_TEXT_ALIGN_RIGHT if right else cv2.PUT_TEXT_ALIGN_LEFT
        return cv2.putText(self.canvas, text, (x, y), color, FONT, size, weight, align)[0][0]


class Recorder:
    """Streams pictures into an mp4 file, 15 a second; a failure is reported once and never ends a run."""

    def __init__(self, path: Path, length: int):
        self.path = path
        self.length = length  # most pictures
        self.count = 0  # pictures in the file
        self.active = length > 0  # whether more pictures are wanted
        self.still = None  # the latest of every 100th picture, for W&B and LEET
        self.ffmpeg = None

    def write(self, overlay: Overlay) -> None:
        """Adds one picture of ``overlay``, unless the video is closed, has failed or has its full length."""
        if not self.active:
            return
        if self.count + 1 == self.length and not overlay.env.game_ended:
            overlay.notice = "the video is cut here"
            say(f"{self.path} is cut after {self.length:,} steps, the game goes on: see more with --video-length")
        try:
            picture = overlay.render()
            if self.ffmpeg is None:
                self.start(picture)
            self.ffmpeg.stdin.write(picture)
        except BrokenPipeError:
            self.close()  # asks ffmpeg what happened
        except Exception as error:
            self.fail(error)
        else:
            if self.count % 100 == 0 and not overlay.env.game_ended:
                self.still = picture.copy()
            self.count += 1
            self.active = self.count < self.length

    def start(self, picture: np.ndarray) -> None:
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

        self.path.parent.mkdir(parents=True, exist_ok=True)
        height, width, _ = picture.shape
        options = {"preset": "veryfast", "threads": 1}
        options["ffmpeg_params"] = ["-movflags", "+faststart"]  # a browser can play it while it loads
        # ffmpeg inherits the mask, so that Ctrl-C, which signals every process of a terminal, does not end it
        mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
        if mask:
            mask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.ffmpeg = FFMPEG_VideoWriter(str(self.path), (width, height), 60 / FRAME_SKIP, **options).proc
        finally:
            if mask:
                mask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def close(self) -> None:
        """Ends the video; pictures that come later are left out."""
        self.active = False
        if self.ffmpeg:
            _, complaint = self.ffmpeg.communicate()
            if self.ffmpeg.returncode:
                *_, last_line = ["", *complaint.decode(errors="replace").splitlines()]
                self.fail(f"ffmpeg ended with {self.ffmpeg.returncode} {last_line}")
            self.ffmpeg = None

    def fail(self, reason) -> None:
        say(f"warning: no video {self.path}: {reason}", file=sys.stderr)
        self.active = False
        self.count = 0


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(args: Args, agent: Agent, global_step: int, run_dir: Path, tracker, stopped=lambda: False) -> None:
    """Plays whole games, records the first, prints and logs the results.

    All its random states are its own, so that training does not depend on when it is evaluated. A true ``stopped()``
    ends it early, without results.
    """
    game = Game(args)
    env = Overlay(game, f"{slug(args.exp_name)[:24]} \u2022 trained {global_step:,} steps", args.eval_epsilon)
    rng = np.random.default_rng([args.seed, global_step])
    video = run_dir / "videos" / f"{global_step:010d}.mp4"
    recorder = Recorder(video, args.video_length if args.capture_video else 0)
    game.recording = recorder.active
    episodes = []
    progress = tqdm(total=args.eval_episodes, desc="evaluating", unit="game", leave=False, disable=None)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    while len(episodes) < args.eval_episodes and not stopped():
        thoughts, action = agent.think(upload(observation, agent.device))
        if rng.random() < args.eval_epsilon:
            action = int(rng.integers(env.action_space.n))
        env.note(thoughts, action)
        recorder.write(env)
        observation, _, terminated, truncated, info = env.step(action)
        if "episode" in info:  # the end of the game is the last picture
            recorder.write(env)
            recorder.close()
            episodes.append(info["episode"])
            progress.update()
        game.recording = recorder.active
        if terminated or truncated:
            observation, _ = env.reset()
    recorder.close()
    progress.close()
    if len(episodes) < args.eval_episodes:
        return
    charts = episode_means("eval", episodes)
    mean = charts["eval/episodic_return"]
    length = charts["eval/episodic_length"]
    spread = float(np.std([episode["r"] for episode in episodes]))
    result = f"step {global_step:,}: return {mean:,.1f}"
    if len(episodes) > 1:
        result += f" \u00b1 {spread:,.1f} over {len(episodes)} games"
    say(f"{result}, {length:,.0f} steps a game")
    tracker.log(charts | {"eval/episodic_return_std": spread}, global_step)
    if recorder.count:
        tracker.log_video(video, recorder.still, global_step)


def episode_means(prefix: str, games: list[dict]) -> dict[str, float]:
    """The charts of games that have ended, each the mean over them."""
    names = {"r": "episodic_return", "l": "episodic_length", "repeated_rewards": "repeated_rewards"}
    return {f"{prefix}/{name}": float(np.mean([game[key] for game in games])) for key, name in names.items()}


# ------------------------------------------------------------------------------------------- Weights & Biases


def slug(text: str) -> str:
    """``text`` as a name that files and W&B's runs, projects and artifacts may have.

    ASCII letters, digits and ``_.-``, at most 64 of them: of a longer text the middle is left out.
    """
    letters = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    name = re.sub(r"[^\w.-]+", "-", letters, flags=re.ASCII).lstrip(".")
    if len(name) > 64:
        name = name[:31] + "--" + name[-31:]
    return name or "run"


class Tracker:
    """The run's record in Weights & Biases.

    An error of W&B never ends a run that has started: it becomes one warning, after which the tracker does nothing, as
    it does when W&B is disabled. If only the model cannot be uploaded, tracking goes on.
    """

    def __init__(self, args: Args, run_dir: Path, job_type: str = "train", run_id: str | None = None):
        self.run = None
        self.run_id = run_id or slug(run_dir.resolve().name)
        mode = os.environ.get("WANDB_MODE", "auto") if args.wandb_mode == "auto" else args.wandb_mode
        self.working = mode != "disabled"
        if self.working:
            with self.guard():
                self.start(args, mode, job_type)

    def start(self, args: Args, mode: str, job_type: str) -> None:
        """Begins or resumes the run, offline where online fails. Never asks for a login."""
        if mode != "auto":
            os.environ["WANDB_MODE"] = mode  # a flag wins over this variable
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's reports on itself can hold up the exit
        import wandb

        self.wandb = wandb
        script = os.path.abspath(__file__)
        options = dict(
            project=slug(args.wandb_project_name),
            entity=args.wandb_entity,
            group=args.wandb_group or f"{args.env_id}__{slug(args.exp_name)}",
            job_type=job_type,
            id=self.run_id,
            name=self.run_id,
            resume="allow",
            config=asdict(args) | {"game": args.env_id, "algorithm": ALGORITHM},
            save_code=True,
            settings=dict(init_timeout=30, program_abspath=script, program_relpath=os.path.basename(script)),
        )
        reason = ""
        if mode in ("auto", "online"):
            try:
                logged_in = wandb.login(prompt=False, verify=False)
                if args.wandb_mode == "online" and not logged_in:
                    sys.exit("error: --wandb-mode online needs a login: run wandb login, or leave the flag out")
                if logged_in:
                    self.run = wandb.init(mode="online", **options)
                reason = "no login, or wandb offline was called: "  # the latter wins over the mode
            except wandb.Error as error:
                reason = f"{textwrap.shorten(str(error), 200)}: "
                self.background(wandb.teardown).join(1)  # the failed start holds the run's name
            mode = "offline"
        if self.run is None:
            self.run = wandb.init(mode=mode, **options)
        if self.run.offline:
            say(f"W&B: {reason}recorded offline; see it with wandb leet, upload it with wandb sync")
        os.environ.setdefault("WANDB_DATA_DIR", self.run.sync_dir)  # copies of the model: beside the record
        self.run_id = self.run.id
        self.run.define_metric("global_step", hidden=True)  # an axis, not a chart
        self.run.define_metric("*", step_metric="global_step")

    def log(self, metrics: dict, global_step: int) -> None:
        """Joins what has the same ``global_step`` into one row; steps must not fall.

        A run that was killed and resumed repeats steps: those that have arrived already are left out.
        """
        if self.working and global_step >= self.run.starting_step:
            with self.guard():
                self.run.log(metrics | {"global_step": global_step}, step=global_step)

    def log_video(self, path: Path, still: np.ndarray, global_step: int) -> None:
        if self.working:
            with self.guard():
                video = self.wandb.Video(str(path), format="mp4")
                self.log({"videos/eval": video, "images/eval": self.wandb.Image(still)}, global_step)

    def log_model(self, path: Path) -> None:
        if self.working:
            with self.guard():
                artifact = self.wandb.Artifact(f"{self.run_id}-model", type="model")
                artifact.add_file(str(path), skip_cache=True)
                self.background(self.run.log_artifact, artifact).join(10)  # asks the server first

    def finish(self, exit_code: int = 0, stopped=lambda: False) -> None:
        """Waits until all is uploaded, or until a signal (``stopped()``), and after that for 10 seconds at most."""
        if self.run is None:
            return
        command = f"wandb sync --include-online {self.run.sync_dir}"
        uploading = self.background(self.run.finish, exit_code)
        uploading.join(5)
        if uploading.is_alive() and not stopped():
            say(f"W&B: waiting for the upload; Ctrl-C ends that: the record is on disk, later: {command}")
        while uploading.is_alive() and not stopped():
            uploading.join(0.2)
        if uploading.is_alive():
            say(f"W&B: not all was uploaded; the record is on disk, later: {command}")
        self.working = False
        self.background(self.wandb.teardown).join(5)  # at exit W&B would begin to wait again

    def background(self, function, *arguments) -> threading.Thread:
        def call():
            try:
                function(*arguments)
            except Exception as error:
                self.warn(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        return thread

    @contextmanager
    def guard(self):
        """Whatever is raised inside is one warning, and the end of tracking."""
        try:
            yield
        except Exception as error:
            self.warn(error)
            self.working = False

    def warn(self, error: Exception) -> None:
        if self.working:
            reason = textwrap.shorten(str(error) or type(error).__name__, 200)
            say(f"warning: W&B: {reason}: the run goes on without it", file=sys.stderr)


# ------------------------------------------------------------------------------------ devices and CUDA graphs


def device_types() -> list[str]:
    """The kinds of device that this machine has: one of GPU, if any, and cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [accelerator.type, "cpu"] if accelerator else ["cpu"]


def find_device(name: str) -> torch.device:
    """The device that ``--device`` means; ends the program if this machine has none such."""
    usable = device_types()
    if name == "auto":
        name = "cuda" if "cuda" in usable else "cpu"  # no other kind has been tested
    try:
        device = torch.device(name)
    except RuntimeError:
        sys.exit(f"error: --device {name} is no device: this machine has {', '.join(usable)}")
    if device.type not in usable or (device.index or 0) >= max(torch.accelerator.device_count(), 1):
        sys.exit(f"error: --device {name} is not there: this machine has {', '.join(usable)}")
    return device


def find_precision(name: str, device: torch.device) -> str:
    """The precision that ``--precision`` means on ``device``: float32 or bfloat16."""
    if name == "auto":
        return "bfloat16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "float32"
    return name


def set_up_torch(args: Args, device: torch.device) -> None:
    """Seeds torch, and sets up the device and its arithmetic, for training and ``--evaluate`` alike."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use by default
        torch.set_num_threads(1)  # for the small copies left to the CPU: to wake other threads takes longer


def conv_layout(device: torch.device) -> torch.memory_format:
    """How the weights of convolutions lie in memory: channels last, which is faster, but not on MPS.

    There torch has read weights wrongly unless they were contiguous: https://github.com/pytorch/pytorch/issues/192212
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: to hand it back and to fault it in anew takes a tenth of an update on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: the highest that it takes
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def capture(function: Callable, device: torch.device) -> Callable:
    """``function``, as one CUDA graph if the device is CUDA."""
    return CudaGraph(function) if device.type == "cuda" else function


class CudaGraph:
    """Calls ``function`` three times as it is, then captures it and replays it as one CUDA graph.

    Capture needs those calls to warm up cuDNN and the optimizer; they count like any other. Inputs are copied into
    fixed tensors; each call overwrites the outputs of the one before.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, function):
        self.function = function
        self.graph = None
        self.calls = 0
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: torch.Tensor):
        if self.calls < 3:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        for fixed, x in zip(self.inputs, inputs):
            fixed.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.outputs


def one_ahead(function: Callable, device: torch.device) -> Callable:
    """``function``, each call of which waits, on CUDA, for the end of the one before.

    Else calls would pile up, and what waits for the GPU would wait for all of them.
    """
    if device.type != "cuda":
        return function
    previous_call = torch.cuda.Event(blocking=True)  # the actors need the core on which it would spin

    def call() -> None:
        function()
        previous_call.synchronize()
        previous_call.record()

    return call


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on the device; on CUDA it is made without waiting."""
    tensor = torch.as_tensor(array)
    if device.type != "cuda":
        return tensor.clone(memory_format=torch.contiguous_format).to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


class Means:
    """Means of named numbers, summed on the device without waiting for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums = {}  # of each name a float32 [2]: the sum and the count since ``take``

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Adds the mean of each tensor."""
        for name, values in metrics.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(2, device=self.device)
            total, count = self.sums[name]
            total += values.detach().float().mean()
            count += 1

    def means(self) -> dict[str, float]:
        """The means so far; ends the program if one is not finite."""
        means = {}
        for name, sums in self.sums.items():
            total, count = sums.tolist()
            if not math.isfinite(total):
                sys.exit(f"error: {name} became {total}: go on from the last checkpoint with a lower --learning-rate")
            if count:
                means[name] = total / count
        return means

    def take(self) -> dict[str, float]:
        """The means so far; the next ones begin anew."""
        means = self.means()
        for sums in self.sums.values():
            sums.zero_()
        return means

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.sums

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums = {}
        for name, saved in state.items():
            self.sums[name] = torch.zeros(2, device=self.device)
            fill(self.sums[name], saved)


def fill(ours: torch.Tensor | dict, saved: torch.Tensor | dict) -> None:
    """Copies a saved tensor, or each of a dictionary, into ours; raises an error if a name, shape or dtype differs."""
    if isinstance(ours, dict):
        if set(ours) != set(saved):
            raise ValueError(f"{list(saved)} are saved where {list(ours)} belong")
        for name, tensor in ours.items():
            fill(tensor, saved[name])
    elif not isinstance(saved, torch.Tensor) or saved.shape != ours.shape or saved.dtype != ours.dtype:
        raise ValueError(f"what is saved is no {ours.dtype} {list(ours.shape)}")
    else:
        ours.copy_(saved)


def load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Loads moments, not options such as the learning rate: those come from this start's flags and device."""
    if saved["state"] and not optimizer.state:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.zeros_like(parameter) if i in saved["state"] else None
        optimizer.step()  # makes the moments as this device needs them
        optimizer.zero_grad()
    fill(optimizer.state_dict()["state"], saved["state"])


# ------------------------------------------------------------------------------------------ memory of a replay


def blank_frames(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Zeros, uint8. In main memory they take space as they are written to; ``torch.zeros`` would take it at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    try:
        return torch.from_numpy(np.zeros(shape, np.uint8))
    except MemoryError:
        needed = f"{math.prod(shape) / 1e9:.1f} GB"
        sys.exit(f"error: the replay needs {needed}, more than this process may have (ulimit): lower --buffer-size")


def free_memory(device: torch.device, root: str = "/") -> float:
    """Bytes that a replay or rollout may take on ``device``.

    Main memory is the machine's, or what this process's cgroup or one above it (version 1 or 2) allows, if it is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - 2e9  # 2 GB for networks, cuDNN and graphs
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf]
    cgroups = Path(root, "proc/self/cgroup")
    for line in cgroups.read_text().splitlines() if cgroups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        folder = Path(f"{root}/sys/fs/cgroup/{controllers}/{path}")
        for level in (folder, *folder.parents):
            for file in (level / "memory.max", level / "memory.limit_in_bytes"):
                text = file.read_text().strip() if file.is_file() else "max"
                limits += [int(text)] if text.isdigit() else []
    return min(limits) - 1e9  # 1 GB for the program and the games


def check_memory(flag: str, needed: float, device: torch.device) -> None:
    """Ends the program if ``flag`` needs more bytes than there are on ``device``."""
    free = max(free_memory(device), 0)
    if needed > free:
        sys.exit(f"error: {flag} needs {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB for it: lower it")


def find_replay_device(args: Args, device: torch.device) -> torch.device:
    """The learner's device if it is CUDA and the replay fits there, else main memory (on MPS they are the same).

    Ends the program if it does not fit. It must always fit into main memory: every checkpoint goes through there.
    """
    if args.replay_device == "cuda" and device.type != "cuda":
        sys.exit(f"error: --replay-device cuda is not for a learner on {device}: give auto")
    main_memory = torch.device("cpu")
    needed = args.buffer_size * BYTES_PER_TRANSITION
    actors_here = args.num_actors if args.ray_address == "local" else 0
    replay_and_actors = f"--buffer-size {args.buffer_size} with {actors_here} actors on this machine"
    check_memory(replay_and_actors, needed + actors_here * ACTOR_BYTES, main_memory)
    if device.type != "cuda" or args.replay_device == "cpu":
        return main_memory
    if args.replay_device == "cuda":
        check_memory(f"--buffer-size {args.buffer_size}", needed, device)
    return device if needed <= free_memory(device) else main_memory


# -------------------------------------------------------------------------------------------------- the run


class Run:
    """What surrounds the training loop: W&B, checkpoints, evaluations, signals and the progress bar.

    A checkpoint holds the agent, random states and ``parts``: by name, what has ``state_dict`` and
    ``load_state_dict``.
    """

    def __init__(self, args: Args, run_dir: Path, agent: Agent, parts: dict):
        self.args = args
        self.run_dir = run_dir
        self.agent = agent
        self.parts = parts
        self.saved_step = None  # of the last checkpoint
        self.returns = deque(maxlen=20)  # of the last games
        self.exit_code = 1

    def start(self, resume: Path | None) -> int:
        """Begins anew or goes on from the checkpoint ``resume``; returns the step that it was written at."""
        self.lock = lock(self.run_dir)
        global_step = 0
        run_id = None
        self.evaluated_step = 0  # evaluations due up to this step have been played
        if resume:
            global_step, run_id = self.load_checkpoint(resume)
            self.saved_step = global_step
        self.tracker = Tracker(self.args, self.run_dir, run_id=run_id)
        self.stop_signals = catch_signals()
        self.bar = tqdm(total=self.args.total_timesteps, initial=global_step, unit="step", disable=None)
        self.logged_time = self.said_time = self.checkpoint_time = time.perf_counter()
        self.logged_step = global_step
        return global_step

    def load_checkpoint(self, path: Path) -> tuple[int, str]:
        """Loads all parts; returns the step and W&B's name of the run."""
        contents = load(path, resume=True)  # not before the workers fork: they would keep its disk space
        try:
            global_step = contents["global_step"]
            run_id = slug(contents["wandb_run_id"])
            self.agent.load_state_dict(contents["agent"])
            for name, part in self.parts.items():
                part.load_state_dict(contents[name])
            load_random_state(contents["random"], self.agent.device)
            self.check_step(global_step)
            self.evaluated_step = min(contents["evaluated_step"], global_step)
            if contents["precision"] != self.agent.precision:
                say(f"the precision is {self.agent.precision} here; it was {contents['precision']}")
        except Exception as error:
            refuse(path, error)
        return global_step, run_id

    def check_step(self, global_step: int) -> None:
        """Raises an error unless the replay was filled in so many steps."""
        num_steps = self.parts["replay"].num_steps
        if global_step != sum(num_steps) * self.args.envs_per_actor:
            raise ValueError(f"step {global_step} does not belong to a replay of {num_steps} steps")

    def save_checkpoint(self, global_step: int) -> None:
        with self.uncounted():
            check_finite(self.agent)  # before the last good checkpoint is replaced
            contents = header(self.args, global_step)
            contents["precision"] = self.agent.precision
            contents["wandb_run_id"] = self.tracker.run_id
            contents["evaluated_step"] = self.evaluated_step
            contents["random"] = random_state(self.agent.device)
            for name, part in {"agent": self.agent, **self.parts}.items():
                contents[name] = part.state_dict()
            if save(self.run_dir / "checkpoint.pt", contents):
                self.saved_step = global_step

    def save_and_evaluate(self, global_step: int) -> None:
        """Does each when it is due; after the last step ``finish`` does."""
        if global_step >= self.args.total_timesteps:
            self.evaluated_step = global_step
            return
        if self.checkpoint_is_due():
            self.save_checkpoint(global_step)
            self.checkpoint_time = time.perf_counter()  # also after a failure: no new try at every step
        if self.evaluation_is_due(global_step):
            self.evaluate(global_step)
        if not self.stop_signals:  # else an evaluation may have been cut off: --resume plays it
            self.evaluated_step = global_step

    def checkpoint_is_due(self) -> bool:
        minutes = (time.perf_counter() - self.checkpoint_time) / 60
        return 0 < self.args.checkpoint_minutes < minutes

    def evaluation_is_due(self, global_step: int) -> bool:
        """Whether a multiple of the frequency, or a tenth of it, was reached since ``evaluated_step``."""
        before = self.evaluated_step
        frequency = self.args.eval_frequency
        is_first = before < frequency // 10 <= global_step
        return is_first or multiples(frequency, before, global_step) > 0

    def evaluate(self, global_step: int) -> None:
        with self.uncounted():
            evaluate(self.args, self.agent, global_step, self.run_dir, self.tracker, lambda: self.stop_signals)

    @contextmanager
    def uncounted(self):
        """The time of what runs inside is no part of SPS."""
        start = time.perf_counter()
        yield
        self.logged_time += time.perf_counter() - start

    def log_games(self, games: list[dict], global_step: int) -> None:
        """Logs the games that have ended in a chunk, those of the environment that explores least apart."""
        if not games:
            return
        greediest = self.args.num_envs - 1
        returns = {
            "greediest": [game["r"] for game in games if game["env"] == greediest],
            "explorers": [game["r"] for game in games if game["env"] != greediest],
        }
        charts = episode_means("charts", games)
        for name, values in returns.items():
            if values:
                charts[f"charts/episodic_return_{name}"] = float(np.mean(values))
        self.returns.extend(returns["greediest"])
        self.tracker.log(charts, global_step)

    def log(self, charts: dict[str, float], global_step: int) -> None:
        """Logs charts, the agent's metrics and the speed since the last call, and moves the progress bar."""
        now = time.perf_counter()
        charts = {"charts/SPS": (global_step - self.logged_step) / (now - self.logged_time)} | charts
        losses = {f"losses/{name}": value for name, value in self.agent.metrics.take().items()}
        self.tracker.log(charts | losses, global_step)
        shown = {name.split("/")[-1]: value for name, value in charts.items()}
        shown["return"] = np.mean(self.returns) if self.returns else math.nan
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(global_step - self.bar.n)
        if self.bar.disable and now > self.said_time + 60:
            self.said_time = now
            self.say_progress(shown, global_step)
        self.logged_time = now
        self.logged_step = global_step

    def say_progress(self, shown: dict[str, float], global_step: int) -> None:
        """A line in a log that has no progress bar."""
        hours = max(self.args.total_timesteps - global_step, 0) / shown["SPS"] / 3600
        figures = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        say(f"step {global_step:,} of {self.args.total_timesteps:,}: {figures}, {hours:.1f} hours left at this speed")

    def finish(self, global_step: int) -> None:
        """Saves what the run has come to and, after its last step, the model, and plays the last evaluation."""
        if self.saved_step != global_step:
            self.save_checkpoint(global_step)
        if global_step >= self.args.total_timesteps:
            path = self.run_dir / "model.pt"
            if save(path, model(self.args, self.agent, global_step)):
                self.tracker.log_model(path)
                self.exit_code = 0
            self.evaluate(global_step)
        if self.stop_signals:
            self.bar.close()
            say(how_to_go_on(self.args, self.run_dir, global_step, self.saved_step))
            self.exit_code = 128 + self.stop_signals[0]

    def close(self) -> None:
        """Ends what ``start`` has begun; waits for W&B's upload."""
        self.bar.close()
        self.tracker.finish(self.exit_code, stopped=lambda: self.stop_signals)
        os.close(self.lock)


def check_finite(agent: Agent) -> None:
    """Ends the program if a loss or a weight is infinite or nan."""
    agent.metrics.means()
    for weights in agent.optimizer.param_groups[0]["params"]:
        if not weights.isfinite().all():
            sys.exit("error: a weight is infinite or nan: go on from the last checkpoint with a lower --learning-rate")


def multiples(frequency: int, before: int, now: int) -> int:
    """How many multiples of ``frequency`` lie after ``before`` and up to ``now``; 0 has none."""
    return now // frequency - before // frequency if frequency else 0


def play(args: Args, device: torch.device, run_dir: Path, path: Path) -> int:
    """Plays and records a saved model; returns the exit code."""
    contents = load(path)
    set_up_torch(args, device)
    agent = Agent(args, int(Game(args).action_space.n), device)
    try:
        agent.q_network.load_state_dict(contents["agent"]["q_network"])
    except Exception as error:
        refuse(path, error)
    say(f"{args.env_id} on {device}, {agent.precision}: {run_dir}")
    tracker = Tracker(args, run_dir, job_type="eval")
    stop_signals = catch_signals()
    evaluate(args, agent, contents["global_step"], run_dir, tracker, stopped=lambda: stop_signals)
    exit_code = 128 + stop_signals[0] if stop_signals else 0
    tracker.finish(exit_code, stopped=lambda: stop_signals)
    return exit_code


# ------------------------------------------------------------------------------------------------ checkpoints

# never taken from a file, which may be a stranger's: paths, addresses and accounts
LOCAL_FLAGS = ("run_dir", "resume", "evaluate", "wandb_mode", "wandb_project_name", "wandb_entity", "wandb_group")
LOCAL_FLAGS += ("ray_address",)


def make_run_dir(args: Args) -> Path:
    """Makes the folder of a run and returns its path; starts in the same second get different names."""
    start_time = time.strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id}__{slug(args.exp_name)}__{args.seed}__{start_time}"
    if args.evaluate:
        name += "__eval"
    path = Path(args.run_dir) / name
    attempt = 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                path.mkdir()
                return path
            attempt += 1
            path = path.with_name(f"{name}-{attempt}")
    except OSError as error:
        sys.exit(f"error: the run folder {path} cannot be made: {error.strerror}")


def lock(run_dir: Path) -> int:
    """Keeps a run's folder for this process, until it closes the file descriptor returned or ends.

    Ends the program if another process has the folder. Call it after the workers have forked: they inherit open files,
    and would keep the lock of a main process that died.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another process is training the run in {run_dir}: wait for its end, or stop it")
    except OSError:  # a file system without locks
        pass
    for half_written in run_dir.glob("*.tmp"):  # by a process that was killed
        half_written.unlink()
    return folder


def save(path: Path, contents: dict) -> bool:
    """Replaces the file at once or not at all; returns False, with a warning, if the disk refuses."""
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
        with open(beside, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        return True
    except (OSError, RuntimeError) as error:
        disk_error = error if isinstance(error, OSError) else error.__context__  # torch hides it behind its own
        reason = disk_error or error
        advice = "after a full disk W&B may record no more: make room, stop the run and --resume it"
        say(f"warning: {path} was not written, what was there before is kept: {reason}; {advice}", file=sys.stderr)
        with suppress(OSError):
            beside.unlink()
        return False


def header(args: Args, global_step: int) -> dict:
    """What every checkpoint and every model begins with."""
    flags = asdict(args) | {"resume": None, "evaluate": None}  # those are of one start, not of the run
    return {"algorithm": ALGORITHM, "script": Path(__file__).name, "args": flags, "global_step": global_step}


def model(args: Args, agent: Agent, global_step: int) -> dict:
    """What ``--evaluate`` needs."""
    return header(args, global_step) | {"agent": {"q_network": agent.q_network.state_dict()}}


def load(path: Path, resume: bool = False) -> dict:
    """Opens a checkpoint or a model; ends the program if it is missing, of another algorithm or no use to ``resume``.

    Large tensors stay on disk until they are read. ``weights_only``: a file from a stranger runs no code.
    """
    if not path.is_file():
        sys.exit(f"error: there is no file {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        algorithm = contents["algorithm"]
    except OSError as error:
        sys.exit(f"error: {path} cannot be read: {error.strerror}")
    except Exception:
        sys.exit(f"error: {path} is damaged, no checkpoint, or too large for this process (ulimit -v)")
    if algorithm != ALGORITHM:
        sys.exit(f"error: {path} was written by {algorithm}, not by {ALGORITHM}: use the script that wrote it")
    if resume and "precision" not in contents:  # a model
        sys.exit(f"error: {path} is no checkpoint: --resume needs a checkpoint.pt, a model.pt is for --evaluate")
    return contents


def refuse(path: Path, error: Exception) -> NoReturn:
    """Ends the program: what is in the file does not fit, as ``error`` says."""
    reason = str(error).strip().split("\n")[-1].strip()
    if isinstance(error, KeyError):
        reason = f"it has no {reason}"
    sys.exit(f"error: {path} does not fit this script, or is damaged: {reason}")


def is_intact(path: Path) -> bool:
    """Whether all that a checkpoint holds has the checksum that was written with it: torch does not look at them.

    Takes 2 seconds a gigabyte.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:
        return False


def is_a(value, hint) -> bool:
    """``isinstance`` for the type of a flag: a ``Literal``, union, list or tuple; an int will do for a float."""
    kind = get_origin(hint)
    if kind in (Union, UnionType):
        return any(is_a(value, choice) for choice in get_args(hint))
    if kind is Literal:
        return value in get_args(hint)
    if kind in (list, tuple):
        return isinstance(value, kind) and all(is_a(item, get_args(hint)[0]) for item in value)
    return isinstance(value, hint) or (type(value) is int and isinstance(float(value), hint))


def read_flags(path: Path, resume: bool) -> Args:
    """The flags in a checkpoint or a model but for ``LOCAL_FLAGS``; ends the program if the file is damaged."""
    contents = load(path, resume)
    if not is_intact(path):
        sys.exit(f"error: {path} is damaged: use another one")
    saved = Args()
    types = get_type_hints(Args)
    try:
        step = contents["global_step"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"its global_step is {step!r}")
        for name, value in contents["args"].items():
            if name not in types or name in LOCAL_FLAGS:
                continue
            if not is_a(value, types[name]):
                raise ValueError(f"its flag {name} is {value!r}")
            setattr(saved, name, value)
    except Exception as error:
        refuse(path, error)
    if saved.device.split(":")[0] not in ("auto", *device_types()):
        say(f"this machine has no {saved.device}, where the run was: --device is auto unless given")
        saved.device = "auto"
    return saved


def random_state(device: torch.device) -> dict:
    """The states of torch's random number generators, of the CPU and of a GPU."""
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda_state}


def load_random_state(state: dict, device: torch.device) -> None:
    """Leaves a GPU with its seed if the run comes from a CPU."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_resume(args: Args, saved: Args, path: Path) -> None:
    """Ends the program if a flag cannot change on ``--resume``, or if the run is finished."""
    for name in FIXED_FLAGS:
        before = getattr(saved, name)
        if getattr(args, name) != before:
            sys.exit(f"error: {flag(name)} cannot change on --resume: it was {before}")
    run_dir = path.resolve().parent
    if args.run_dir != Args.run_dir and Path(args.run_dir).resolve() != run_dir.parent:
        sys.exit("error: --run-dir cannot act on --resume: a run goes on in its own folder")
    contents = load(path, resume=True)
    step = contents["global_step"]
    is_finished = step >= args.total_timesteps and has_model(run_dir, step)
    is_beyond = step > args.total_timesteps and args.total_timesteps != saved.total_timesteps
    if is_finished or is_beyond:
        reached = f"{path} is at step {step:,} of --total-timesteps {args.total_timesteps:,}"
        sys.exit(f"error: {reached}: raise it to go on, or play the model with --evaluate {path.parent}")
    script = Path(__file__).name
    if contents["script"] != script:
        say(f"warning: {path} was written by {contents['script']}, this is {script}", file=sys.stderr)
    for name in LOCAL_FLAGS:
        before = contents["args"].get(name)
        now = getattr(args, name)
        if name.startswith("wandb") and before != now:
            say(f"note: {flag(name)} is {now}, it was {before}: this flag is never taken from a file")


def has_model(run_dir: Path, global_step: int) -> bool:
    """Whether ``model.pt`` is of this step: of a run that was prolonged, it may be older."""
    path = run_dir / "model.pt"
    return path.is_file() and load(path)["global_step"] == global_step


def how_to_go_on(args: Args, run_dir: Path, global_step: int, saved_step: int | None) -> str:
    """What is left of a run that was stopped."""
    if global_step >= args.total_timesteps and has_model(run_dir, global_step):
        return f"stopped in the last evaluation; play the model with: --evaluate {run_dir / 'model.pt'}"
    if not (run_dir / "checkpoint.pt").is_file():
        return f"stopped at step {global_step:,}; nothing could be saved"
    if saved_step == global_step:
        return f"stopped at step {global_step:,}; go on with: --resume {run_dir}"
    return f"stopped at step {global_step:,}, which could not be saved; go on from an earlier one: --resume {run_dir}"


# ---------------------------------------------------------------------------------------------- command line


def flag(name: str) -> str:
    """'--num-envs' for 'num_envs'."""
    return "--" + name.replace("_", "-")


def whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """How tyro reads and shows an ``int``: 1e6 and 1_000_000 are taken, 1.5 is not."""

    def read(words: list[str]) -> int:
        value = float(words[0])
        if not value.is_integer():
            raise ValueError(f"{words[0]} is not a whole number")
        return int(value)

    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [f"{value:_}"],
    )


def plain_switch(word: str) -> str:
    """``--flag`` for ``--flag=True`` and ``--no-flag`` for ``--flag=False``, which W&B's sweeps write."""
    option, _, value = word.partition("=")
    name = option.lstrip("-").replace("-", "_")
    if not isinstance(getattr(Args, name, None), bool) or value.lower() not in ("true", "false"):
        return word
    return option if value.lower() == "true" else f"--no-{name}"


def parse_args(default: Args | None = None) -> Args:
    """The flags of the command line; those that are not given are as in ``default``.

    Ends the program with one sentence if the game is unknown, a default is not of its flag's type, or --resume or
    --evaluate cannot be meant.
    """
    groups = {
        "algorithm": AlgorithmFlags,
        "game": GameFlags,
        "evaluation": EvaluationFlags,
        "W&B": WandbFlags,
        "run": RunFlags,
    }
    default = default or Args()
    types = {}
    defaults = {}
    for title, group in groups.items():
        types[title] = Annotated[group, tyro.conf.arg(help="")]  # else tyro searches this file for a text: 0.5 s
        defaults[title] = group(**{field.name: getattr(default, field.name) for field in fields(group)})
    registry = ConstructorRegistry()
    registry.primitive_rule(whole_number)
    parsed = tyro.cli(
        TypedDict("Flags", types),
        args=[plain_switch(word) for word in sys.argv[1:]],
        default=defaults,
        description=__doc__.splitlines()[0],
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
    )
    args = Args()
    for group in parsed.values():
        vars(args).update(vars(group))
    if "" in (args.resume, args.evaluate):
        sys.exit("error: an empty --resume or --evaluate: give a run folder, a checkpoint.pt or a model.pt")
    if args.resume and args.evaluate:
        sys.exit("error: --resume trains and --evaluate does not: give one of them")
    for name, hint in get_type_hints(Args).items():  # tyro takes a default as it stands: 1e7, say, for a whole number
        value = getattr(args, name)
        if not is_a(value, hint):
            sys.exit(f"error: the default of {flag(name)} is {value!r}, which does not fit its type")
    args.env_id = Game.find_game(args.env_id)
    return args


def check_args(args: Args) -> None:
    """Ends the program with one sentence if a flag is out of its range."""
    ranges = {
        "learning_rate": (1e-12, 1),
        "buffer_size": (1, 10**9),
        "gamma": (0, 1),
        "n_step": (1, CHUNK - STACK),
        "batch_size": (1, 2**14),  # an update takes 0.4 MB for each
        "target_network_frequency": (1, NO_LIMIT),
        "epsilon_base": (0, 1),
        "epsilon_exponent": (0, 1000),
        "prioritized_replay_alpha": (0, 1),
        "prioritized_replay_beta": (0, 1),
        "learning_starts": (0, NO_LIMIT),
        "steps_per_update": (0.01, 10**6),
        "weights_frequency": (1, NO_LIMIT),
        "max_grad_norm": (1e-12, 10**6),
        "num_actors": (1, 1000),
        "envs_per_actor": (1, 100),
        "max_episode_frames": (2 * FRAME_SKIP * CHUNK, NO_LIMIT),  # else all that the first chunk has may be cut off
    }
    for name, (low, high) in (COMMON_RANGES | ranges).items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # nan is not in any range
            sys.exit(f"error: {flag(name)} is {value:,}: it must be between {low:,} and {high:,}")
    stored = min(args.learning_starts, args.buffer_size)
    if args.batch_size > stored and not args.evaluate:
        problem = f"--batch-size {args.batch_size} is more than the {stored} transitions"
        advice = "lower it, or raise --learning-starts and --buffer-size"
        sys.exit(f"error: {problem} that are stored when learning starts: {advice}")
    if ray is None and not args.evaluate:
        sys.exit("error: Ray is not installed: pip install 'ray>=2.60'")


NO_LIMIT = 10**12  # where a number may be as large as you like
COMMON_RANGES = {
    "sticky_actions": (0, 1),
    "max_episode_frames": (80, NO_LIMIT),  # of which up to 34 pass before the first action
    "video_length": (1, NO_LIMIT),
    "eval_frequency": (0, NO_LIMIT),
    "eval_episodes": (1, NO_LIMIT),
    "eval_epsilon": (0, 1),
    "seed": (0, 2**31),
    "total_timesteps": (1, NO_LIMIT),
    "checkpoint_minutes": (0, 10**6),
}


# ------------------------------------------------------------------------------------------- the process itself


def guard_streams() -> None:
    """From now on a print that fails does no harm, and /dev/null stands in for a standard stream that is closed.

    A closed pipe or terminal, a full disk or a character that the encoding lacks would else end the run, and the next
    file opened would take the number of a closed stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks have streams of their own
            stream.reconfigure(errors="replace", line_buffering=True)
            raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between
            raw.write = lossy(raw.write)


def lossy(write):
    """The method ``write`` of a raw stream, except that what it cannot write counts as written."""

    def write_or_lose(data) -> int:
        try:
            return write(data) or len(data)  # None: a pipe is full and does not block
        except OSError:
            return len(data)

    return write_or_lose


def say(text: str, file=None) -> None:
    """Prints a line beside the progress bar, to stdout unless another stream is given."""
    tqdm.write(text, file=file)


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def catch_signals() -> list[int]:
    """From now on the signals that ask for a stop are added to the list returned, and do nothing else.

    A signal that is ignored stays ignored, as under nohup.
    """
    caught = []

    def catch(number: int, _) -> None:
        if not caught:
            text = f"\nstopping as soon as all is saved; kill -9 {os.getpid()} stops at once\n"
            with suppress(OSError):
                os.write(2, text.encode())  # print would fail where the signal has interrupted another print
        caught.append(number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


def run_main() -> None:
    """Runs ``main`` and ends the program: with its exit code or, if that is 128 + a signal, by this signal.

    So the shell knows that Ctrl-C has ended a run, and does not go on with the next one of a loop.
    """
    guard_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while it starts: at once, and without a traceback
    exit_code = main()
    if exit_code > 128:
        signal.signal(exit_code - 128, signal.SIG_DFL)
        atexit._run_exitfuncs()
        signal.raise_signal(exit_code - 128)
    sys.exit(exit_code)


def main() -> int:
    args = parse_args()
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate)
        path = path / "checkpoint.pt" if path.is_dir() else path
        saved = read_flags(path, resume=bool(args.resume))
        args = parse_args(default=saved)
    check_args(args)
    keep_freed_memory()
    device = find_device(args.device)
    if args.resume:
        check_resume(args, saved, path)
        return train(args, device, path.parent, path)
    run_dir = make_run_dir(args)
    try:
        if args.evaluate:
            return play(args, device, run_dir, path)
        say(f"{args.env_id} on {device}: {run_dir}")
        return train(args, device, run_dir, None)
    finally:
        with suppress(OSError):
            run_dir.rmdir()  # if it is empty: a start that failed, or an evaluation without a video


cv2.setNumThreads(1)  # a frame is too small to share, and a thread pool does not survive a fork
tqdm.set_lock(threading.RLock())  # else it may start a process, for a lock that several could share
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner

if __name__ == "__main__":
    run_main()
