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
# ]
# ///
"""Deep Q-learning (DQN) on Atari, in one file.

Mnih et al. 2015, "Human-level control through deep reinforcement learning",
https://www.nature.com/articles/nature14236, with Adam and the settings of CleanRL.

    python dqn_atari.py --env-id Pong --seed 2
    python dqn_atari.py --resume runs/Pong__dqn_atari__2__20260131-120000
    python dqn_atari.py --evaluate runs/Pong__dqn_atari__2__20260131-120000/model.pt

Unlike the paper but like CleanRL: Adam, the squared error without clipping, FIRE at the start of a game or life, most
hyperparameters. Unlike CleanRL: 8 games in lockstep (--num-envs 1 plays one); evaluations at epsilon 0.01, not 0.05;
zeros before an episode's first frame, not copies of it; grayscale before the maximum of two frames, not after it; no
second action after FIRE and no NOOP after a lost life; TF32 on CUDA; bfloat16 in all but the output layers on CPUs with
AVX512_BF16. Sticky actions are off unless you turn them on, even for ALE/Pong-v5, where Gymnasium has 0.25.

In this order:

    the flags        AlgorithmFlags, GameFlags, EvaluationFlags, WandbFlags, RunFlags
    the algorithm    QNetwork, Replay, Agent, train
    the games        Atari, AtariVector
    what you see     Overlay, Recorder, evaluate, Tracker
    the machinery    devices and CUDA graphs, Run, checkpoints, checks of the flags, main
"""

from __future__ import annotations

import atexit
import ctypes
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NamedTuple, NoReturn, TypedDict, Union, get_args, get_origin, get_type_hints

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else torch's idle threads spin, on cores that others need

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ALGORITHM = "DQN"  # written into checkpoints: those of another algorithm are refused
FIXED_FLAGS = ("env_id", "exp_name", "seed", "num_envs", "buffer_size", "full_action_space")  # on --resume
LOG_FREQUENCY = 1000  # steps between two points of the loss and speed charts
STACK = 4  # frames in an observation
HISTORY = STACK - 1  # frames of an observation that are older than the newest
SIZE = 84  # height and width of a frame
FRAME_SKIP = 4  # emulator frames in an agent step
NOOP_MAX = 30  # most idle frames at the start of a game


@dataclass
class AlgorithmFlags:
    learning_rate: float = 1e-4
    """learning rate of Adam"""
    buffer_size: int = 1_000_000
    """transitions in the replay, 7,062 bytes each: 7.1 GB for a million"""
    replay_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay is stored; auto is the GPU if it is CUDA and has room, else main memory"""
    gamma: float = 0.99
    """discount factor"""
    batch_size: int = 32
    """transitions in an update"""
    target_network_frequency: int = 1000
    """steps after which the target network becomes a copy of the Q-network"""
    start_e: float = 1.0
    """epsilon, the probability of a random action, at the first step"""
    end_e: float = 0.01
    """epsilon after --exploration-fraction of the run"""
    exploration_fraction: float = 0.10
    """fraction of --total-timesteps in which epsilon falls from --start-e to --end-e"""
    learning_starts: int = 80_000
    """steps before the first update"""
    train_frequency: int = 4
    """steps from one update to the next; 8 games make 8 steps at a time, so 4 means two updates after each"""


@dataclass
class GameFlags:
    env_id: str = "Breakout"
    """name of the game: Breakout, ALE/Breakout-v5 and BreakoutNoFrameskip-v4 are the same here"""
    num_envs: int = 8
    """games played side by side"""
    num_workers: int | None = None
    """processes that run the games; None is one for each core, 0 runs them in the main process"""
    sticky_actions: float = 0.0
    """probability that the emulator repeats the last action in a frame instead of taking the new one"""
    max_episode_frames: int = 108_000
    """a game is cut off after this many emulator frames, 60 a second: 108000 are 30 minutes"""
    episodic_life: bool = True
    """end an episode of learning when a life is lost; the game goes on"""
    full_action_space: bool = False
    """every action of the joystick (18, in Skiing and LostLuggage 9) instead of those that the game uses"""


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
    eval_epsilon: float = 0.01
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
    """The network of Mnih et al. 2015: observations uint8 [batch, 4, 84, 84] to Q-values float32 [batch, actions].

    ``dtype`` is the precision in which the trunk computes. Weights are float32, but a network that is never trained may
    have those of its ``trunk`` cast to ``dtype``.
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
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        )
        self.head = nn.Linear(512, num_actions)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        mixed = self.dtype != torch.float32
        with torch.autocast(observations.device.type, self.dtype, enabled=mixed):
            pixels = observations.to(self.dtype) / 255
            features = self.trunk(pixels)
        return self.head(features.float())


# ----------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    observations: torch.Tensor  # uint8 [batch, 4, 84, 84]
    actions: torch.Tensor  # int64 [batch]
    rewards: torch.Tensor  # float32 [batch]
    next_observations: torch.Tensor  # uint8 [batch, 4, 84, 84]; arbitrary where terminated
    terminated: torch.Tensor  # bool [batch]


BYTES_PER_TRANSITION = SIZE * SIZE + 1 + 4 + 1  # frame, action, reward, end
RUNNING, TERMINATED, TRUNCATED = 0, 1, 2  # whether and how an episode ended at a step


class Replay:
    """The last ``capacity`` transitions, stored as single frames (Mnih et al. 2015) on ``device``.

    Each array has one place for each environment and step: the newest frame of the observation, the action, the
    reward and how the episode ended, if it did. The environments of a step lie side by side, the steps in a ring. A
    sample gathers 5 frames around a step and blanks those from before the episode. Never drawn: a step whose
    successor is not stored yet, one with a part of its frames overwritten, and one at which the episode was truncated,
    as the state that it led to is not stored.
    """

    ARRAYS = ("frames", "actions", "rewards", "ends")

    def __init__(self, capacity: int, num_envs: int, device: torch.device):
        self.num_envs = num_envs
        self.max_steps = capacity // num_envs
        self.capacity = self.max_steps * num_envs
        self.device = device
        self.frames = blank_frames((self.capacity, SIZE, SIZE), device)
        self.actions = torch.zeros(self.capacity, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(self.capacity, device=device)
        self.ends = torch.zeros(self.capacity, dtype=torch.uint8, device=device)
        self.num_steps = 0  # of each environment since the start: the last max_steps of them are stored
        self.num_steps_on_device = torch.zeros((), dtype=torch.int64, device=device)  # the same, for CUDA graphs

    def add(self, frames, actions, rewards, terminated, truncated) -> None:
        """Stores one step of all environments: what was seen and done, on a device, and what came of it, from ``recv``.

        ``frames`` (uint8 [num_envs, 84, 84]) are the newest of the observations that ``actions`` answer.
        """
        first = self.num_steps % self.max_steps * self.num_envs
        places = slice(first, first + self.num_envs)
        self.frames[places] = frames
        self.actions[places] = actions
        self.rewards[places] = upload(rewards, self.device)
        ends = np.where(terminated, TERMINATED, truncated * TRUNCATED)
        self.ends[places] = upload(ends, self.device)
        self.num_steps += 1
        self.num_steps_on_device += 1

    def sample(self, batch_size: int) -> Batch:
        """Draws valid transitions uniformly, with replacement, without waiting for the device."""
        newest = self.num_steps_on_device - 1  # its successor is not stored yet
        oldest = (self.num_steps_on_device - self.max_steps + HISTORY).clamp(min=0)
        # torch.randint takes no tensors as bounds, and to read them would wait for the device. So take remainders of
        # large numbers: no transition is favoured by more than a share of (their number / 2**31).
        # Draw 8 times too many, and prefer the valid ones: truncations are so rare that these suffice.
        large = torch.randint(2**31 - 1, (8 * batch_size,), device=self.device)
        draws = oldest * self.num_envs + large % ((newest - oldest) * self.num_envs)
        is_truncated = self.ends.take(draws % self.capacity) == TRUNCATED
        valid_first = is_truncated.byte().argsort(stable=True)
        draws = draws[valid_first[:batch_size]]

        offsets = torch.arange(-HISTORY, 2, device=self.device) * self.num_envs
        places = (draws[:, None] + offsets) % self.capacity  # [batch, 5]: 3 steps before, the drawn one, its successor
        frames = self.frames.index_select(0, places.flatten())  # many times faster than self.frames[places]
        frames = frames.unflatten(0, places.shape)
        running = self.ends.take(places[:, :HISTORY]) == RUNNING
        # an end blanks its own frame and those before it: a product from the newest frame to the oldest
        same_episode = running.flip(1).cumprod(1, dtype=torch.uint8).flip(1)
        frames[:, :HISTORY] *= same_episode[:, :, None, None]

        drawn = places[:, HISTORY]
        return Batch(
            observations=frames[:, :STACK],
            actions=self.actions.take(drawn).long(),
            rewards=self.rewards.take(drawn),
            next_observations=frames[:, 1:],
            terminated=self.ends.take(drawn) == TERMINATED,
        )

    def state_dict(self) -> dict:
        """The filled part of the arrays; on the CPU these are views, not copies."""
        filled = min(self.num_steps * self.num_envs, self.capacity)
        state = {"num_steps": self.num_steps}
        for name in self.ARRAYS:
            array = getattr(self, name)[:filled].cpu()
            state[name] = torch.from_numpy(array.numpy())  # else torch.save would write the whole array
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises an error unless the state is of such a replay."""
        num_steps = state["num_steps"]
        if type(num_steps) is not int or not 0 <= num_steps < 2**62:
            raise ValueError(f"num_steps is {num_steps}")
        filled = min(num_steps * self.num_envs, self.capacity)
        for name in self.ARRAYS:
            fill(getattr(self, name)[:filled], state[name])
        self.num_steps = num_steps
        self.num_steps_on_device.fill_(num_steps)


# ------------------------------------------------------------------------------------------------------ agent


class Agent:
    """Q-network, target network and optimizer."""

    # what a checkpoint holds of the agent; add a part to load_state_dict as well
    PARTS = ("q_network", "target_network", "optimizer", "metrics")

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.args = args
        self.num_actions = num_actions
        self.device = device
        self.precision = find_precision(args.precision, device)
        dtype = getattr(torch, self.precision)
        layout = conv_layout(device)
        self.q_network = QNetwork(num_actions, dtype).to(device, memory_format=layout)
        self.target_network = QNetwork(num_actions, dtype).to(device, memory_format=layout)
        self.target_network.trunk.to(dtype)  # never trained: cast when copied, not in each update
        self.update_target()
        options = optimizer_options(device)
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), args.learning_rate, **options)
        self.metrics = Means(device)

    @torch.no_grad()
    def act(self, observations: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """Epsilon-greedy actions, int64 [num_envs]."""
        greedy = self.q_network(observations).argmax(1)
        random = torch.randint_like(greedy, self.num_actions)
        explore = torch.rand(greedy.shape, device=self.device) < epsilon
        return torch.where(explore, random, greedy)

    def update(self, observations, actions, rewards, next_observations, terminated) -> None:
        """One step on the squared TD error of a ``Batch``."""
        with torch.no_grad():
            next_values = self.target_network(next_observations).amax(1)
            td_target = rewards + self.args.gamma * next_values * ~terminated
        q_values = self.q_network(observations)
        q_values = q_values.gather(1, actions[:, None]).squeeze(1)
        loss = F.mse_loss(q_values, td_target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.metrics.add({"td_loss": loss, "q_values": q_values})

    def update_target(self) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())

    @torch.no_grad()
    def think(self, observation: torch.Tensor) -> tuple[np.ndarray, int]:
        """What the overlay shows of one observation, Q-values float32 [actions], and the greedy action."""
        q_values = self.q_network(observation[None])[0]
        q_values = q_values.cpu().numpy()
        return q_values, int(q_values.argmax())

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict) -> None:
        load_moments(self.optimizer, state["optimizer"])  # before the weights: it may make a step
        self.q_network.load_state_dict(state["q_network"])
        self.target_network.load_state_dict(state["target_network"])
        self.metrics.load_state_dict(state["metrics"])


# --------------------------------------------------------------------------------------------------- training


def linear_schedule(start_e: float, end_e: float, duration: float, t: int) -> float:
    slope = (end_e - start_e) / duration
    return max(start_e + slope * t, end_e)


def train(args: Args, device: torch.device, run_dir: Path, resume: Path | None) -> int:
    """Trains anew or from the checkpoint ``resume``; returns the exit code, 128 + the signal if one stopped it."""
    envs = AtariVector(args)  # forks, so before the lock, threads and CUDA
    set_up_torch(args, device)
    agent = Agent(args, envs.num_actions, device)
    replay = Replay(args.buffer_size, args.num_envs, find_replay_device(args, device))
    if not resume:
        envs.reset(args.seed)
    run = Run(args, run_dir, agent, {"replay": replay, "envs": envs})
    global_step = run.start(resume)
    observations = upload(envs.observations, device)

    act = capture(agent.act, device)
    learn = capture_learning(args, agent, replay)
    epsilon = torch.zeros((), device=device)  # a CUDA graph would freeze a plain number
    exploration_steps = args.exploration_fraction * args.total_timesteps

    def passed(frequency: int) -> int:
        """How often what is done every ``frequency`` steps is due after the last step of all environments."""
        return multiples(frequency, global_step - args.num_envs, global_step)

    with closing(run), closing(envs):
        while global_step < args.total_timesteps and not run.stop_signals:
            # act
            epsilon.fill_(linear_schedule(args.start_e, args.end_e, exploration_steps, global_step))
            actions = act(observations, epsilon)
            envs.send(actions.cpu().numpy())
            global_step += args.num_envs

            # learn while the emulators run
            if global_step > args.learning_starts:
                for _ in range(passed(args.train_frequency)):
                    learn()
                if passed(args.target_network_frequency):
                    agent.update_target()

            # store
            next_observations, rewards, terminated, truncated, games = envs.recv()
            replay.add(observations[:, -1], actions, rewards, terminated, truncated)
            observations = upload(next_observations, device)

            # log, save, evaluate
            run.log_games(games, global_step)
            if passed(LOG_FREQUENCY):
                run.log({"charts/epsilon": epsilon.item()}, global_step)
            run.save_and_evaluate(global_step)
        run.finish(global_step)
    return run.exit_code


def capture_learning(args: Args, agent: Agent, replay: Replay) -> Callable[[], None]:
    """A function that samples and updates: on CUDA one graph, or only its update if the replay is in main memory."""

    def learn() -> None:
        agent.update(*replay.sample(args.batch_size))

    if replay.device == agent.device:
        return capture(learn, agent.device)
    update = capture(agent.update, agent.device)

    def learn_from_main_memory() -> None:
        batch = replay.sample(args.batch_size)
        update(*(upload(x, agent.device) for x in batch))

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
    ``state_dict`` (lists and dicts of numbers, text and bytes), ``load_state_dict``, ``screen``, ``find_game``,
    ``action_space``, and what the overlay shows: ``game``, ``action_names``, ``stack``, ``lives``, ``game_ended``,
    ``episode_return``, ``episode_length``, ``repeated_rewards`` and ``recording``.
    """

    COUNTS = ("lives", "game_ended", "num_rewards", "episode_return", "episode_length")  # in state_dict as they are

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

    def state_dict(self) -> dict:
        """All that the rest of the game depends on, as plain values: torch's threads do not survive the fork."""
        return {
            "emulator": self.ale.cloneSystemState().serialize(),
            "random": self.np_random.bit_generator.state,
            "last_action": self.last_action.value,
            "screens": self.screens.tobytes(),
            "stack": self.stack.tobytes(),
            "rewarded_pictures": sorted(self.rewarded_pictures),
        } | {name: getattr(self, name) for name in self.COUNTS}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where ``state`` was taken; raises an error if it is damaged or of another game."""
        self.ale.act(ale_py.Action.NOOP)  # ale-py 0.12.1 restores some games only into an emulator that has run
        try:
            self.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
        except SystemError:
            raise ValueError("the emulator's state is damaged or of another game") from None
        self.np_random.bit_generator.state = state["random"]
        self.last_action = ale_py.Action(state["last_action"])
        for array, name in ((self.screens, "screens"), (self.stack, "stack")):
            array[:] = np.frombuffer(state[name], np.uint8).reshape(array.shape)
        self.rewarded_pictures = {int(picture) for picture in state["rewarded_pictures"]}
        for name in self.COUNTS:
            kind = type(getattr(self, name))
            setattr(self, name, kind(state[name]))
        for name, value in self.state_dict().items():
            lossy = name == "emulator" and self.game == "MiniatureGolf"  # ale-py 0.12.1 loses the count of its strokes
            if value != state[name] and not lossy:
                raise ValueError(f"{name} is damaged or of another game")


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


# -------------------------------------------------------------------------------------- vector of environments

# what a step of one environment brought, in memory that all processes share
OUTCOME = np.dtype(
    [
        ("observation", np.uint8, (STACK, SIZE, SIZE)),
        ("reward", np.float32),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
    ],
    align=True,
)


class EnvSlice:
    """The environments that one process steps, one after another, and their places among the shared outcomes."""

    def __init__(self, args: Args, first: int, last: int, memory):
        self.first = first
        self.envs = [Game(args) for _ in range(first, last)]
        self.outcomes = np.frombuffer(memory, OUTCOME)[first:last]

    def send(self, message: tuple[str, list]) -> None:
        """Calls a method by its name; ``recv`` returns the result. So a slice in this process stands in for a pipe."""
        method, argument = message
        self.result = getattr(self, method)(argument)

    def recv(self):
        return self.result

    def close(self) -> None:
        pass

    def reset(self, seeds: list[tuple[int, int]]) -> None:
        for i, env in enumerate(self.envs):
            self.outcomes["observation"][i], _ = env.reset(seed=derive_seed(*seeds[i]))

    def step(self, actions: list[int]) -> list[dict]:
        """Steps every environment and starts its next episode when one ends; returns the games that ended."""
        games = []
        for i, env in enumerate(self.envs):
            observation, reward, terminated, truncated, info = env.step(actions[i])
            if "episode" in info:
                games.append(info["episode"] | {"env": self.first + i})
            if terminated or truncated:
                observation, _ = env.reset()
            self.outcomes[i] = (observation, reward, terminated, truncated)
        return games

    def state_dict(self, _) -> list[dict]:
        return [env.state_dict() for env in self.envs]

    def load_state_dict(self, states: list[dict]) -> ValueError | None:
        """Returns what is wrong with the states, if they cannot be loaded."""
        try:
            for i, env in enumerate(self.envs):
                env.load_state_dict(states[i])
                self.outcomes["observation"][i] = env.stack
        except ValueError as error:
            return error
        except Exception as error:
            return ValueError(repr(error))


def derive_seed(*numbers: int) -> int:
    """A seed made of several numbers; with ``seed + i``, runs with seeds 1 and 2 would share most of their games."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def work(pipe, inherited: list, *slice_args) -> None:
    """Body of a worker process: serves a slice until the main process closes the pipe or dies."""
    # terminals and job schedulers signal every process: the main one decides, and needs the games for its checkpoint
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for connection in inherited:  # the main process's ends: open here, they would hide its death
        connection.close()
    try:
        envs = EnvSlice(*slice_args)
        while True:
            envs.send(pipe.recv())
            pipe.send(envs.recv())
    except (EOFError, ConnectionError):
        pass
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


class AtariVector:
    """``num_envs`` games, split over worker processes that share one array of outcomes with the learner.

    ``send`` starts a step and ``recv`` ends it, so that the learner works while the emulators run. A life or game
    that ends is followed at once by the next, whose first observation is then in ``observations``. With
    ``num_workers`` 0 the games run in this process. Create it before CUDA, threads or W&B start, since it forks.
    """

    def __init__(self, args: Args):
        self.num_envs = args.num_envs
        self.num_actions = int(Game(args).action_space.n)
        num_workers = min(count_cores(), args.num_envs) if args.num_workers is None else args.num_workers
        num_slices = max(num_workers, 1)
        self.bounds = [args.num_envs * i // num_slices for i in range(num_slices + 1)]
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        memory = context.RawArray("B", args.num_envs * OUTCOME.itemsize)
        self.outcomes = np.frombuffer(memory, OUTCOME)
        self.observations = self.outcomes["observation"]
        self.pipes = []
        self.workers = []
        atexit.register(self.close)
        for first, last in zip(self.bounds, self.bounds[1:]):
            slice_args = (args, first, last, memory)
            if num_workers == 0:
                self.pipes.append(EnvSlice(*slice_args))
            else:
                self._start_worker(context, slice_args)

    def _start_worker(self, context, slice_args: tuple) -> None:
        pipe, child_pipe = context.Pipe()
        self.pipes.append(pipe)
        inherited = self.pipes if context.get_start_method() == "fork" else []
        worker = context.Process(target=work, args=(child_pipe, inherited, *slice_args), daemon=True)
        worker.start()
        child_pipe.close()  # so that the death of the worker closes the pipe
        self.workers.append(worker)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step with ``actions`` (int64 [num_envs])."""
        self._send("step", actions.tolist())

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Waits for the step: observations, rewards, terminated, truncated (views) and the games that ended.

        A game is its ``info["episode"]`` with the number of its environment, ``env``.
        """
        games = self._recv()
        outcomes = self.outcomes
        return self.observations, outcomes["reward"], outcomes["terminated"], outcomes["truncated"], games

    def reset(self, seed: int) -> None:
        """Starts a new game everywhere."""
        self._send("reset", [(seed, i) for i in range(self.num_envs)])
        self._recv()

    def state_dict(self) -> list[dict]:
        """The states of all environments; not between ``send`` and ``recv``."""
        self._send("state_dict", [None] * self.num_envs)
        return self._recv()

    def load_state_dict(self, states: list[dict]) -> None:
        """Goes on where the states were taken; raises a ValueError if they are damaged or of other games."""
        if len(states) != self.num_envs:
            raise ValueError(f"there are {len(states)} games, not {self.num_envs}")
        self._send("load_state_dict", states)
        self._recv()

    def close(self) -> None:
        """Ends the workers; also called when the program ends."""
        for pipe in self.pipes:
            pipe.close()
        for worker in self.workers:
            worker.join(timeout=5)
            worker.kill()
            worker.join()

    def _send(self, method: str, items: list) -> None:
        """Starts a method of every slice on its share of ``items``, one for each environment."""
        for i, pipe in enumerate(self.pipes):
            share = items[self.bounds[i] : self.bounds[i + 1]]
            try:
                pipe.send((method, share))
            except OSError:  # a worker has died: _recv tells why
                if not self.workers:
                    raise

    def _recv(self) -> list:
        results = []
        for i, pipe in enumerate(self.pipes):
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                self._fail(i)
            if isinstance(result, ValueError):
                raise result
            if isinstance(result, Exception):
                sys.exit(f"error: an environment worker failed:\n{result}")
            results += result or []
        return results

    def _fail(self, i: int) -> None:
        worker = self.workers[i]
        worker.join(timeout=5)
        reason = f"environment worker (process {worker.pid}) died with exit code {worker.exitcode}"
        sys.exit(f"error: {reason}: go on from the last checkpoint with --resume")


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

    def note(self, q_values: np.ndarray, action: int) -> None:
        """Notes the network's Q-values (float [actions]) of the current state and the action about to be taken."""
        self.q_values = q_values
        self.action = action
        self.greedy = int(np.argmax(q_values))
        self.values.append(float(q_values.max()))
        self.returns.append(self.env.episode_return)

    def render(self) -> np.ndarray:
        self.draw_game()
        if self.env.game_ended:
            self.draw_end()
        else:
            self.draw_q_values(top=104, bottom=428)
        self.draw_trace(self.values, "V(s) = max Q, last 10 s", GREEDY, top=466, bottom=548)
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

    def draw_q_values(self, top: int, bottom: int) -> None:
        """One bar an action, its length the Q-value's distance from the lowest: values often differ by a percent."""
        low, high = finite_range(self.q_values, BAR_SPAN)
        self.title(top - 14, "Q(s, a)", f"full bar: lowest + {high - low:.2g}", self.action_legend())
        pitch = min(36, (bottom - top) // len(self.q_values))
        size = min(15, pitch - 4)
        left = self.LEFT + 130
        width = 220
        for i, value in enumerate(self.q_values.tolist()):
            y = top + i * pitch
            length = 1
            if math.isfinite(value):
                length = max(round(width * (value - low) / (high - low)), 1)
            color = GREEDY if i == self.greedy else BAR
            self.box(left, y + 3, left + length, y + pitch - 4, color)
            if i == self.action:
                self.box(left - 4, y, left + width + 4, y + pitch - 1, CHOSEN, 2)
            self.label(i, value, y + (pitch + size) // 2 - 2, size)

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


def optimizer_options(device: torch.device) -> dict:
    """What Adam and AdamW need to be fast on ``device`` and, on CUDA, to be a part of a graph.

    Others take only some of it: RMSprop no ``fused``, SGD no ``capturable``.
    """
    if device.type == "mps":
        return {}
    return {"fused": True, "capturable": device.type == "cuda"}


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
    check_memory(f"--buffer-size {args.buffer_size}", needed, main_memory)
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
        """Raises an error unless the replay is of this step."""
        num_steps = self.parts["replay"].num_steps
        if global_step != num_steps * self.args.num_envs:
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
        """Logs the games that have ended in a step."""
        if games:
            self.returns.extend(game["r"] for game in games)
            self.tracker.log(episode_means("charts", games), global_step)

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
        "buffer_size": (1, 10**9),  # drawn from with numbers below 2**31
        "gamma": (0, 1),
        "batch_size": (1, 2**14),  # an update takes 0.4 MB for each
        "target_network_frequency": (1, NO_LIMIT),
        "start_e": (0, 1),
        "end_e": (0, args.start_e),
        "exploration_fraction": (1e-12, 1),
        "learning_starts": (0, NO_LIMIT),
        "train_frequency": (1, NO_LIMIT),
        "num_envs": (1, 10_000),  # a game takes 1 MB
        "num_workers": (0, args.num_envs),
    }
    for name, (low, high) in (COMMON_RANGES | ranges).items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # nan is not in any range
            sys.exit(f"error: {flag(name)} is {value:,}: it must be between {low:,} and {high:,}")
    # a transition needs its successor and, once the oldest are overwritten, 3 older frames
    steps = min(args.learning_starts // args.num_envs, args.buffer_size // args.num_envs - HISTORY)
    drawable = max(steps - 1, 0) * args.num_envs
    if args.batch_size > drawable and not args.evaluate:
        choice = f"the {drawable} transitions to draw from when learning starts"
        advice = "lower it, or raise --learning-starts and --buffer-size"
        sys.exit(f"error: --batch-size {args.batch_size} is more than {choice}: {advice}")


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
