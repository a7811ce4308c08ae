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
#   "ray>=2.50",
# ]
# ///
"""Ape-X DQN on Atari, in one file: many actors play, one learner replays what surprises it most.

Horgan et al. 2018, "Distributed Prioritized Experience Replay", https://arxiv.org/abs/1803.00933, with double
Q-learning (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461), the dueling network (Wang et al. 2016,
https://arxiv.org/abs/1511.06581) and prioritized replay (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    python apex_dqn_atari.py --env-id Pong --seed 2
    python apex_dqn_atari.py --env-id Pong --ray-address auto    (actors on all machines of a Ray cluster)
    python apex_dqn_atari.py --resume runs/Pong__apex_dqn_atari__2__20260131-120000
    python apex_dqn_atari.py --evaluate runs/Pong__apex_dqn_atari__2__20260131-120000/model.pt

The learner is the process that is started; the actors are Ray actors. They run at their own pace: two runs with the
same seed differ.
"""

import contextlib
import copy
import ctypes
import difflib
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
import zlib
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads these when it is imported: no report to its makers,
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # and actors run in this environment, under uv too
try:
    import ray
except ImportError:  # playing a model does without
    ray = None
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # those from Ray, which are only read

ALGORITHM = "Ape-X DQN"  # written into checkpoints: those of another algorithm are refused
LOG_FREQUENCY = 1000  # steps between two points of the loss and speed charts
METRICS = ("td_loss", "q_values", "priorities")  # in losses/
FIXED_FLAGS = ("env_id", "num_actors", "envs_per_actor", "buffer_size", "gamma", "n_step")  # on --resume
FIXED_FLAGS += ("prioritized_replay_alpha", "full_action_space", "precision")
CHUNK = 50  # steps of each environment that an actor sends at a time, as in the paper
REQUESTS = 3  # chunks asked of each actor in advance, so that it never waits for the learner
PRIORITY_EPS = 1e-6  # added to the error, so that no transition is lost for good
cv2.setNumThreads(1)  # a frame is too small to share, and a thread pool does not survive a fork
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    seed: int = 1
    """seed of all that is random"""
    torch_deterministic: bool = True
    """make cuDNN choose deterministic algorithms"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ...; auto takes the first of cuda, mps, cpu that is there"""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """where Weights & Biases records the run; auto: online when logged in, else offline"""
    wandb_project_name: str = "watchrl"
    """project of the W&B run"""
    wandb_entity: str | None = None
    """team or user of the W&B run (default: your own)"""
    wandb_group: str | None = None
    """group of the W&B run, to compare seeds"""
    run_dir: str = "runs"
    """folder in which the run's own folder is made"""
    capture_video: bool = True
    """record the first game of each evaluation"""
    video_length: int = 4500
    """longest video, in agent steps (15 a second: 4500 are 5 minutes)"""
    eval_frequency: int = 500_000
    """steps between two evaluations (0: only one, at the end)"""
    eval_episodes: int = 5
    """whole games in an evaluation"""
    eval_epsilon: float = 0.0
    """probability of a random action in an evaluation"""
    checkpoint_frequency: int = 500_000
    """steps between two checkpoints (0: only when stopped and at the end)"""
    resume: str | None = None
    """run folder or checkpoint.pt to go on with; its flags hold unless given anew"""
    evaluate: str | None = None
    """model.pt or checkpoint.pt to play and record, without training; its flags hold unless given anew"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """game: Breakout, ALE/Breakout-v5 and BreakoutNoFrameskip-v4 are the same one here"""
    total_timesteps: int = 10_000_000
    """agent steps (4 emulator frames each) of the whole run, summed over the environments"""
    num_actors: int | None = None
    """processes that play (default: one for each core or CPU of the cluster but one, which is the learner's)"""
    envs_per_actor: int = 8
    """games that an actor plays side by side, each with an epsilon of its own as the paper's actors have"""
    sticky_actions: float = 0.0
    """probability that the emulator repeats the previous action in a frame"""
    max_episode_frames: int = 108_000
    """emulator frames (4 a step, 60 a second) after which a game is cut off"""
    episodic_life: bool = True
    """end the learning episode when a life is lost (the game goes on)"""
    full_action_space: bool = False
    """all 18 actions instead of the game's own"""

    ray_address: str = "local"
    """Ray cluster that runs the actors: auto or an address; local: this machine alone, nothing needs to be started"""
    learning_rate: float = 6.25e-5
    """learning rate of RMSProp"""
    buffer_size: int = 2_000_000
    """transitions in the replay (7,070 bytes each: 14.1 GB for two million)"""
    replay_device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the replay lies; auto: on the learner's device if it fits there, else in main memory"""
    gamma: float = 0.99
    """discount factor"""
    n_step: int = 3
    """rewards in a return before it bootstraps"""
    batch_size: int = 512
    """transitions in an update"""
    target_network_frequency: int = 2500
    """updates between two copies of the Q-network to the target network"""
    epsilon_base: float = 0.4
    """epsilon of environment i of N is epsilon-base ** (1 + epsilon-exponent * i / (N - 1)), all through the run"""
    epsilon_exponent: float = 7.0
    """see epsilon-base: the greediest environment's is epsilon-base ** (1 + epsilon-exponent)"""
    prioritized_replay_alpha: float = 0.6
    """exponent of the TD error in a transition's priority (0: all are drawn alike)"""
    prioritized_replay_beta: float = 0.4
    """exponent of the importance weights (1: the bias of the priorities is undone, 0: it is left)"""
    learning_starts: int = 50_000
    """steps before the first update"""
    steps_per_update: float | None = None
    """steps for each update, so that learner and actors wait for each other (default: each as fast as it can)"""
    weights_frequency: int = 100
    """steps of each environment after which the actors get the learner's weights"""
    max_grad_norm: float = 40.0
    """norm to which longer gradients are shortened"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the network's trunk; auto: bfloat16 on a CPU that has instructions for it, else float32"""


def check_args(args: Args) -> None:
    """Ends the program with one sentence if a flag is out of its range."""
    ranges = {"learning_rate": (1e-12, 1), "seed": (0, 2**31), "n_step": (1, CHUNK - STACK)}
    ranges["eval_epsilon sticky_actions gamma epsilon_base"] = (0, 1)
    ranges["prioritized_replay_alpha prioritized_replay_beta"] = (0, 1)
    ranges["eval_frequency checkpoint_frequency learning_starts epsilon_exponent"] = (0, math.inf)
    ranges["video_length eval_episodes total_timesteps num_actors envs_per_actor weights_frequency"] = (1, math.inf)
    ranges["buffer_size batch_size target_network_frequency"] = (1, math.inf)
    ranges["max_episode_frames"] = (FRAME_SKIP * CHUNK, math.inf)
    ranges["steps_per_update max_grad_norm"] = (1e-12, math.inf)
    for names, (low, high) in ranges.items():
        for name in names.split():
            value = getattr(args, name)
            limit = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            if value is not None and not low <= value <= high:
                sys.exit(f"error: --{name.replace('_', '-')} is {value}: it must be {limit}")
    if args.resume and args.evaluate:
        sys.exit("error: --resume trains and --evaluate does not: give one of them")
    usable = min(args.learning_starts, args.buffer_size)
    if args.batch_size > usable and not args.evaluate:
        sys.exit(f"error: --batch-size {args.batch_size} is more than the {usable} transitions that are stored when"
                 " learning starts: lower it, or raise --learning-starts and --buffer-size")  # fmt: skip
    if ray is None and not args.evaluate:
        sys.exit("error: Ray is not installed: pip install 'ray>=2.50'")


def find_device(name: str) -> torch.device:
    """The device that ``--device`` means; ends the program if this machine has none such."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind, available in here.items() if available]
    try:
        device = torch.device(usable[0] if name == "auto" else name)
    except RuntimeError:
        sys.exit(f"error: --device {name} is no device: this machine has {', '.join(usable)}")
    if device.type not in usable or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        sys.exit(f"error: --device {name} is not there: this machine has {', '.join(usable)}")
    return device


def find_precision(name: str, device: torch.device) -> str:
    if name == "auto":
        return "bfloat16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "float32"
    return name


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: to hand it back and to fault it in anew takes a tenth of an update on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # other C libraries have none
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: the highest that it takes
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def say(text: str, file=None) -> None:
    """Prints a line beside the progress bar, to stdout unless another stream is given."""
    tqdm.write(text, file=file)


def catch_signals(grace: float = 1.0) -> list[int]:
    """From now on SIGINT and SIGTERM are added to the list returned; after ``grace`` seconds a further one is fatal.

    Terminals, ``timeout`` and job schedulers can signal a process and its group, so that one stop arrives twice.
    """
    caught, fatal_from = [], math.inf

    def catch(number: int, _) -> None:
        nonlocal fatal_from
        if time.monotonic() >= fatal_from:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        fatal_from = min(fatal_from, time.monotonic() + grace)
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


# ------------------------------------------------------------------------------------------- Atari environment

STACK = 4  # frames in an observation
HISTORY = STACK - 1  # frames of an observation that are older than the newest
SIZE = 84  # height and width of a frame
FRAME_SKIP = 4  # emulator frames in an agent step
NOOP_MAX = 30  # most idle frames at the start of a game


def game_name(env_id: str) -> str:
    """'Breakout' for 'Breakout', 'ALE/Breakout-v5' and 'BreakoutNoFrameskip-v4'.

    Ends the program with the closest names if there is no such game.
    """
    games = {spec[4:-3] for spec in gym.registry if re.fullmatch(r"ALE/\w+-v5", spec)}
    name = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d)?$", "", env_id)
    if name not in games:
        lower = {game.lower(): game for game in games}
        close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, cutoff=0.5)]
        sys.exit(f"error: --env-id {env_id} is no game here: did you mean {', '.join(close or ['Breakout', 'Pong'])}?")
    return name


class Atari(gym.Wrapper):
    """One Atari game as the network sees it (Mnih et al. 2015, Methods).

    Observations are ``uint8 [4, 84, 84]``, the newest frame last, zeros before an episode's first frame; they are
    views that the next ``step`` or ``reset`` overwrites. A frame is the maximum of the last two of 4 emulator frames
    in ALE's grayscale, resized by area. Rewards are clipped to their sign. When a game ends, ``info["episode"]`` has
    its true return ``r``, its length ``l`` in agent steps, and ``unique_frames``, the share of its frames that had
    not occurred before in it: it falls when an agent farms one reward in a loop.

    An episode is ``terminated`` when the game is over or, with ``episodic_life``, a life is lost, and ``truncated``
    at the frame limit. ``reset`` starts the next life, or the next game if ``game_ended``, and presses FIRE if there
    is such an action.
    """

    def __init__(self, args: Args):
        self.game = game_name(args.env_id)
        env = gym.make(
            f"ALE/{self.game}-v5",
            obs_type="grayscale",
            frameskip=1,
            repeat_action_probability=args.sticky_actions,
            full_action_space=args.full_action_space,
            max_num_frames_per_episode=0,  # the limit is kept here, where it is told from the end of a game
            render_mode="rgb_array",
        )
        super().__init__(env.unwrapped)
        self.ale = self.unwrapped.ale
        self.action_names = self.unwrapped.get_action_meanings()
        self.emulator_actions = [ale_py.Action[name] for name in self.action_names]
        self.fire_action = self.action_names.index("FIRE") if "FIRE" in self.action_names else None
        self.max_episode_frames, self.episodic_life = args.max_episode_frames, args.episodic_life
        self.observation_space = gym.spaces.Box(0, 255, (STACK, SIZE, SIZE), np.uint8)
        self.screens = np.zeros((2, *self.ale.getScreenDims()), np.uint8)  # the last two emulator frames
        self.stack = np.zeros((STACK, SIZE, SIZE), np.uint8)
        self.game_ended, self.lives = True, 0
        self.episode_return, self.episode_length, self.frames_seen = 0.0, 0, set()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts the next game if the last one has ended or a seed is given, otherwise the next life."""
        if self.game_ended or seed is not None:
            self.env.reset(seed=seed)
            for _ in range(self.unwrapped.np_random.integers(1, NOOP_MAX + 1)):
                self.ale.act(ale_py.Action.NOOP)
                if self.ale.game_over(with_truncation=False):
                    self.env.reset()
            self.ale.getScreenGrayscale(self.screens[0])
            self.screens[1] = 0
            self.game_ended, self.lives = False, self.ale.lives()
            self.episode_return, self.episode_length = 0.0, 0
            self.frames_seen.clear()
            self._push_frame()
        self.stack[:-1] = 0
        if self.fire_action is not None:
            self._repeat_action(self.fire_action)
            self.stack[:-1] = 0
            if self.game_ended:
                return self.reset()
        return self.stack, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeats the action for 4 emulator frames; the reward is the sign of their sum."""
        reward = self._repeat_action(action)
        lives = self.ale.lives()
        # some games show 0 lives for a few frames before they end: those are no new episode
        life_lost, self.lives = 0 < lives < self.lives, lives
        terminated = self.game_ended or (self.episodic_life and life_lost)
        truncated = not self.game_ended and self.ale.getEpisodeFrameNumber() >= self.max_episode_frames
        self.game_ended |= truncated
        info = {}
        if self.game_ended:
            info["episode"] = {"r": self.episode_return, "l": self.episode_length, "unique_frames": self.unique_frames}
        return self.stack, float(np.sign(reward)), terminated, truncated, info

    @property
    def unique_frames(self) -> float:
        return len(self.frames_seen) / (self.episode_length + 1)

    def _repeat_action(self, action: int) -> float:
        reward = 0.0
        for frame in range(FRAME_SKIP):
            reward += self.ale.act(self.emulator_actions[action])
            self.game_ended = self.ale.game_over(with_truncation=False)
            if self.game_ended:
                break
            if frame >= FRAME_SKIP - 2:
                self.ale.getScreenGrayscale(self.screens[FRAME_SKIP - 1 - frame])
        self.episode_return += reward
        self.episode_length += 1
        self._push_frame()
        return reward

    def _push_frame(self) -> None:
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        self.stack[:-1] = self.stack[1:]
        cv2.resize(self.screens[0], (SIZE, SIZE), dst=self.stack[-1], interpolation=cv2.INTER_AREA)
        self.frames_seen.add(zlib.crc32(self.stack[-1]))  # a collision in every dozenth of the longest games


# ---------------------------------------------------------------------------------------------------- network


class QNetwork(nn.Module):
    """The dueling network of Wang et al. 2016.

    Observations uint8 [batch, 4, 84, 84] to Q-values float32 [batch, actions]. ``dtype`` is the precision in which
    the trunk computes; its weights stay float32.
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
        ).to(memory_format=torch.channels_last)
        self.value, self.advantage = nn.Linear(512, 1), nn.Linear(512, num_actions)

    def streams(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value, float32 [batch, 1], and advantages, float32 [batch, actions], less their mean (eq. 9)."""
        with torch.autocast(observations.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.trunk(observations.to(self.dtype) / 255)
        value_features, advantage_features = features.float().chunk(2, 1)
        advantages = self.advantage(advantage_features)
        return self.value(value_features), advantages - advantages.mean(1, keepdim=True)

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
    """The last ``buffer_size`` transitions and their priorities, stored as single frames on ``device``.

    Each environment has a column, ``rows`` long, that its actor fills round and round at its own pace. A row holds
    the newest frame of an observation; its age, the number of older frames (up to 3) that belong to it; the action;
    and what the actor made of the next n steps: return, discount and priority. A sample gathers the 4 + n frames
    around a row and blanks those from before the episode. The priority is 0, so that the row is never drawn, while its
    n successors are not stored yet, once a part of its frames is overwritten, and where truncation cut it off.
    """

    ARRAYS = ("frames", "ages", "actions", "returns", "discounts", "priorities")

    def __init__(self, args: Args, device: torch.device):
        self.num_envs, self.envs_per_actor = args.num_actors * args.envs_per_actor, args.envs_per_actor
        self.rows, self.n_step, self.device = args.buffer_size // self.num_envs, args.n_step, device
        self.alpha, self.beta = args.prioritized_replay_alpha, args.prioritized_replay_beta
        shape = (self.rows, self.num_envs)
        self.frames = torch.zeros(*shape, SIZE, SIZE, dtype=torch.uint8, device=device)
        self.ages, self.actions = (torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2))
        self.returns, self.discounts, self.priorities = (torch.zeros(shape, device=device) for _ in range(3))
        self.num_steps = [0] * args.num_actors  # stored of each environment of an actor

    def add(self, actor: int, chunk: dict, follows: bool) -> None:
        """Stores a chunk of ``Actor.play``: the frames of its steps, and the transitions that they complete.

        Those began ``n_step`` steps earlier. Unless the chunk ``follows`` the one that was stored last, those that
        need frames from before it are left out.
        """
        start, envs = self.num_steps[actor], slice(actor * self.envs_per_actor, (actor + 1) * self.envs_per_actor)
        rows = torch.arange(start - self.n_step, start + CHUNK + HISTORY, device=self.device) % self.rows
        arrays = {name: upload(chunk[name], self.device) for name in self.ARRAYS}
        if not follows:
            arrays["priorities"][: self.n_step + HISTORY] = 0
        for name, array in arrays.items():
            to = rows[self.n_step :][:CHUNK] if name == "frames" else rows[:CHUNK]
            getattr(self, name)[:, envs].index_copy_(0, to, array)
        # the newest, whose successors are still to come, and the oldest, whose older frames have just gone
        self.priorities[:, envs].index_fill_(0, rows[CHUNK:], 0)
        self.num_steps[actor] += CHUNK

    def sample(self, batch_size: int) -> Batch:
        """Draws transitions in proportion to their priorities, without waiting for the device.

        One is drawn from each of ``batch_size`` equal shares of the priorities' sum (Schaul et al. 2016, B.2.1).
        """
        # a sum of millions of terms, for which MPS has but float32
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        cumulative = self.priorities.flatten().cumsum(0, dtype=exact)
        draws = torch.arange(batch_size, device=self.device) + torch.rand(batch_size, device=self.device).to(exact)
        indices = torch.searchsorted(cumulative, draws / batch_size * cumulative[-1], right=True)
        rows, envs = indices // self.num_envs, indices % self.num_envs

        frames = self._window(self.frames, rows, envs, -HISTORY, self.n_step + 1)
        ages = self.ages.flatten()[indices]
        same_episode = ages[:, None] >= torch.arange(HISTORY, 0, -1, device=self.device)
        frames[:, :HISTORY] *= same_episode[:, :, None, None].to(torch.uint8)
        # (N P(i))^-beta over its largest value in the batch (section 3.4), from which N and the sum vanish
        weights = self.priorities.flatten()[indices] ** -self.beta
        return Batch(
            observations=frames[:, :STACK],
            actions=self.actions.flatten()[indices].long(),
            returns=self.returns.flatten()[indices],
            next_observations=frames[:, self.n_step :],
            discounts=self.discounts.flatten()[indices],
            weights=weights / weights.max(),
            indices=indices,
        )

    @property
    def size(self) -> int:
        """Transitions stored, those that are not to be drawn included."""
        return sum(min(steps, self.rows) for steps in self.num_steps) * self.envs_per_actor

    def update_priorities(self, indices: torch.Tensor, td_errors: torch.Tensor) -> None:
        self.priorities.view(-1)[indices] = prioritize(td_errors, self.alpha)

    def _window(self, array, steps, envs, start: int, stop: int) -> torch.Tensor:
        """Entries of the steps ``start`` to ``stop - 1`` after each of ``steps``: [batch, stop - start, ...]."""
        rows = (steps[:, None] + torch.arange(start, stop, device=self.device)) % self.rows
        indices = rows * self.num_envs + envs[:, None]  # index_select is many times faster than array[rows, envs]
        return array.flatten(0, 1).index_select(0, indices.flatten()).unflatten(0, rows.shape)

    def state_dict(self) -> dict:
        """The filled part of the arrays; on the CPU these are views, not copies."""
        filled = min(max(self.num_steps), self.rows)
        arrays = {name: getattr(self, name)[:filled].cpu() for name in self.ARRAYS}
        # torch.save writes whole storages: through numpy, the slice is one of its own
        return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()} | {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict) -> None:
        for name in self.ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].to(self.device)
        self.num_steps = list(state["num_steps"])


def find_replay_device(args: Args, device: torch.device) -> torch.device:
    """The learner's device if the replay fits there, else main memory; ends the program if it fits nowhere."""
    if args.replay_device not in ("auto", "cpu", device.type):
        sys.exit(f"error: --replay-device {args.replay_device} is neither cpu nor the learner's device, {device}")
    place = torch.device("cpu") if args.replay_device == "cpu" else device
    needed = args.buffer_size * BYTES_PER_TRANSITION
    if place.type == "cuda":
        free = torch.cuda.mem_get_info(place)[0] - 2e9  # 2 GB for networks, cuDNN and graphs
        if needed > free and args.replay_device == "auto":
            place = torch.device("cpu")
    if place.type != "cuda":
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > free:
        sys.exit(f"error: --buffer-size {args.buffer_size} needs {needed / 1e9:.1f} GB and {place} has"
                 f" {free / 1e9:.1f} GB: lower it")  # fmt: skip
    return place


# ----------------------------------------------------------------------------------------------------- actors

TERMINATED, CUT = 1, 2  # how an episode ended at a step: with its last reward, or cut off by truncation


def epsilons(args: Args) -> np.ndarray:
    """Epsilon of each environment of all actors, the greediest last (Horgan et al. 2018, section 4.1)."""
    last = args.num_actors * args.envs_per_actor - 1
    return args.epsilon_base ** (1 + args.epsilon_exponent * np.arange(last + 1) / max(last, 1))


def n_step_returns(rewards: np.ndarray, ends: np.ndarray, n_step: int, gamma: float) -> tuple[np.ndarray, ...]:
    """Returns, discounts and validity of all but the last ``n_step`` of the steps in ``rewards`` and ``ends``.

    Float32, float32 and bool, [steps - n_step, envs]. A return is the sum of gamma^k r_(t+k) up to the end of the
    episode; the discount of what follows is gamma^n, or 0 if the episode terminated; cut off within the n steps, a
    transition is not valid, for what would have followed is not known.
    """
    steps = len(rewards) - n_step
    returns, (alive, valid) = np.zeros_like(rewards[:steps]), np.ones((2, *rewards[:steps].shape), np.bool_)
    for k in range(n_step):
        returns += gamma**k * rewards[k : k + steps] * alive
        valid &= ~(alive & (ends[k : k + steps] == CUT))
        alive &= ends[k : k + steps] == 0
    return returns, np.float32(gamma**n_step) * alive, valid


class Actor:
    """Plays ``envs_per_actor`` games with one forward pass a step, on one core: a Ray actor.

    Each of its environments has the epsilon, and so the part, of one of the paper's actors. ``start`` is the learner's
    step: a resumed run plays other games.
    """

    def __init__(self, args: Args, number: int, precision: str, start: int):
        # Ray sends this class, not the script: what the script sets when it starts must be set here too
        cv2.setNumThreads(1)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        torch.set_num_threads(1)
        self.n_step, self.gamma, self.alpha = args.n_step, args.gamma, args.prioritized_replay_alpha
        self.numbers = number + args.num_actors * np.arange(args.envs_per_actor)  # every actor explores and exploits
        self.epsilons, self.rng = epsilons(args)[self.numbers], np.random.default_rng([args.seed, number, start])
        self.envs = [Atari(args) for _ in self.numbers]
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[find_precision(precision, torch.device("cpu"))]
        self.network = QNetwork(int(self.envs[0].action_space.n), dtype)
        self.network.trunk.to(dtype)  # it is never trained: cast once for all steps
        self.observations = np.stack([env.reset(seed=int(self.rng.integers(2**31)))[0] for env in self.envs])
        self.ages = np.zeros(len(self.envs), np.uint8)
        # the last n_step steps of the chunk before and those of this one: q_taken is Q(s, a), q_best max_a Q(s, a)
        shape = (self.n_step + CHUNK, len(self.envs))
        self.steps = {name: np.zeros(shape, np.uint8) for name in ("ages", "actions", "ends")}
        self.steps |= {name: np.zeros(shape, np.float32) for name in ("rewards", "q_taken", "q_best")}
        self.steps["frames"] = np.zeros((*shape, SIZE, SIZE), np.uint8)
        self.num_steps, self.updates, self.finished = 0, None, time.perf_counter()

    @torch.inference_mode()
    def play(self, weights: dict[str, np.ndarray], updates: int) -> dict:
        """Plays the next ``CHUNK`` steps with the learner's ``weights``, those after ``updates`` updates.

        Returns ``frames``, uint8 [CHUNK, envs, 84, 84], of these steps, and the transitions that they complete, which
        began ``n_step`` earlier, [CHUNK, envs] each: ``ages`` and ``actions``, uint8, ``returns``, ``discounts`` and
        ``priorities``, float32; the ``games`` that ended; the number of the ``first_step`` since this actor started;
        ``updates``; and ``waiting``, the share of time in which nothing was asked of it. The arrays may be views that
        the next call overwrites.
        """
        called, steps, games = time.perf_counter(), self.steps, []
        if updates != self.updates:
            self.network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
            self.updates = updates
        for array in steps.values():
            array[: self.n_step] = array[CHUNK:]
        for step in range(self.n_step, self.n_step + CHUNK):
            q_values = self.network(torch.from_numpy(self.observations)).numpy()
            explore = self.rng.random(len(self.envs)) < self.epsilons
            actions = np.where(explore, self.rng.integers(q_values.shape[1], size=explore.size), q_values.argmax(1))
            steps["q_taken"][step], steps["q_best"][step] = q_values[np.arange(len(actions)), actions], q_values.max(1)
            steps["frames"][step], steps["actions"][step] = self.observations[:, -1], actions
            steps["ages"][step] = self.ages
            for i, env in enumerate(self.envs):
                observation, steps["rewards"][step, i], terminated, truncated, info = env.step(int(actions[i]))
                steps["ends"][step, i] = TERMINATED if terminated else truncated * CUT
                self.ages[i] = min(self.ages[i] + 1, HISTORY)
                if terminated or truncated:
                    observation, self.ages[i] = env.reset()[0], 0
                self.observations[i] = observation
                games += [info["episode"] | {"env": int(self.numbers[i])}] if info else []

        returns, discounts, valid = n_step_returns(steps["rewards"], steps["ends"], self.n_step, self.gamma)
        td_errors = returns + discounts * steps["q_best"][self.n_step :] - steps["q_taken"][:CHUNK]
        now = time.perf_counter()
        waiting, self.finished = (called - self.finished) / (now - self.finished), now
        first_step, self.num_steps = self.num_steps, self.num_steps + CHUNK
        return {
            "frames": steps["frames"][self.n_step :],
            "ages": steps["ages"][:CHUNK],
            "actions": steps["actions"][:CHUNK],
            "returns": returns,
            "discounts": discounts,
            "priorities": prioritize(td_errors, self.alpha) * valid,
            "games": games,
            "first_step": first_step,
            "updates": updates,
            "waiting": waiting,
        }


class Actors:
    """The learner's side of all actors: keeps ``REQUESTS`` chunks asked of each, and hands them over in order.

    An actor that has died is started anew by Ray, elsewhere if its machine is gone, and asked for the same chunks.
    """

    def __init__(self, args: Args, precision: str, start: int):
        remote_actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Actor)
        self.actors = [remote_actor.remote(args, number, precision, start) for number in range(args.num_actors)]
        self.requests = [deque() for _ in self.actors]  # the oldest first
        self.next_steps = [None] * args.num_actors  # the first step that each actor's next chunk should have

    def publish(self, weights: dict[str, np.ndarray], updates: int) -> None:
        """Puts the weights where all actors find them, once; they count from the next request on."""
        self.weights, self.updates = ray.put(weights), updates
        for actor, requests in enumerate(self.requests):
            while len(requests) < REQUESTS:
                self._request(actor)

    def receive(self, patience: float):
        """Yields (actor, chunk, whether it follows the one before) for the next chunk of each actor that has one.

        Waits up to ``patience`` seconds for the first; ends the program if an actor has raised an error.
        """
        oldest = {requests[0]: actor for actor, requests in enumerate(self.requests)}
        arrived, _ = ray.wait(list(oldest), timeout=patience)
        arrived, _ = ray.wait(list(oldest), num_returns=len(oldest), timeout=0) if arrived else ([], [])
        for reference in arrived:
            actor = oldest[reference]
            self.requests[actor].popleft()
            self._request(actor)
            try:
                chunk = ray.get(reference)
            except (ray.exceptions.RayTaskError, ray.exceptions.ActorDiedError) as error:
                sys.exit(f"error: actor {actor} failed:\n{error}")
            except ray.exceptions.RayError as error:  # lost with its machine, or on the way
                tqdm.write(f"a chunk of actor {actor} was lost: {str(error).splitlines()[0]}")
                continue
            if chunk["first_step"] == 0 and self.next_steps[actor] is not None:
                tqdm.write(f"actor {actor} died and has been started again")
            follows = chunk["first_step"] == self.next_steps[actor]
            self.next_steps[actor] = chunk["first_step"] + CHUNK
            yield actor, chunk, follows

    def close(self) -> None:
        """Takes the requests back: Ray would complain of each that is open when it is shut down."""
        requests = sum(map(list, self.requests), [])
        for request in requests:
            ray.cancel(request)
        ray.wait(requests, num_returns=len(requests), timeout=10)

    def _request(self, actor: int) -> None:
        self.requests[actor].append(self.actors[actor].play.remote(self.weights, self.updates))


def start_ray(args: Args) -> None:
    """Starts Ray or joins the cluster, and settles ``num_actors``; ends the program if they do not fit."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if args.ray_address == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.num_actors = args.num_actors or max(cores - 1, 1)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # else Ray writes one into the home folder
        in_flight = args.num_actors * REQUESTS * CHUNK * args.envs_per_actor * BYTES_PER_TRANSITION
        ray.init("local", num_cpus=args.num_actors, object_store_memory=2 * in_flight + 2**28, **options)
    else:
        try:
            if args.ray_address != "auto":  # Ray itself would try for minutes
                host, _, port = args.ray_address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(args.ray_address, **options)
        except (OSError, ValueError) as error:
            sys.exit(f"error: --ray-address {args.ray_address} is no running cluster (start one with ray start --head):"
                     f" {str(error).splitlines()[0]}")  # fmt: skip
        free = int(ray.available_resources().get("CPU", 0))
        args.num_actors = args.num_actors or max(free - 1, 1)
        if args.num_actors > free:
            sys.exit(f"error: --num-actors {args.num_actors} is more than the cluster's {free} free CPUs: lower it")
    needed = args.num_actors * args.envs_per_actor * (CHUNK + args.n_step + HISTORY)
    if args.buffer_size < needed:
        sys.exit(f"error: --buffer-size {args.buffer_size} is too small for chunks of {args.num_actors} actors with"
                 f" {args.envs_per_actor} games each: it must be at least {needed}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- learner


class Agent:
    """Q-network, target network and optimizer. On CUDA, ``update`` is captured as a graph."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.precision]
        self.q_network = QNetwork(num_actions, dtype).to(device)
        self.target_network = QNetwork(num_actions, dtype).to(device)
        self.target_network.trunk.to(dtype)  # it is never trained: cast once a copy, not once an update
        self.update_target()
        # the paper's epsilon, 1.5e-7, stands under the root, torch's beside it
        options = {"alpha": 0.95, "eps": 1.5e-7**0.5, "centered": True, "capturable": device.type == "cuda"}
        self.optimizer = torch.optim.RMSprop(self.q_network.parameters(), args.learning_rate, **options)
        self.max_grad_norm = args.max_grad_norm
        self.losses = torch.zeros(len(METRICS) + 1, device=device)  # sums over the updates since the last log, count

    @torch.no_grad()
    def think(self, observation: torch.Tensor) -> tuple[tuple[float, np.ndarray], int]:
        """What the overlay shows of one observation, value and advantages float32 [actions], and the greedy action."""
        value, advantages = self.q_network.streams(observation[None])
        advantages = advantages[0].cpu().numpy()
        return (value.item(), advantages), int(advantages.argmax())

    def update(self, observations, actions, returns, next_observations, discounts, weights) -> torch.Tensor:
        """One step on the weighted squared TD errors of a ``Batch``; returns these errors, float32 [batch].

        The online network chooses the action that the target network evaluates (van Hasselt et al. 2016).
        """
        with torch.no_grad():
            best = self.q_network(next_observations).argmax(1, keepdim=True)
            td_target = returns + discounts * self.target_network(next_observations).gather(1, best).squeeze(1)
        q_values = self.q_network(observations).gather(1, actions[:, None]).squeeze(1)
        td_errors = td_target - q_values
        loss = 0.5 * (weights * td_errors**2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.q_network.parameters(), self.max_grad_norm)
        self.optimizer.step()
        td_errors = td_errors.detach()
        metrics = (loss.detach(), q_values.detach().mean(), td_errors.abs().mean(), torch.ones_like(loss))
        self.losses += torch.stack(metrics)
        return td_errors

    def update_target(self) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())

    def weights(self) -> dict[str, np.ndarray]:
        """The Q-network's weights for the actors; on the CPU these are views, not copies."""
        return {name: tensor.cpu().numpy() for name, tensor in self.q_network.state_dict().items()}

    def mean_losses(self) -> dict[str, float]:
        """Means since ``losses`` was last set to zero; ends the program if the loss is not finite."""
        *sums, count = self.losses.tolist()
        if not math.isfinite(sums[0]):
            sys.exit(f"error: the loss became {sums[0]}: go on from the last checkpoint with a lower --learning-rate")
        return {f"losses/{name}": total / count for name, total in zip(METRICS, sums)} if count else {}

    def state_dict(self) -> dict:
        parts = ("q_network", "target_network", "optimizer")
        return {name: getattr(self, name).state_dict() for name in parts} | {"losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on using the file's tensors
        self.losses.copy_(state["losses"])


class CudaGraph:
    """Calls ``function`` three times as it is, then captures it and replays it as one CUDA graph.

    Capture needs those calls to warm up cuDNN and the optimizer; they count like any other. Inputs are copied into
    fixed tensors; each call overwrites the outputs of the one before.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, function):
        self.function, self.graph, self.calls = function, None, 0
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


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on the device; on CUDA it is made without waiting."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone().to(device)


# -------------------------------------------------------------------------------------- overlay and recorder

GROUND, QUIET, GRID, BAR = (18, 19, 23), (139, 143, 151), (52, 55, 62), (86, 110, 142)
GREEDY, CHOSEN, TEXT = (80, 176, 240), (255, 196, 92), (236, 237, 240)
GAIN, LOSS = (112, 200, 104), (232, 92, 92)
FONT = cv2.FontFace("sans")
TRACE_STEPS = 150  # 10 seconds of play


def number(value: float) -> str:
    """At most 8 characters: 2.413, -1,250.5, 3.2e+30, nan."""
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e4 else f"{value:.2g}"


def finite_range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


class Overlay(gym.Wrapper):
    """Draws the game beside what the network thinks of it, 960x630, RGB.

    Call ``think`` with the values of the state before each ``step``; ``render`` then returns the picture of that
    state (one array, overwritten by the next call). Drawing is left to ``render``: steps that are not recorded cost
    nothing.
    """

    WIDTH, HEIGHT = 960, 630
    LEFT, RIGHT = 504, 936  # of the panel's content

    def __init__(self, env: Atari, subtitle: str, epsilon: float):
        super().__init__(env)
        self.subtitle, self.epsilon = subtitle, epsilon
        self.canvas = np.empty((self.HEIGHT, self.WIDTH, 3), np.uint8)
        self.screen = np.empty((*env.ale.getScreenDims(), 3), np.uint8)
        self.new_game()

    def new_game(self) -> None:
        self.values = deque(maxlen=TRACE_STEPS)  # V(s) of the last states
        self.rewards = deque(maxlen=TRACE_STEPS)  # reward before each of them
        self.last_return = 0.0

    def reset(self, **kwargs):
        if self.env.game_ended:
            self.new_game()
        return self.env.reset(**kwargs)

    def think(self, thoughts: tuple[float, np.ndarray], action: int) -> None:
        """Notes value and advantages (float [actions]) of the current state and the action about to be taken."""
        self.value, self.advantages = thoughts
        self.action, self.greedy = action, int(np.argmax(self.advantages))
        self.values.append(self.value)
        self.rewards.append(self.env.episode_return - self.last_return)
        self.last_return = self.env.episode_return

    def render(self) -> np.ndarray:
        cv2.rectangle(self.canvas, (self.WIDTH // 2, 0), (self.WIDTH - 1, self.HEIGHT - 1), GROUND, -1)
        self.env.ale.getScreenRGB(self.screen)
        game = self.canvas[:, : self.WIDTH // 2]
        cv2.resize(self.screen, (self.WIDTH // 2, self.HEIGHT), dst=game, interpolation=cv2.INTER_NEAREST)
        self.text(self.env.game, self.LEFT, 40, TEXT, 22, 600)
        self.text(self.subtitle, self.LEFT, 64, QUIET, 14)
        if self.action != self.greedy:
            self.text("exploring", self.RIGHT, 64, CHOSEN, 14, 600, right=True)
        self.draw_streams(top=104, bottom=428)
        self.draw_trace(self.values, "V(s), last 10 s", GREEDY, top=466, bottom=548)
        self.draw_facts(top=581)
        return self.canvas

    def draw_streams(self, top: int, bottom: int) -> None:
        """Value, advantages and their sums, the Q-values; a bar an action, from the middle: its advantage."""
        advantages, right = self.advantages, self.LEFT + 346
        self.text(f"V(s) = {number(self.value)}", self.LEFT, top - 14, TEXT, 14, 600)
        self.text("A(s, a)", right, top - 14, QUIET, 14, right=True)
        self.text("Q = V + A", self.RIGHT, top - 14, QUIET, 14, right=True)
        pitch = min(36, (bottom - top) // len(advantages))
        size = min(15, pitch - 4)
        middle, half = self.LEFT + 196, 66
        largest = max(map(abs, finite_range(advantages))) or 1.0
        cv2.line(self.canvas, (middle, top), (middle, top + pitch * len(advantages) - 1), GRID, 1)
        for i, (name, advantage) in enumerate(zip(self.env.action_names, advantages.tolist())):
            y = top + i * pitch
            greedy = i == self.greedy
            end = middle + round(half * advantage / largest) if math.isfinite(advantage) else middle
            color = GREEDY if greedy else BAR
            cv2.rectangle(self.canvas, (min(middle, end), y + 3), (max(middle, end), y + pitch - 4), color, -1)
            if i == self.action:
                cv2.rectangle(self.canvas, (middle - half - 4, y), (middle + half + 4, y + pitch - 1), CHOSEN, 2)
            bold, color = (600, TEXT) if i == self.action or greedy else (400, QUIET)
            baseline = y + (pitch + size) // 2 - 2
            self.text(name, self.LEFT, baseline, color, size, bold)
            self.text(number(advantage), right, baseline, color, size, bold, right=True)
            self.text(number(self.value + advantage), self.RIGHT, baseline, color, size, bold, right=True)

    def draw_trace(self, values: deque, title: str, color: tuple, top: int, bottom: int) -> None:
        """Values of the last seconds between their extremes; green lines: rewards, red ones: penalties."""
        values, rewards = np.array(values), np.array(self.rewards)
        low, high = finite_range(values)
        self.text(title, self.LEFT, top - 14, QUIET, 14)
        self.text(f"{number(low)} to {number(high)}", self.RIGHT, top - 14, QUIET, 14, right=True)
        cv2.line(self.canvas, (self.LEFT, bottom), (self.RIGHT, bottom), GRID, 1)
        x = self.RIGHT - (len(values) - 1 - np.arange(len(values))) * (self.RIGHT - self.LEFT) / (TRACE_STEPS - 1)
        for at, reward in zip(x, rewards):
            if reward:
                cv2.line(self.canvas, (round(at), top), (round(at), bottom), GAIN if reward > 0 else LOSS, 1)
        y = bottom - (values - low) / ((high - low) or 1.0) * (bottom - top)
        shown = np.isfinite(values)
        points = np.stack([x, y], 1)[shown].round().astype(np.int32)
        cv2.polylines(self.canvas, [points], False, color, 2, cv2.LINE_AA)

    def draw_facts(self, top: int) -> None:
        env = self.env
        facts = {"return": f"{env.episode_return:,.0f}", "step": f"{env.episode_length:,}"}
        facts |= {"epsilon": f"{self.epsilon:g}", "unique frames": f"{env.unique_frames:.2f}", "lives": str(env.lives)}
        for x, (name, value) in zip((0, 100, 180, 262, 392), facts.items()):
            self.text(name, self.LEFT + x, top, QUIET, 14)
            self.text(value, self.LEFT + x, top + 23, TEXT, 18, 600)

    def text(self, text, x, y, color, size, weight=400, right=False) -> None:
        align = cv2.PUT_TEXT_ALIGN_RIGHT if right else cv2.PUT_TEXT_ALIGN_LEFT
        cv2.putText(self.canvas, text, (x, y), color, FONT, size, weight, align)


class Recorder:
    """Streams pictures into an mp4 file, 15 a second; a failure is reported once and never ends a run."""

    def __init__(self, path: Path, length: int):
        self.path, self.length, self.count, self.writer, self.still = path, length, 0, None, None

    def write(self, env: Overlay) -> None:
        """Adds one picture of ``env``, unless the video has its full length or has failed."""
        if self.count >= self.length:
            return
        picture = env.render()
        try:
            if self.writer is None:
                from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

                self.path.parent.mkdir(parents=True, exist_ok=True)
                size, fps = picture.shape[1::-1], 60 / FRAME_SKIP
                self.writer = FFMPEG_VideoWriter(str(self.path), size, fps, preset="veryfast", threads=1)
            self.writer.write_frame(picture)
            self.count += 1
            if self.count & (self.count - 1) == 0:  # the last power of two lies in the second half of the video
                self.still = picture.copy()
        except Exception as error:
            self.fail(error)

    def close(self) -> None:
        try:
            if self.writer:
                self.writer.close()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        warnings.warn(f"no video {self.path}: {str(error).strip() or type(error).__name__}", stacklevel=2)
        self.length = self.count = 0


# ------------------------------------------------------------------------------------------------ checkpoints


def save(path: Path, contents: dict) -> bool:
    """Replaces the file at once or not at all; returns False, with a warning, if the disk refuses."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        warnings.warn(f"{path} was not written, what was there before is kept: {error}", stacklevel=2)
        return False


def model(args: Args, agent: Agent, global_step: int) -> dict:
    """What ``--evaluate`` needs; the flags without the paths that this start was given."""
    flags = asdict(args) | {"resume": None, "evaluate": None}
    network = {"q_network": agent.q_network.state_dict()}
    return {"algorithm": ALGORITHM, "args": flags, "global_step": global_step, "agent": network}


def load(path: Path, needs: str) -> dict:
    """Opens a checkpoint or a model; ends the program if it is missing, damaged, of another algorithm or lacks a part.

    Large tensors stay on disk until they are read. ``weights_only``: a file from a stranger runs no code.
    """
    if not path.is_file():
        sys.exit(f"error: there is no file {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        algorithm = contents["algorithm"]
    except Exception:
        sys.exit(f"error: {path} is damaged or no checkpoint: use another one")
    if algorithm != ALGORITHM:
        sys.exit(f"error: {path} was written by {algorithm}, not by {ALGORITHM}: use the script that wrote it")
    if needs not in contents:
        sys.exit(f"error: {path} has no {needs}: --resume needs a checkpoint.pt, a model.pt is for --evaluate")
    return contents


# ------------------------------------------------------------------------------------- evaluation and logging


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

    W&B never ends a run and never holds it up: whatever it raises is one warning, after which the tracker does
    nothing, as it does when W&B is disabled.
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
            os.environ["WANDB_MODE"] = mode  # a flag wins over it
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's reports on itself can hold up the exit
        import wandb

        self.wandb = wandb
        script = os.path.abspath(__file__)
        options = dict(
            project=slug(args.wandb_project_name),
            entity=args.wandb_entity,
            group=args.wandb_group,
            job_type=job_type,
            id=self.run_id,
            name=self.run_id,
            resume="allow",
            config=asdict(args),
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
                reason = "no login: "
            except wandb.Error as error:
                reason = f"{textwrap.shorten(str(error), 200)}: "
                self.background(wandb.teardown).join(1)  # the failed start holds the run's name
            mode = "offline"
        if self.run is None:
            self.run = wandb.init(mode=mode, **options)
        if self.run.offline:
            say(f"W&B: {reason}the run is recorded offline; look: wandb leet; upload later: wandb sync")
        os.environ.setdefault("WANDB_DATA_DIR", self.run.sync_dir)  # copies of the model: beside the record
        self.run_id = self.run.id
        self.run.define_metric("global_step")
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
        """Waits until all is uploaded, or until a signal (``stopped()``), and after that for 5 seconds at most."""
        if self.run is None:
            return
        command = f"wandb sync --include-online {self.run.sync_dir}"
        upload = self.background(self.run.finish, exit_code)
        upload.join(5)
        if upload.is_alive() and not stopped():
            say(f"W&B: waiting for the upload; Ctrl-C ends that: the record is on disk, later: {command}")
        while upload.is_alive() and not stopped():
            upload.join(0.2)
        if upload.is_alive():
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

    @contextlib.contextmanager
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


def evaluate(args: Args, agent: Agent, device, global_step: int, run_dir: Path, tracker, stopped=lambda: False) -> None:
    """Plays whole games, records the first, prints and logs the results.

    All its random states are its own, so that training does not depend on when it is evaluated. A true ``stopped()``
    ends it early, without results.
    """
    env = Overlay(Atari(args), f"{args.exp_name} \u2022 trained {global_step:,} steps", args.eval_epsilon)
    rng = np.random.default_rng([args.seed, global_step])
    video = run_dir / "videos" / f"{global_step:010d}.mp4"
    recorder = Recorder(video, args.video_length if args.capture_video else 0)
    episodes = []
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    while len(episodes) < args.eval_episodes and not stopped():
        thoughts, action = agent.think(upload(observation, device))
        if rng.random() < args.eval_epsilon:
            action = int(rng.integers(env.action_space.n))
        env.think(thoughts, action)
        if not episodes:
            recorder.write(env)
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
        episodes += [info["episode"]] if info else []
    recorder.close()
    if len(episodes) < args.eval_episodes:
        return
    returns, lengths, unique_frames = ([episode[key] for episode in episodes] for key in ("r", "l", "unique_frames"))
    mean, spread = float(np.mean(returns)), float(np.std(returns))
    tqdm.write(f"step {global_step:,}: return {mean:,.1f} \u00b1 {spread:,.1f} over {len(episodes)} games")
    metrics = {"eval/episodic_return": mean, "eval/episodic_return_std": spread}
    metrics |= {"eval/episodic_length": np.mean(lengths), "eval/unique_frames": np.mean(unique_frames)}
    tracker.log(metrics, global_step)
    if recorder.count:
        tracker.log_video(video, recorder.still, global_step)


# -------------------------------------------------------------------------------------------------- training


def train(args: Args, device: torch.device, run_dir: Path, resume: Path | None) -> int:
    """Trains anew or from the checkpoint ``resume``; returns the exit code, 128 + the signal if one stopped it."""
    keep_freed_memory()
    start_ray(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use by default
    elif args.ray_address == "local":  # leave their cores to the actors
        torch.set_num_threads(max(torch.get_num_threads() - args.num_actors, 1))
    torch.set_flush_denormal(True)  # RMSProp's averages of gradients that have stopped fade into slow tiny numbers

    agent = Agent(args, int(Atari(args).action_space.n), device)
    replay = Replay(args, find_replay_device(args, device))
    global_step, updates, run_id = 0, 0, None
    if resume:
        checkpoint = load(resume, needs="replay")
        global_step, updates, run_id = (checkpoint[name] for name in ("global_step", "updates", "wandb_run_id"))
        try:
            agent.load_state_dict(checkpoint["agent"])
        except (RuntimeError, ValueError, KeyError) as error:
            sys.exit(f"error: {resume} does not fit the network of this script: {str(error).splitlines()[-1].strip()}")
        replay.load_state_dict(checkpoint["replay"])
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        del checkpoint  # lets go of the file, so that the next checkpoint frees its space
    # actors on CPUs of other machines may have other instructions than a learner on a GPU
    actors = Actors(args, args.precision if device.type == "cpu" else "auto", global_step)
    actors.publish(agent.weights(), updates)

    graph = CudaGraph if device.type == "cuda" else lambda function: function
    if replay.device == device:

        @graph
        def learn() -> None:
            *batch, indices = replay.sample(args.batch_size)
            replay.update_priorities(indices, agent.update(*batch))

    else:
        update = graph(agent.update)

        def learn() -> None:
            *batch, indices = replay.sample(args.batch_size)
            td_errors = update(*(upload(x, device) for x in batch))
            replay.update_priorities(indices, td_errors.to(replay.device))

    tracker = Tracker(args, run_dir, run_id=run_id)
    stop_signals, exit_code = catch_signals(), 1

    def passed(frequency: int) -> int:
        """How many multiples of ``frequency`` the chunks received last have reached."""
        return global_step // frequency - before // frequency if frequency else 0

    def log(metrics: dict) -> None:
        tracker.log(metrics, global_step)

    def save_checkpoint() -> None:
        agent.mean_losses()  # a loss that is not finite ends the run here, before the last checkpoint is replaced
        contents = model(args, agent, global_step) | {"agent": agent.state_dict(), "replay": replay.state_dict()}
        contents |= {"updates": updates, "wandb_run_id": tracker.run_id}
        contents |= {"torch_rng": torch.get_rng_state()}
        contents |= {"cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
        save(run_dir / "checkpoint.pt", contents)

    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None)
    returns, games, weights_ages, waiting, owed = deque(maxlen=20), [], [], [], 0.0  # owed: updates still to be made
    num_envs = args.num_actors * args.envs_per_actor
    clock, clock_step, clock_updates = time.perf_counter(), global_step, updates
    try:
        while global_step < args.total_timesteps and not stop_signals:
            # store what the actors have played; wait for it only if there is nothing to learn
            before, free_running = global_step, args.steps_per_update is None and global_step > args.learning_starts
            for actor, chunk, follows in actors.receive(patience=0 if free_running else 1):
                replay.add(actor, chunk, follows)
                global_step += CHUNK * args.envs_per_actor
                games += chunk["games"]
                weights_ages.append(updates - chunk["updates"])
                waiting.append(chunk["waiting"])

            # learn
            if global_step > args.learning_starts:
                owed = 1 if free_running else owed + (global_step - before) / (args.steps_per_update or math.inf)
            while owed >= 1 and not stop_signals:
                learn()
                updates, owed = updates + 1, owed - 1
                if updates % args.target_network_frequency == 0:
                    agent.update_target()
            if passed(args.weights_frequency * num_envs) and updates > actors.updates:
                actors.publish(agent.weights(), updates)

            # log
            for game in games:
                greediest = game["env"] == num_envs - 1
                returns.extend([game["r"]] if greediest else [])
                log({"charts/episodic_return": game["r"], "charts/episodic_length": game["l"],
                     "charts/unique_frames": game["unique_frames"],
                     f"charts/episodic_return_{'greediest' if greediest else 'explorers'}": game["r"]})  # fmt: skip
            games.clear()
            if passed(LOG_FREQUENCY):
                seconds = time.perf_counter() - clock
                sps, ups = (global_step - clock_step) / seconds, (updates - clock_updates) / seconds
                log({"charts/SPS": sps, "charts/updates_per_second": ups, "charts/learning_rate": args.learning_rate,
                     "charts/replay_size": replay.size, "charts/weights_age": np.mean(weights_ages),
                     "charts/actors_waiting": np.mean(waiting)} | agent.mean_losses())  # fmt: skip
                agent.losses.zero_()
                del weights_ages[:], waiting[:]
                bar.update(global_step - bar.n)
                recent = f"{np.mean(returns):.1f}" if returns else "-"
                bar.set_postfix_str(f"SPS {sps:.0f}, updates/s {ups:.1f}, return of the greediest {recent}")
                clock, clock_step, clock_updates = time.perf_counter(), global_step, updates

            pause = time.perf_counter()
            if passed(args.eval_frequency) and global_step < args.total_timesteps:
                evaluate(args, agent, device, global_step, run_dir, tracker, stopped=lambda: stop_signals)
            if passed(args.checkpoint_frequency) or stop_signals:
                save_checkpoint()
            clock += time.perf_counter() - pause

        if stop_signals:
            print(f"stopped at step {global_step:,}; go on with: --resume {run_dir}")
            exit_code = 128 + stop_signals[0]
        else:
            save_checkpoint()
            evaluate(args, agent, device, global_step, run_dir, tracker)
            saved = save(run_dir / "model.pt", model(args, agent, global_step))
            if saved:
                tracker.log_model(run_dir / "model.pt")
            exit_code = 0 if saved else 1
    finally:
        bar.close()
        actors.close()
        ray.shutdown()
        tracker.finish(exit_code, stopped=lambda: stop_signals)
    return exit_code


def main() -> int:
    args = tyro.cli(Args)
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate)
        path = path / "checkpoint.pt" if path.is_dir() else path
        flags = load(path, needs="replay" if args.resume else "agent")["args"]
        saved = Args(**{name: value for name, value in flags.items() if hasattr(Args, name)})
        args = tyro.cli(Args, default=saved)
    check_args(args)
    game, device = game_name(args.env_id), find_device(args.device)
    args.precision = find_precision(args.precision, device)
    if args.resume:
        for name in FIXED_FLAGS:
            if getattr(args, name) != getattr(saved, name):
                sys.exit(f"error: --{name.replace('_', '-')} cannot change on --resume: it was {getattr(saved, name)}")
        return train(args, device, path.parent, path)
    run_dir = Path(args.run_dir) / f"{game}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"error: the run folder cannot be made: {error}")
    print(f"{game} on {device}, {args.precision}: {run_dir}")
    if not args.evaluate:
        return train(args, device, run_dir, None)
    contents = load(path, needs="agent")
    agent = Agent(args, int(Atari(args).action_space.n), device)
    try:
        agent.q_network.load_state_dict(contents["agent"]["q_network"])
    except RuntimeError:
        sys.exit(f"error: the model in {path} does not fit the network of this script or the actions of {game}")
    tracker = Tracker(args, run_dir, job_type="eval")
    evaluate(args, agent, device, contents["global_step"], run_dir, tracker)
    tracker.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
