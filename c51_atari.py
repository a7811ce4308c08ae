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
"""Categorical DQN (C51) on Atari, in one file.

Bellemare, Dabney and Munos 2017, "A Distributional Perspective on Reinforcement Learning",
https://arxiv.org/abs/1707.06887, with the settings of CleanRL.

    python c51_atari.py --env-id Pong --seed 2
    python c51_atari.py --resume runs/Pong__c51_atari__2__20260131-120000
    python c51_atari.py --evaluate runs/Pong__c51_atari__2__20260131-120000/model.pt
"""

import atexit
import contextlib
import copy
import ctypes
import difflib
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

ALGORITHM = "C51"  # written into checkpoints: those of another algorithm are refused
LOG_FREQUENCY = 1000  # steps between two points of the loss and speed charts
METRICS = ("cross_entropy", "q_values", "greedy_mean", "greedy_std", "mass_at_v_min", "mass_at_v_max")  # in losses/
FIXED_FLAGS = ("env_id", "num_envs", "buffer_size", "n_step", "full_action_space", "precision")  # on --resume
FIXED_FLAGS += ("n_atoms", "v_min", "v_max")
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

    learning_rate: float = 2.5e-4
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
    target_network_frequency: int = 10_000
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
    n_atoms: int = 51
    """returns, evenly spaced from v-min to v-max, to which a distribution gives probabilities"""
    v_min: float = -10.0
    """lowest return of the distributions; what is lower counts as this"""
    v_max: float = 10.0
    """highest return of the distributions; what is higher counts as this"""


def check_args(args: Args) -> None:
    """Ends the program with one sentence if a flag is out of its range."""
    ranges = {"learning_rate exploration_fraction": (1e-12, 1), "num_workers": (0, args.num_envs), "seed": (0, 2**31)}
    ranges["eval_epsilon sticky_actions gamma start_e end_e"] = (0, 1)
    ranges["eval_frequency checkpoint_frequency learning_starts"] = (0, math.inf)
    ranges["video_length eval_episodes total_timesteps num_envs max_episode_frames"] = (1, math.inf)
    ranges["buffer_size n_step batch_size target_network_frequency train_frequency"] = (1, math.inf)
    ranges["n_atoms"], ranges["v_min v_max"] = (2, math.inf), (-1e5, 1e5)
    for names, (low, high) in ranges.items():
        for name in names.split():
            value = getattr(args, name)
            limit = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            if value is not None and not low <= value <= high:
                sys.exit(f"error: --{name.replace('_', '-')} is {value}: it must be {limit}")
    if args.resume and args.evaluate:
        sys.exit("error: --resume trains and --evaluate does not: give one of them")
    if args.v_min >= args.v_max:
        sys.exit(f"error: --v-min {args.v_min} is not below --v-max {args.v_max}: lower it, or raise --v-max")
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
    """The network of Mnih et al. 2015 with a return distribution for every action.

    Observations uint8 [batch, 4, 84, 84] to logits float32 [batch, actions, atoms]; their softmax is the probability
    of each return in ``support`` (float32 [atoms]), which is saved with the weights. ``dtype`` is the precision in
    which the trunk computes; its weights stay float32.
    """

    def __init__(self, num_actions: int, support: torch.Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.register_buffer("support", support)
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
        self.head = nn.Linear(512, num_actions * len(support))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        with torch.autocast(observations.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.trunk(observations.to(self.dtype) / 255)
        return self.head(features.float()).unflatten(1, (-1, len(self.support)))


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


def project(probabilities, returns, discounts, support) -> torch.Tensor:
    """The distribution of ``returns + discounts * Z`` on the support, where Z has ``probabilities`` on it.

    Each atom's probability is shared between the two neighbours of the place it moves to, the nearer one getting
    more; what moves beyond an end stays there (Bellemare et al. 2017, eq. 7). ``probabilities`` and the result are
    float32 [batch, atoms], ``returns`` and ``discounts`` float32 [batch].
    """
    last = len(support) - 1
    atoms = torch.arange(last + 1, device=support.device)
    moved = returns[:, None] + discounts[:, None] * support
    places = ((moved - support[0]) / (support[-1] - support[0]) * last).clamp(0, last)  # in atoms from the first
    shares = (1 - (places[:, None, :] - atoms[:, None]).abs()).clamp(min=0)  # [batch, to, from]
    return (shares * probabilities[:, None, :]).sum(2)  # a matrix product would be TF32 on CUDA


def of_actions(values: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """The rows of one action each: [batch, actions, atoms] to [batch, atoms]."""
    return values.take_along_dim(actions[:, None, None], 1).squeeze(1)


class Agent:
    """Q-network, target network and optimizer. On CUDA, ``act`` and ``update`` are captured as graphs."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.num_actions = num_actions
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.precision]
        support = torch.linspace(args.v_min, args.v_max, args.n_atoms)
        self.q_network = QNetwork(num_actions, support, dtype).to(device)
        self.target_network = QNetwork(num_actions, support, dtype).to(device)
        self.target_network.trunk.to(dtype)  # it is never trained: cast once a copy, not once an update
        self.update_target()
        options = {"fused": True, "capturable": device.type == "cuda"} if device.type != "mps" else {}
        options["eps"] = 0.01 / args.batch_size  # the paper's 0.01 / 32
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), args.learning_rate, **options)
        self.losses = torch.zeros(len(METRICS) + 1, device=device)  # sums over the updates since the last log, count

    @torch.no_grad()
    def act(self, observations: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """Epsilon-greedy actions, int64 [num_envs]."""
        greedy = self.q_values(self.q_network(observations).softmax(2)).argmax(1)
        explore = torch.rand(greedy.shape, device=greedy.device) < epsilon
        return torch.where(explore, torch.randint_like(greedy, self.num_actions), greedy)

    @torch.no_grad()
    def think(self, observation: torch.Tensor) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """What the overlay shows of one observation and the greedy action.

        That is the support, float32 [atoms], and the probabilities of its returns, float32 [actions, atoms].
        """
        probabilities = self.q_network(observation[None])[0].softmax(1).cpu().numpy()
        support = self.q_network.support.cpu().numpy()
        return (support, probabilities), int((probabilities * support).sum(1).argmax())

    def update(self, *batch: torch.Tensor) -> None:
        """One step on the cross entropy between the projected targets of a ``Batch`` and the network's distributions.

        Bellemare et al. 2017, algorithm 1.
        """
        observations, actions, returns, next_observations, discounts = batch
        with torch.no_grad():
            probabilities = self.target_network(next_observations).softmax(2)
            best = of_actions(probabilities, self.q_values(probabilities).argmax(1))
            target = project(best, returns, discounts, self.q_network.support)
        logits = self.q_network(observations)
        loss = F.cross_entropy(of_actions(logits, actions), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            probabilities = logits.softmax(2)
            q_values = self.q_values(probabilities)
            greedy, mean = of_actions(probabilities, q_values.argmax(1)), q_values.amax(1)
            spread = (greedy * (self.q_network.support - mean[:, None]) ** 2).sum(1).sqrt()
            taken = q_values.gather(1, actions[:, None])
            metrics = [taken, mean, spread, greedy[:, 0], greedy[:, -1], torch.ones_like(mean)]
            self.losses += torch.stack([loss, *(metric.mean() for metric in metrics)])

    def q_values(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Means of return distributions: float32 [batch, actions, atoms] to [batch, actions]."""
        return (probabilities * self.q_network.support).sum(2)

    def update_target(self) -> None:
        self.target_network.load_state_dict(self.q_network.state_dict())

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
        self.ranges = deque(maxlen=TRACE_STEPS)  # first and last of their atoms that are worth showing
        self.last_return = 0.0

    def reset(self, **kwargs):
        if self.env.game_ended:
            self.new_game()
        return self.env.reset(**kwargs)

    def think(self, thoughts: tuple[np.ndarray, np.ndarray], action: int) -> None:
        """Notes the return distributions of the current state and the action about to be taken.

        They are the support (float [atoms]) and the probabilities of its returns (float [actions, atoms]).
        """
        self.support, probabilities = thoughts
        self.q_values = (probabilities * self.support).sum(1)
        self.probabilities = np.nan_to_num(probabilities)
        seen = (self.probabilities >= 0.01 * self.probabilities.max()).any(0).nonzero()[0]  # not hair-thin lines
        self.ranges.append((seen[0], seen[-1]))
        self.action, self.greedy = action, int(np.argmax(self.q_values))
        self.values.append(float(self.q_values.max()))
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
        self.draw_distributions(top=104, bottom=414)
        self.draw_trace(self.values, "V(s) = max Q, last 10 s", GREEDY, top=466, bottom=548)
        self.draw_facts(top=581)
        return self.canvas

    def draw_distributions(self, top: int, bottom: int) -> None:
        """One histogram an action, its mean marked, all on one scale and on the part of the support in use lately."""
        self.text("return distribution Z(s, a)", self.LEFT, top - 14, QUIET, 14)
        self.text("mean = Q(s, a)", self.RIGHT, top - 14, QUIET, 14, right=True)
        first = max(min(first for first, _ in self.ranges) - 1, 0)
        last = min(max(last for _, last in self.ranges) + 1, len(self.support) - 1)
        probabilities = self.probabilities[:, first : last + 1]
        half = (self.support[1] - self.support[0]) / 2
        low, high = float(self.support[first] - half), float(self.support[last] + half)
        pitch = (bottom - top) // len(probabilities)
        bottom = top + pitch * len(probabilities)
        size = min(15, pitch - 4)
        left, width = self.LEFT + 130, 220

        def place(value: float) -> int:
            return left + round(width * (min(max(value, low), high) - low) / (high - low))

        power = 10 ** math.floor(math.log10((high - low) / 5))
        step = next(factor * power for factor in (1, 2, 5, 10) if high - low <= 5 * factor * power)
        self.text("future return", self.LEFT, bottom + 16, QUIET, 14)
        for i in range(math.ceil(low / step), math.floor(high / step) + 1):
            x, label = place(i * step), f"{i * step:g}"
            cv2.line(self.canvas, (x, top), (x, bottom), GRID, 1)
            self.text(label, x - 4 * len(label), bottom + 16, QUIET, 14)

        heights = (probabilities / (probabilities.max() or 1.0) * (pitch - 6)).round().repeat(2, axis=1)
        sides = np.linspace(left, left + width, last - first + 2).round().repeat(2)
        for i, (name, value) in enumerate(zip(self.env.action_names, self.q_values.tolist())):
            y = top + (i + 1) * pitch - 3  # the foot of the bars
            greedy = i == self.greedy
            outline = np.stack([sides, y - np.pad(heights[i], 1)], 1).astype(np.int32)
            cv2.fillPoly(self.canvas, [outline], GREEDY if greedy else BAR)
            if math.isfinite(value):
                cv2.rectangle(self.canvas, (place(value), y - pitch + 6), (place(value) + 1, y), TEXT, -1)
            if i == self.action:
                cv2.rectangle(self.canvas, (left - 4, y - pitch + 3), (left + width + 4, y + 2), CHOSEN, 2)
            bold, color = (600, TEXT) if i == self.action or greedy else (400, QUIET)
            self.text(name, self.LEFT, y - (pitch - size) // 2 + 1, color, size, bold)
            self.text(number(value), self.RIGHT, y - (pitch - size) // 2 + 1, color, size, bold, right=True)

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
