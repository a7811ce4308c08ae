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
"""Deep Q-learning (DQN) on Atari with a video that shows how the network decides, in one file.

Training is that of dqn_atari.py, and the models of both scripts play in both. The video is made of panels: to add one
of your own, write a class like those in the section "panels" and name it in ``PANELS``.

    python dqn_atari_visual.py --evaluate runs/Pong__dqn_atari__2__20260131-120000/model.pt
    python dqn_atari_visual.py --evaluate runs/.../model.pt --panels game q_values surprise --saliency gradient
    python dqn_atari_visual.py --env-id Pong --seed 2
"""

import atexit
import contextlib
import copy
import ctypes
import difflib
import functools
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
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

ALGORITHM = "DQN"  # written into checkpoints: those of another algorithm are refused
LOG_FREQUENCY = 1000  # steps between two points of the loss and speed charts
HISTOGRAM_STATES = 10_000  # the last states of an evaluation whose Q-values go into its histogram
FIXED_FLAGS = ("env_id", "num_envs", "buffer_size", "n_step", "full_action_space", "precision")  # on --resume
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
    eval_epsilon: float = 0.01
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
    num_envs: int = 8
    """games played side by side (1: the serial algorithm of the paper)"""
    num_workers: int | None = None
    """processes that run the games (default: one per core, at most one per game; 0: the main process)"""
    sticky_actions: float = 0.0
    """probability that the emulator repeats the previous action in a frame"""
    max_episode_frames: int = 108_000
    """emulator frames (4 a step, 60 a second) after which a game is cut off"""
    episodic_life: bool = True
    """end the learning episode when a life is lost (the game goes on)"""
    full_action_space: bool = False
    """all 18 actions instead of the game's own"""

    learning_rate: float = 1e-4
    """learning rate of Adam"""
    buffer_size: int = 1_000_000
    """transitions in the replay (7,062 bytes each: 7.1 GB for a million)"""
    replay_device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the replay lies; auto: on the learner's device if it fits there, else in main memory"""
    gamma: float = 0.99
    """discount factor"""
    n_step: int = 1
    """rewards in a return before it bootstraps"""
    batch_size: int = 32
    """transitions in an update"""
    target_network_frequency: int = 1000
    """steps between two copies of the Q-network to the target network"""
    start_e: float = 1.0
    """epsilon at the first step"""
    end_e: float = 0.01
    """epsilon after the exploration fraction"""
    exploration_fraction: float = 0.10
    """fraction of total-timesteps over which epsilon falls from start-e to end-e"""
    learning_starts: int = 80_000
    """steps before the first update"""
    train_frequency: int = 4
    """steps for each update"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the network's trunk; auto: bfloat16 on a CPU that has instructions for it, else float32"""
    panels: tuple[str, ...] = ()
    """parts of the video, in this order: game q_values frames history surprise facts; all if none is named"""
    saliency: Literal["none", "gradient", "perturbation"] = "perturbation"
    """which pixels move the greedy action's Q-value, drawn over the game: by gradient, or by blurring"""


def check_args(args: Args) -> None:
    """Ends the program with one sentence if a flag is out of its range."""
    ranges = {"learning_rate exploration_fraction": (1e-12, 1), "num_workers": (0, args.num_envs), "seed": (0, 2**31)}
    ranges["eval_epsilon sticky_actions gamma start_e end_e"] = (0, 1)
    ranges["eval_frequency checkpoint_frequency learning_starts"] = (0, math.inf)
    ranges["video_length eval_episodes total_timesteps num_envs max_episode_frames"] = (1, math.inf)
    ranges["buffer_size n_step batch_size target_network_frequency train_frequency"] = (1, math.inf)
    for names, (low, high) in ranges.items():
        for name in names.split():
            value = getattr(args, name)
            limit = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            if value is not None and not low <= value <= high:
                sys.exit(f"error: --{name.replace('_', '-')} is {value}: it must be {limit}")
    if args.resume and args.evaluate:
        sys.exit("error: --resume trains and --evaluate does not: give one of them")
    for name in args.panels:
        if name not in PANELS:
            sys.exit(f"error: --panels {name} is no panel: there are {', '.join(PANELS)}")
    rows = min(args.learning_starts // args.num_envs, args.buffer_size // args.num_envs - HISTORY)
    usable = max(rows - args.n_step, 0) * args.num_envs
    if args.batch_size > usable and not args.evaluate:
        sys.exit(f"error: --batch-size {args.batch_size} is more than the {usable} transitions that are stored when"
                 " learning starts: lower it, or raise --learning-starts and --buffer-size")  # fmt: skip


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

    def state_dict(self) -> dict:
        """All that the rest of the game depends on, as plain values: torch's threads do not survive the fork."""
        return {
            "emulator": self.ale.cloneSystemState().serialize(),
            "random": self.unwrapped.np_random.bit_generator.state,
            "screens": self.screens.tobytes(),
            "stack": self.stack.tobytes(),
            "frames_seen": np.array(sorted(self.frames_seen), np.uint32).tobytes(),
            "counters": [self.game_ended, self.lives, self.episode_return, self.episode_length],
        }

    def load_state_dict(self, state: dict) -> None:
        self.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
        self.unwrapped.np_random.bit_generator.state = state["random"]
        self.screens.flat, self.stack.flat = (np.frombuffer(state[name], np.uint8) for name in ("screens", "stack"))
        self.frames_seen = set(np.frombuffer(state["frames_seen"], np.uint32).tolist())
        self.game_ended, self.lives, self.episode_return, self.episode_length = state["counters"]


# -------------------------------------------------------------------------------------- vector of environments


class EnvSlice:
    """The environments that one process steps, one after another, on their rows of the shared arrays."""

    def __init__(self, args: Args, first: int, last: int, buffers: dict[str, tuple]):
        self.first, self.envs = first, [Atari(args) for _ in range(first, last)]
        self.arrays = {name: array[first:last] for name, array in as_arrays(buffers).items()}

    def send(self, message: tuple[str, list]) -> None:
        """Calls the method named first with the argument that follows; ``recv`` returns the result, as a pipe does."""
        method, argument = message
        self.result = getattr(self, method)(argument)

    def recv(self):
        return self.result

    def close(self) -> None:
        pass

    def reset(self, seeds: list[int]) -> None:
        for env, seed, observation in zip(self.envs, seeds, self.arrays["observations"]):
            observation[:] = env.reset(seed=seed)[0]

    def step(self, actions: list[int]) -> list[dict]:
        """Steps every environment and starts its next episode when one ends; returns the games that ended."""
        games, a = [], self.arrays
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            observation, a["rewards"][i], terminated, truncated, info = env.step(action)
            a["terminated"][i], a["truncated"][i] = terminated, truncated
            if truncated:
                a["final_observations"][i] = observation
            a["observations"][i] = env.reset()[0] if terminated or truncated else observation
            games += [info["episode"] | {"env": self.first + i}] if info else []
        return games

    def state_dict(self, _) -> list[dict]:
        return [env.state_dict() for env in self.envs]

    def load_state_dict(self, states: list[dict]) -> None:
        for env, state, observation in zip(self.envs, states, self.arrays["observations"]):
            env.load_state_dict(state)
            observation[:] = env.stack


def as_arrays(buffers: dict[str, tuple]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(raw, dtype).reshape(shape) for name, (raw, dtype, shape) in buffers.items()}


def work(pipe, inherited: list, make_slice, *share) -> None:
    """Body of a worker process: serves a slice until the main process closes the pipe or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and job schedulers signal every process: the main one
        signal.signal(number, signal.SIG_IGN)  # decides, and needs the games for its checkpoint
    for connection in inherited:  # the main process's ends: open here, they would hide its death
        connection.close()
    try:
        envs = make_slice(*share)
        while True:
            envs.send(pipe.recv())
            pipe.send(envs.recv())
    except (EOFError, ConnectionError):
        pass
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


class AtariVector:
    """``num_envs`` games, split over worker processes that share one set of arrays with the learner.

    ``send`` starts a step and ``recv`` ends it, so that the learner works while the emulators run. A life or game
    that ends is followed at once by the next, whose first observation is then in ``observations``. With
    ``num_workers`` 0 the games run in this process. Create it before CUDA, threads or W&B start, since it forks.
    """

    make_slice = EnvSlice  # what each process makes of its share

    def __init__(self, args: Args):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(cores, args.num_envs) if args.num_workers is None else args.num_workers
        self.num_envs, self.num_actions = args.num_envs, int(Atari(args).action_space.n)
        context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
        buffers = {}
        for name, dtype, shape in (
            ("observations", np.uint8, (args.num_envs, STACK, SIZE, SIZE)),
            ("rewards", np.float32, (args.num_envs,)),
            ("terminated", np.bool_, (args.num_envs,)),
            ("truncated", np.bool_, (args.num_envs,)),
            ("final_observations", np.uint8, (args.num_envs, STACK, SIZE, SIZE)),
        ):
            buffers[name] = (context.RawArray("B", math.prod(shape) * np.dtype(dtype).itemsize), dtype, shape)
        self.arrays = as_arrays(buffers)
        self.bounds = [args.num_envs * i // max(num_workers, 1) for i in range(max(num_workers, 1) + 1)]
        self.pipes, self.workers = [], []
        atexit.register(self.close)
        for first, last in zip(self.bounds, self.bounds[1:]):
            share = (args, first, last, buffers)
            if num_workers == 0:
                self.pipes.append(self.make_slice(*share))
                continue
            pipe, child_pipe = context.Pipe()
            self.pipes.append(pipe)
            arguments = (child_pipe, self.pipes, self.make_slice, *share)
            worker = context.Process(target=work, args=arguments, daemon=True)
            worker.start()
            child_pipe.close()  # so that the death of the worker closes the pipe
            self.workers.append(worker)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step with ``actions`` (int64 [num_envs])."""
        self._send("step", actions.tolist())

    def recv(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Waits for the step: observations, rewards, terminated, truncated (views) and the games that ended.

        A game is its ``info["episode"]`` with the number of its environment, ``env``. The last observation of a
        truncated episode is in ``arrays["final_observations"]``.
        """
        games = self._recv()
        return *(self.arrays[name] for name in ("observations", "rewards", "terminated", "truncated")), games

    def reset(self, seed: int) -> np.ndarray:
        """Starts a new game everywhere, environment ``i`` with seed ``seed + i``; returns the observations."""
        self._send("reset", range(seed, seed + self.num_envs))
        self._recv()
        return self.arrays["observations"]

    def state_dict(self) -> list[dict]:
        """The states of all environments; not between ``send`` and ``recv``."""
        self._send("state_dict", [None] * self.num_envs)
        return self._recv()

    def load_state_dict(self, states: list[dict]) -> np.ndarray:
        self._send("load_state_dict", states)
        self._recv()
        return self.arrays["observations"]

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
            try:
                pipe.send((method, items[self.bounds[i] : self.bounds[i + 1]]))
            except OSError:
                self._fail(i)

    def _recv(self) -> list:
        results = []
        for i, pipe in enumerate(self.pipes):
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                self._fail(i)
            if isinstance(result, Exception):
                sys.exit(f"error: environment worker {i} failed:\n{result}")
            results += result or []
        return results

    def _fail(self, i: int) -> None:
        worker, games = self.workers[i], f"{self.bounds[i]} to {self.bounds[i + 1] - 1}"
        worker.join(timeout=5)
        sys.exit(f"error: environment worker {i} (process {worker.pid}, environments {games}) died with exit code"
                 f" {worker.exitcode}: go on from the last checkpoint with --resume")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- network


class QNetwork(nn.Module):
    """The network of Mnih et al. 2015: observations uint8 [batch, 4, 84, 84] to Q-values float32 [batch, actions].

    ``dtype`` is the precision in which the trunk computes; its weights stay float32.
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
        ).to(memory_format=torch.channels_last)
        self.head = nn.Linear(512, num_actions)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        with torch.autocast(observations.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.trunk(observations.to(self.dtype) / 255)
        return self.head(features.float())


# ----------------------------------------------------------------------------------------------------- replay


class Batch(NamedTuple):
    observations: torch.Tensor  # uint8 [batch, 4, 84, 84]
    actions: torch.Tensor  # int64 [batch]
    returns: torch.Tensor  # float32 [batch], sum of gamma^k r_(t+k) over n steps, up to the end of the episode
    next_observations: torch.Tensor  # uint8 [batch, 4, 84, 84], n steps later; arbitrary where discounts are 0
    discounts: torch.Tensor  # float32 [batch], gamma^n, or 0 where the episode terminated within the n steps


BYTES_PER_TRANSITION = SIZE * SIZE + 1 + 4 + 1  # frame, action, reward, end
TERMINATED, CUT = 1, 2  # how an episode ended at a step: with its last reward, or cut off by truncation


class Replay:
    """The last ``capacity`` transitions, stored as single frames (Mnih et al. 2015) on ``device``.

    Row ``s % rows`` of each array holds step ``s`` of all environments: the newest frame of the observation, the
    action, the reward and how the episode ended, if it did. A sample gathers the 4 + n frames around a step and
    blanks those from before the episode. Never drawn: a step whose n successors are not stored yet, one with a
    part of its frames overwritten, and one whose n-step return runs into a truncation.
    """

    ARRAYS = ("frames", "actions", "rewards", "ends")

    def __init__(self, capacity: int, num_envs: int, n_step: int, gamma: float, device: torch.device):
        self.rows, self.num_envs = capacity // num_envs, num_envs
        self.n_step, self.gamma, self.device = n_step, gamma, device
        shape = (self.rows, num_envs)
        self.frames = torch.zeros(*shape, SIZE, SIZE, dtype=torch.uint8, device=device)
        self.actions = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(shape, dtype=torch.float32, device=device)
        self.ends = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.num_steps = 0
        self.num_steps_on_device = torch.zeros((), dtype=torch.int64, device=device)  # read inside the CUDA graph

    def add(self, frames, actions, rewards, terminated, truncated) -> None:
        """Stores one step of all environments; ``frames`` (uint8 [num_envs, 84, 84]) are those acted on."""
        row = self.num_steps % self.rows
        self.frames[row], self.actions[row], self.rewards[row] = frames, actions, rewards
        self.ends[row] = torch.where(terminated, TERMINATED, truncated * CUT)
        self.num_steps += 1
        self.num_steps_on_device += 1

    def sample(self, batch_size: int) -> Batch:
        """Draws valid transitions uniformly, with replacement, without waiting for the device."""
        high = self.num_steps_on_device - self.n_step
        low = (self.num_steps_on_device - self.rows + HISTORY).clamp(min=0)
        # Truncations are rare: of 8 draws for each place in the batch, enough are valid. Drawn in a range so large
        # that the remainder favours none, since the bounds are known only to the device.
        draws = torch.randint(2**31 - 1, (8 * batch_size,), device=self.device) % ((high - low) * self.num_envs)
        steps, envs = low + draws // self.num_envs, draws % self.num_envs
        ends = self._window(self.ends, steps, envs, 0, self.n_step)
        invalid = ((ends == CUT) & self._alive(ends)).any(1)
        chosen = invalid.byte().argsort(stable=True)[:batch_size]
        steps, envs, ends = steps[chosen], envs[chosen], ends[chosen]

        frames = self._window(self.frames, steps, envs, -HISTORY, self.n_step + 1)
        ended = self._window(self.ends, steps, envs, -HISTORY, 0) > 0
        same_episode = (~ended).flip(1).cumprod(1).flip(1)  # no end between this older frame and the newest one
        frames[:, :HISTORY] *= same_episode[:, :, None, None].to(torch.uint8)

        rewards = self._window(self.rewards, steps, envs, 0, self.n_step)
        powers = self.gamma ** torch.arange(self.n_step, device=self.device)
        return Batch(
            observations=frames[:, :STACK],
            actions=self._window(self.actions, steps, envs, 0, 1).squeeze(1).long(),
            returns=(rewards * powers * self._alive(ends)).sum(1),
            next_observations=frames[:, self.n_step :],
            discounts=self.gamma**self.n_step * (ends != TERMINATED).all(1),
        )

    def _window(self, array, steps, envs, start: int, stop: int) -> torch.Tensor:
        """Entries of the steps ``start`` to ``stop - 1`` after each of ``steps``: [batch, stop - start, ...]."""
        rows = (steps[:, None] + torch.arange(start, stop, device=self.device)) % self.rows
        indices = rows * self.num_envs + envs[:, None]  # index_select is many times faster than array[rows, envs]
        return array.flatten(0, 1).index_select(0, indices.flatten()).unflatten(0, rows.shape)

    @staticmethod
    def _alive(ends: torch.Tensor) -> torch.Tensor:
        """Whether the episode still runs at each step of [batch, n]: no termination at an earlier one."""
        terminated = ends == TERMINATED
        return terminated.cumsum(1) - terminated.long() == 0

    def state_dict(self) -> dict:
        """The filled part of the arrays; on the CPU these are views, not copies."""
        filled = min(self.num_steps, self.rows)
        arrays = {name: getattr(self, name)[:filled].cpu() for name in self.ARRAYS}
        # torch.save writes whole storages: through numpy, the slice is one of its own
        return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()} | {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict) -> None:
        for name in self.ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name].to(self.device)
        self.num_steps = state["num_steps"]
        self.num_steps_on_device.fill_(self.num_steps)


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


# ---------------------------------------------------------------------------------------------------- learner


class Agent:
    """Q-network, target network and optimizer. On CUDA, ``act`` and ``update`` are captured as graphs."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.num_actions = num_actions
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.precision]
        self.q_network = QNetwork(num_actions, dtype).to(device)
        self.target_network = QNetwork(num_actions, dtype).to(device)
        self.target_network.trunk.to(dtype)  # it is never trained: cast once a copy, not once an update
        self.update_target()
        options = {"fused": True, "capturable": device.type == "cuda"} if device.type != "mps" else {}
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), args.learning_rate, **options)
        self.losses = torch.zeros(3, device=device)  # sums over the updates since the last log: loss, Q-value, count

    @torch.no_grad()
    def act(self, observations: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """Epsilon-greedy actions, int64 [num_envs]."""
        greedy = self.q_network(observations).argmax(1)
        explore = torch.rand(greedy.shape, device=greedy.device) < epsilon
        return torch.where(explore, torch.randint_like(greedy, self.num_actions), greedy)

    @torch.no_grad()
    def think(self, observation: torch.Tensor) -> tuple[np.ndarray, int]:
        """What the overlay shows of one observation, Q-values float32 [actions], and the greedy action."""
        q_values = self.q_network(observation[None])[0].cpu().numpy()
        return q_values, int(q_values.argmax())

    def update(self, *batch: torch.Tensor) -> None:
        """One step on the squared TD error of a ``Batch``."""
        observations, actions, returns, next_observations, discounts = batch
        with torch.no_grad():
            td_target = returns + discounts * self.target_network(next_observations).amax(1)
        q_values = self.q_network(observations).gather(1, actions[:, None]).squeeze(1)
        loss = F.mse_loss(q_values, td_target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses += torch.stack([loss.detach(), q_values.detach().mean(), torch.ones_like(loss)])

    def update_target(self) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())

    def mean_losses(self) -> dict[str, float]:
        """Means since ``losses`` was last set to zero; ends the program if the loss is not finite."""
        loss, q_value, count = self.losses.tolist()
        if not math.isfinite(loss):
            sys.exit(f"error: the loss became {loss}: go on from the last checkpoint with a lower --learning-rate")
        return {"losses/td_loss": loss / count, "losses/q_values": q_value / count} if count else {}

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


# --------------------------------------------------------------------------------------------------- saliency

PATCH_STRIDE = 6  # pixels from patch to patch (the paper: 5, at one and a half times the cost)


def gradient_saliency(q_network: QNetwork, observation: torch.Tensor, action: int) -> np.ndarray:
    """|dQ(s, action) / dpixel| of the observation (uint8 [4, 84, 84]), largest of its frames: float32 [84, 84].

    Simonyan et al. 2013, https://arxiv.org/abs/1312.6034; per gray level. No parameter's ``grad`` is touched.
    """
    pixels = observation[None].float().requires_grad_()
    (gradient,) = torch.autograd.grad(q_network(pixels)[0, action], pixels)
    return gradient[0].abs().amax(0).cpu().numpy()


@torch.no_grad()
def perturbation_saliency(q_network: QNetwork, observation: torch.Tensor, action: int) -> np.ndarray:
    """(Q(s, action) - Q(s', action))^2 / 2, where s' is s with one patch blurred: float32 [84, 84].

    Greydanus et al. 2018, https://arxiv.org/abs/1711.00138, for the network's Q-value. A patch is blurred in all four
    frames of the observation (uint8 [4, 84, 84]); the patches are one batch, and pixels between them interpolated.
    """
    blur, masks = blur_and_masks(q_network.dtype, observation.device)
    stack = observation[None].float()
    sharp, blurred = (
        x.to(masks.dtype).contiguous(memory_format=torch.channels_last) for x in (stack, blur @ stack @ blur.T)
    )
    q_values = q_network(torch.lerp(sharp, blurred, masks))[:, action]
    scores = (q_values[1:] - q_values[0]).square() / 2
    side = SIZE // PATCH_STRIDE
    return cv2.resize(scores.view(side, side).cpu().numpy(), (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


@functools.cache
def blur_and_masks(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What perturbation needs of every frame, with the paper's Gaussians.

    The matrix [84, 84] that blurs along one axis (sigma 3), and the masks [1 + patches, 4, 84, 84] of what is blurred
    (sigma 5, 1 in the middle); the first mask is empty.
    """
    pixels = torch.arange(SIZE, device=device)
    centers = torch.arange(SIZE // PATCH_STRIDE, device=device) * PATCH_STRIDE + (PATCH_STRIDE - 1) / 2
    blur = torch.exp(-((pixels[:, None] - pixels) ** 2) / (2 * 3**2))
    blur /= blur.sum(1, keepdim=True)
    axis = torch.exp(-((centers[:, None] - pixels) ** 2) / (2 * 5**2))
    masks = (axis[:, None, :, None] * axis[None, :, None, :]).view(-1, 1, SIZE, SIZE)
    masks = torch.cat([torch.zeros_like(masks[:1]), masks]).expand(-1, STACK, -1, -1)
    return blur, masks.to(dtype).contiguous(memory_format=torch.channels_last)


SALIENCY = {"gradient": gradient_saliency, "perturbation": perturbation_saliency}

# -------------------------------------------------------------------------------------- overlay and recorder

GROUND, QUIET, GRID, BAR = (18, 19, 23), (139, 143, 151), (52, 55, 62), (86, 110, 142)
GREEDY, CHOSEN, TEXT = (80, 176, 240), (255, 196, 92), (236, 237, 240)
GAIN, LOSS = (112, 200, 104), (232, 92, 92)
LIFE, HEAT = (188, 140, 250), (255, 40, 130)  # a lost life, the saliency map
FONT = cv2.FontFace("sans")
TRACE_STEPS = 150  # 10 seconds of play


def number(value: float) -> str:
    """At most 8 characters: 2.413, -1,250.5, 3.2e+30, nan."""
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e4 else f"{value:.2g}"


def finite_range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


class Box(NamedTuple):
    """A rectangle of the picture, in pixels; right and bottom are outside."""

    left: int
    top: int
    right: int
    bottom: int


class Canvas:
    """The picture (uint8 [height, width, 3], RGB) and what panels draw on it."""

    def __init__(self, width: int, height: int):
        self.picture = np.empty((height, width, 3), np.uint8)

    def text(self, text, x, y, color=TEXT, size=18, weight=400, right=False) -> int:
        """Writes on the baseline y, from x or, with ``right``, up to x; returns the x at which the text ends."""
        align = cv2.PUT_TEXT_ALIGN_RIGHT if right else cv2.PUT_TEXT_ALIGN_LEFT
        return cv2.putText(self.picture, text, (x, y), color, FONT, size, weight, align)[0][0]

    def title(self, box: Box, text: str, figure: str = "", key: dict | None = None) -> Box:
        """Heads a panel: title, words in the colors that they explain, a figure at the right. Returns the box below."""
        x = self.text(text, box.left, box.top + 16, QUIET)
        for word, color in (key or {}).items():
            x = self.text(word, x + 14, box.top + 16, color)
        self.text(figure, box.right, box.top + 16, QUIET, right=True)
        return box._replace(top=box.top + 30)

    def image(self, box: Box, image: np.ndarray) -> None:
        """Fills the box with an image (uint8 [h, w] or [h, w, 3]) and does not smooth its pixels."""
        part = self.picture[box.top : box.bottom, box.left : box.right]
        image = image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
        cv2.resize(image, part.shape[1::-1], dst=part, interpolation=cv2.INTER_NEAREST)

    def curves(self, box: Box, values, color=GREEDY, thickness=2, span: tuple[float, float] | None = None) -> None:
        """Values of the last steps (float [steps] or [curves, steps]); ``span``: those at bottom and top of the box."""
        values = np.atleast_2d(np.asarray(values, float))
        y = y_axis(box, values, *(span or finite_range(values)))
        x = x_axis(box, values.shape[1])
        points = [np.stack([x, row], 1)[np.isfinite(row)].round().astype(np.int32) for row in y]
        cv2.polylines(self.picture, points, False, color, thickness, cv2.LINE_AA)


def x_axis(box: Box, count: int) -> np.ndarray:
    """Where the last ``count`` steps stand, the current one at the right edge: float [count]."""
    return box.right - np.arange(count)[::-1] * (box.right - box.left) / (TRACE_STEPS - 1)


def y_axis(box: Box, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where the values stand, ``low`` at the bottom of the box and ``high`` at its top."""
    return box.bottom - (values - low) / ((high - low) or 1.0) * (box.bottom - box.top)


class Step(NamedTuple):
    """What is kept of a step for the panels that look back."""

    q_values: np.ndarray  # float32 [actions]
    action: int  # the one taken
    reward: float  # true reward that came with this state
    life_lost: bool  # on the way to this state
    surprise: float  # TD error of the step that led to this state; 0 in the first of a game


# ----------------------------------------------------------------------------------------------------- panels

# A panel draws into its box what it reads from ``state``, the ``Overlay``. ``width`` is its share of a row; ``height``
# is in pixels, and stretched or squeezed so that the rows fill the picture.


class Game:
    """The screen and, over it, the pixels behind the greedy action's Q-value."""

    width, height = 480, 720  # in pixels: a column of its own

    def draw(self, canvas: Canvas, box: Box, state: "Overlay") -> None:
        screen, saliency = state.env.ale.getScreenRGB(), state.saliency
        if saliency is not None and math.isfinite(peak := float(saliency.max())):
            heat = 0.8 * cv2.resize(saliency / (peak or 1.0), screen.shape[1::-1])[:, :, None]
            screen = (screen + heat * (np.array(HEAT) - screen)).astype(np.uint8)
            q_value = f"Q(s, {state.env.action_names[state.greedy]})"
            caption = {
                "gradient": f"slope of {q_value}, up to {peak:.2g} a gray level",
                "perturbation": f"where blurring moves {q_value}, by up to {(2 * peak) ** 0.5:.2g}",
            }[state.args.saliency]
            canvas.text(caption, box.left + 20, box.bottom - 13, HEAT, 15)
        canvas.image(box._replace(bottom=box.bottom - 90), screen)
        canvas.text(state.env.game, box.left + 20, box.bottom - 62, TEXT, 22, 600)
        canvas.text(state.subtitle, box.left + 20, box.bottom - 38, QUIET, 15)


class QValues:
    """One bar an action, its length the Q-value's distance from the lowest: values often differ by a percent."""

    width, height = 1 / 2, 374

    def draw(self, canvas: Canvas, box: Box, state: "Overlay") -> None:
        taken = "taken" if state.action == state.greedy else "taken to explore"
        box = canvas.title(box, "Q(s, a)", key={"greedy": GREEDY, taken: CHOSEN})
        low, high = finite_range(state.q_values)
        names = state.env.action_names
        pitch = min(44, (box.bottom - box.top) // len(names))
        size = min(20, pitch - 3, 200 // max(map(len, names)))
        left, right = box.left + 136, box.right - 92
        for i, (name, value) in enumerate(zip(names, state.q_values.tolist())):
            y = box.top + i * pitch
            length = round((right - left) * (value - low) / (high - low)) if math.isfinite(value) and high > low else 0
            color = GREEDY if i == state.greedy else BAR
            cv2.rectangle(canvas.picture, (left, y + 3), (left + max(length, 1), y + pitch - 4), color, -1)
            if i == state.action:
                cv2.rectangle(canvas.picture, (left - 4, y), (right + 4, y + pitch - 1), CHOSEN, 2)
            color, weight = (TEXT, 600) if i in (state.greedy, state.action) else (QUIET, 400)
            canvas.text(name, box.left, y + (pitch + size) // 2 - 2, color, size, weight)
            canvas.text(number(value), box.right, y + (pitch + size) // 2 - 2, color, size, weight, right=True)


class Frames:
    """The observation as it is: all that the network sees."""

    width, height = 1 / 2, 374

    def draw(self, canvas: Canvas, box: Box, state: "Overlay") -> None:
        box = canvas.title(box, "what the network sees, newest last")
        gap = 8

        def fit(columns: int) -> int:
            """The largest size of a frame in so many columns."""
            rows = STACK // columns
            width, height = box.right - box.left + gap, box.bottom - box.top + gap
            return min(width // columns, height // rows) - gap

        columns = max(2, 4, key=fit)
        size = fit(columns)
        for i, frame in enumerate(state.env.stack):
            x, y = box.left + i % columns * (size + gap), box.top + i // columns * (size + gap)
            canvas.image(Box(x, y, x + size, y + size), frame)


class History:
    """Every action's Q-value over the last seconds, and V(s), the highest; rewards and lost lives are marked."""

    width, height = 1, 114

    def draw(self, canvas: Canvas, box: Box, state: "Overlay") -> None:
        q_values = np.array([step.q_values for step in state.steps], float).T
        low, high = finite_range(q_values)
        key = {"V(s)": GREEDY, "exploring": CHOSEN, "reward": GAIN, "penalty": LOSS, "life lost": LIFE}
        box = canvas.title(box, "Q of every action, last 10 s", f"{number(low)} to {number(high)}", key)
        cv2.line(canvas.picture, (box.left, box.bottom), (box.right, box.bottom), GRID, 1)
        x = x_axis(box, len(state.steps)).round().astype(int).tolist()
        for at, step in zip(x, state.steps):
            if step.life_lost:
                cv2.rectangle(canvas.picture, (at - 1, box.top), (at + 1, box.bottom), LIFE, -1)
            if step.reward:
                color = GAIN if step.reward > 0 else LOSS
                cv2.line(canvas.picture, (at, box.top), (at, box.bottom), color, 1)
        canvas.curves(box, q_values, QUIET, 1, (low, high))
        canvas.curves(box, q_values.max(0), GREEDY, 2, (low, high))
        y = y_axis(box, q_values, low, high)
        for i, step in enumerate(state.steps):
            if step.action != step.q_values.argmax() and math.isfinite(y[step.action, i]):
                cv2.circle(canvas.picture, (x[i], round(y[step.action, i])), 4, CHOSEN, -1, cv2.LINE_AA)


class Surprise:
    """The one-step TD error as it happens, with the Q-network's own bootstrap: what training wants to change."""

    width, height = 1, 80

    def draw(self, canvas: Canvas, box: Box, state: "Overlay") -> None:
        surprises = np.array([step.surprise for step in state.steps])
        most = max(map(abs, finite_range(surprises)))
        title = f"surprise: r + {state.args.gamma:g} max Q(s') - Q(s, a)"
        figure = f"now {number(surprises[-1])}, largest {number(most)}"
        box = canvas.title(box, title, figure, {"better": GAIN, "worse": LOSS})
        zero = (box.top + box.bottom) // 2
        cv2.line(canvas.picture, (box.left, zero), (box.right, zero), GRID, 1)
        x, y = x_axis(box, len(surprises)), y_axis(box, surprises, -most, most)
        for at, end, surprise in zip(x, y, surprises):
            if math.isfinite(surprise) and surprise:
                color = GAIN if surprise > 0 else LOSS
                cv2.rectangle(canvas.picture, (round(at) - 1, zero), (round(at) + 1, round(end)), color, -1)


class Facts:
    """Where the game stands."""

    width, height = 1, 52

    def draw(self, canvas: Canvas, box: Box, state: "Overlay") -> None:
        env = state.env
        facts = {"return": f"{env.episode_return:,.0f}", "clipped return": f"{state.clipped_return:,.0f}"}
        facts |= {"step": f"{env.episode_length:,}", "epsilon": f"{state.args.eval_epsilon:g}"}
        facts |= {"unique frames": f"{env.unique_frames:.2f}", "lives": str(env.lives)}
        for share, (name, value) in zip((0, 0.18, 0.4, 0.53, 0.68, 0.91), facts.items()):
            x = box.left + round(share * (box.right - box.left))
            canvas.text(name, x, box.top + 16, QUIET)
            canvas.text(value, x, box.top + 45, TEXT, 24, 600)


PANELS = {
    "game": Game,
    "q_values": QValues,
    "frames": Frames,
    "history": History,
    "surprise": Surprise,
    "facts": Facts,
}


class Overlay(gym.Wrapper):
    """Draws the game and what the network thinks of it, in the panels that ``args.panels`` names, 1280x720, RGB.

    Call ``think`` with the values of the state before each ``step``; ``render`` then returns the picture of that
    state (one array, overwritten by the next call). Drawing is left to ``render``: steps that are not recorded cost
    nothing.

    Panels read ``env`` (the game, ``env.stack`` what the network sees of it), ``q_values`` (float32 [actions]),
    ``greedy`` and ``action`` (int), ``saliency`` (float32 [84, 84] or None), ``steps`` (the last 10 seconds, each a
    ``Step``, the current one last), ``clipped_return``, ``subtitle`` and ``args``.
    """

    WIDTH, HEIGHT, MARGIN = 1280, 720, 20

    def __init__(self, env: Atari, subtitle: str, args: Args):
        super().__init__(env)
        self.subtitle, self.args = subtitle, args
        self.panels = {name: PANELS[name]() for name in args.panels or PANELS}
        self.boxes = self.layout()
        self.canvas = Canvas(Game.width if list(self.panels) == ["game"] else self.WIDTH, self.HEIGHT)
        self.new_game()

    def layout(self) -> dict[str, Box]:
        """A box for every panel: the game at the left, the others in rows beside it, in the order given."""
        boxes, rows, left, top = {}, [], self.MARGIN, self.MARGIN
        for name, panel in self.panels.items():
            if name == "game":
                boxes[name] = Box(0, 0, panel.width, panel.height)
                left += panel.width
            elif rows and sum(other.width for other in rows[-1].values()) + panel.width <= 1:
                rows[-1][name] = panel
            else:
                rows.append({name: panel})
        heights = [max(panel.height for panel in row.values()) for row in rows]
        stretch = (self.HEIGHT - self.MARGIN * (len(rows) + 1)) / max(sum(heights), 1)
        for row, height in zip(rows, heights):
            x, bottom = left, top + height * stretch
            width = (self.WIDTH - left - self.MARGIN * len(row)) / sum(panel.width for panel in row.values())
            for name, panel in row.items():
                boxes[name] = Box(round(x), round(top), round(x + panel.width * width), round(bottom))
                x += panel.width * width + self.MARGIN
            top = bottom + self.MARGIN
        return boxes

    def new_game(self) -> None:
        self.steps = deque(maxlen=TRACE_STEPS)
        self.last_return = self.clipped_return = self.reward = 0.0
        self.terminated = False

    def reset(self, **kwargs):
        if self.env.game_ended:
            self.new_game()
        return self.env.reset(**kwargs)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, self.reward, self.terminated, truncated, info = self.env.step(action)
        self.clipped_return += self.reward
        return observation, self.reward, self.terminated, truncated, info

    def think(self, q_values: np.ndarray, action: int, saliency: np.ndarray | None = None) -> None:
        """Notes the network's Q-values (float32 [actions]) of the current state, the action about to be taken and the
        saliency map of the greedy action's Q-value (float32 [84, 84]).

        The surprise is the one-step TD error of the step before as training has it, with the clipped reward and, under
        ``episodic_life``, no value after a lost life, but with the bootstrap of the Q-network itself.
        """
        surprise, reward = 0.0, self.env.episode_return - self.last_return
        life_lost = bool(self.steps) and self.env.lives < self.lives
        if self.steps:
            last, value = self.steps[-1], 0.0 if self.terminated else float(q_values.max())
            surprise = self.reward + self.args.gamma * value - float(last.q_values[last.action])
        self.q_values, self.action, self.greedy, self.saliency = q_values, action, int(np.argmax(q_values)), saliency
        self.steps.append(Step(q_values, action, reward, life_lost, surprise))
        self.last_return, self.lives = self.env.episode_return, self.env.lives

    def render(self) -> np.ndarray:
        height, width, _ = self.canvas.picture.shape
        cv2.rectangle(self.canvas.picture, (0, 0), (width - 1, height - 1), GROUND, -1)
        for name, panel in self.panels.items():
            panel.draw(self.canvas, self.boxes[name], self)
        return self.canvas.picture


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
    env = Overlay(Atari(args), f"{args.exp_name} \u2022 trained {global_step:,} steps", args)
    rng = np.random.default_rng([args.seed, global_step])
    video = run_dir / "videos" / f"{global_step:010d}.mp4"
    recorder = Recorder(video, args.video_length if args.capture_video else 0)
    episodes, action_counts = [], np.zeros(env.action_space.n, np.int64)
    # one array for all: a queue of small ones, made and freed among large buffers, lets the heap grow without end
    last_q_values = np.full((HISTOGRAM_STATES, env.action_space.n), np.nan, np.float32)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    while len(episodes) < args.eval_episodes and not stopped():
        observation = upload(observation, device)
        q_values, action = agent.think(observation)
        saliency, recorded = None, not episodes and recorder.count < recorder.length
        if recorded and args.saliency != "none":
            saliency = SALIENCY[args.saliency](agent.q_network, observation, action)
        if rng.random() < args.eval_epsilon:
            action = int(rng.integers(env.action_space.n))
        env.think(q_values, action, saliency)
        if recorded:
            recorder.write(env)
        last_q_values[action_counts.sum() % HISTOGRAM_STATES] = q_values
        action_counts[action] += 1
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
    if not tracker.working:
        return
    with tracker.guard():
        import wandb

        q_values = last_q_values.astype(float)
        media = {"eval/q_values": wandb.Histogram(q_values[np.isfinite(q_values)])}
        edges = np.arange(len(action_counts) + 1) - 0.5
        media["eval/actions"] = wandb.Histogram(np_histogram=(action_counts, edges))
        table = [[*row, None] for row in zip(returns, lengths, unique_frames)]
        if recorder.count:
            table[0][-1] = wandb.Video(str(video), format="mp4")
            if args.saliency != "none" and "game" in env.boxes:
                left, top, right, bottom = env.boxes["game"]
                media["images/saliency"] = wandb.Image(recorder.still[top:bottom, left:right])
        columns = ["return", "length", "unique_frames", "video"]
        tracker.log(media | {"eval/episodes": wandb.Table(columns, table)}, global_step)


# -------------------------------------------------------------------------------------------------- training


def linear_schedule(start_e: float, end_e: float, duration: float, t: int) -> float:
    return max(start_e + (end_e - start_e) * t / duration, end_e)


def train(args: Args, device: torch.device, run_dir: Path, resume: Path | None) -> int:
    """Trains anew or from the checkpoint ``resume``; returns the exit code, 128 + the signal if one stopped it."""
    keep_freed_memory()
    envs = AtariVector(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")  # TF32, which cuDNN's convolutions use by default

    agent = Agent(args, envs.num_actions, device)
    replay = Replay(args.buffer_size, args.num_envs, args.n_step, args.gamma, find_replay_device(args, device))
    global_step, run_id = 0, None
    if resume:
        checkpoint = load(resume, needs="replay")  # not before the workers fork: they would keep its disk space
        global_step, run_id = checkpoint["global_step"], checkpoint["wandb_run_id"]
        try:
            agent.load_state_dict(checkpoint["agent"])
        except (RuntimeError, ValueError, KeyError) as error:
            sys.exit(f"error: {resume} does not fit the network of this script: {str(error).splitlines()[-1].strip()}")
        replay.load_state_dict(checkpoint["replay"])
        observations = upload(envs.load_state_dict(checkpoint["envs"]), device)
        torch.set_rng_state(checkpoint["torch_rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        del checkpoint  # lets go of the file, so that the next checkpoint frees its space
    else:
        observations = upload(envs.reset(args.seed), device)

    graph = CudaGraph if device.type == "cuda" else lambda function: function
    act = graph(agent.act)
    if replay.device == device:
        learn = graph(lambda: agent.update(*replay.sample(args.batch_size)))
    else:
        update = graph(agent.update)
        learn = lambda: update(*(upload(x, device) for x in replay.sample(args.batch_size)))  # noqa: E731

    tracker = Tracker(args, run_dir, run_id=run_id)
    stop_signals, exit_code = catch_signals(), 1

    def passed(frequency: int) -> int:
        """How many multiples of ``frequency`` the last step of all environments has reached."""
        return global_step // frequency - (global_step - args.num_envs) // frequency if frequency else 0

    def log(metrics: dict) -> None:
        tracker.log(metrics, global_step)

    def save_checkpoint() -> None:
        agent.mean_losses()  # a loss that is not finite ends the run here, before the last checkpoint is replaced
        contents = model(args, agent, global_step) | {"agent": agent.state_dict(), "replay": replay.state_dict()}
        contents |= {"envs": envs.state_dict(), "wandb_run_id": tracker.run_id}
        contents |= {"torch_rng": torch.get_rng_state()}
        contents |= {"cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None}
        save(run_dir / "checkpoint.pt", contents)

    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=None)
    returns, epsilon = deque(maxlen=20), torch.zeros((), device=device)
    exploration_steps = args.exploration_fraction * args.total_timesteps
    clock, clock_step = time.perf_counter(), global_step
    try:
        while global_step < args.total_timesteps and not stop_signals:
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

            # store what was seen and done
            next_observations, rewards, terminated, truncated, games = envs.recv()
            outcome = (upload(x, replay.device) for x in (rewards, terminated, truncated))
            replay.add(observations[:, -1], actions, *outcome)
            observations = upload(next_observations, device)

            # log
            for game in games:
                returns.append(game["r"])
                log({"charts/episodic_return": game["r"], "charts/episodic_length": game["l"],
                     "charts/unique_frames": game["unique_frames"]})  # fmt: skip
            if passed(LOG_FREQUENCY):
                sps = (global_step - clock_step) / (time.perf_counter() - clock)
                log({"charts/SPS": sps, "charts/epsilon": epsilon.item(), "charts/learning_rate": args.learning_rate}
                    | agent.mean_losses())  # fmt: skip
                agent.losses.zero_()
                bar.update(global_step - bar.n)
                recent = f"{np.mean(returns):.1f}" if returns else "-"
                bar.set_postfix_str(f"SPS {sps:.0f}, return {recent}, epsilon {epsilon.item():.2f}")
                clock, clock_step = time.perf_counter(), global_step

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
        envs.close()
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
