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
"""Proximal policy optimization (PPO) on Atari, in one file, on one process or many.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347, with the details
and settings of CleanRL. Under torchrun the environments and minibatches are divided over the processes, which learn
as one.

    python ppo_atari.py --env-id Pong --seed 2
    python ppo_atari.py --resume runs/Pong__ppo_atari__2__20260131-120000
    python ppo_atari.py --evaluate runs/Pong__ppo_atari__2__20260131-120000/model.pt
    torchrun --nproc-per-node 2 --max-restarts 3 ppo_atari.py --env-id Pong --num-envs 64

Unlike the paper but like CleanRL: the value loss is clipped and counts half, the clip range does not shrink, 4 passes
over the steps instead of 3, FIRE at the start of a game or life. Unlike CleanRL: a game cut off at the frame limit
counts on with the value of its last state; zeros before an episode's first frame instead of copies of it, grayscale
before the maximum of two frames instead of after it, no action after that FIRE and no NOOP after a lost life, TF32 on
CUDA and bfloat16 on a CPU that has it (except in the heads). Sticky actions are off even under a name like
ALE/Pong-v5, which has --sticky-actions 0.25 elsewhere.
"""

import atexit
import copy
import ctypes
import difflib
import io
import math
import mmap
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, TypedDict, get_args, get_origin, get_type_hints

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else torch's idle threads spin, on cores that others need

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import nn
from tqdm import tqdm
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ALGORITHM = "PPO"  # written into checkpoints: those of another algorithm are refused
LOG_FREQUENCY = 1000  # steps between two points of the loss and speed charts
FIXED_FLAGS = ("env_id", "exp_name", "seed", "num_envs", "full_action_space")  # on --resume
METRICS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun has started
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # their number
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # their number on this machine
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # how often torchrun has started them anew
cv2.setNumThreads(1)  # a frame is too small to share, and a thread pool does not survive a fork
gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner


@dataclass
class RunFlags:
    exp_name: str = Path(__file__).stem
    """name of the experiment, a part of the run's name"""
    seed: int = 1
    """random seed"""
    total_timesteps: int = 10_000_000
    """steps of the whole run, of all games together; a step is 4 emulator frames"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps ...; auto is the first of cuda, mps and cpu that this machine has"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the network except its heads; auto is bfloat16 on a CPU with instructions for it, else float32"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic algorithms only"""
    run_dir: str = "runs"
    """folder in which each run gets a folder of its own"""
    checkpoint_frequency: int = 500_000
    """steps from one checkpoint to the next; 0 writes one only at the end and when the run is stopped"""
    resume: str | None = None
    """go on with a run, given its folder or checkpoint.pt; its flags hold unless given anew, but not paths and W&B's"""


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
class EvaluationFlags:
    evaluate: str | None = None
    """play this model.pt or checkpoint.pt and train nothing; its flags hold as with --resume"""
    capture_video: bool = True
    """make a video of the first game of each evaluation"""
    video_length: int = 4500
    """longest video in steps, 15 a second; 4500 are 5 minutes"""
    eval_frequency: int = 500_000
    """steps from one evaluation to the next; 0 evaluates only at the end"""
    eval_episodes: int = 5
    """games played in an evaluation"""
    eval_epsilon: float = 0.0
    """probability of a random action in an evaluation; the others are drawn from the policy"""


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
    """longest game in emulator frames, 60 a second; the limit of 30 minutes can be raised"""
    episodic_life: bool = True
    """end an episode of learning when a life is lost; the game goes on"""
    full_action_space: bool = False
    """every action of the joystick (18, in Skiing and LostLuggage 9) instead of those that the game uses"""


@dataclass
class AlgorithmFlags:
    learning_rate: float = 2.5e-4
    """learning rate of Adam; the first one if --anneal-lr is on"""
    anneal_lr: bool = True
    """let the learning rate fall to 0 over --total-timesteps"""
    num_steps: int = 128
    """steps of each game in an iteration"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimates"""
    num_minibatches: int = 4
    """minibatches into which the steps of an iteration are divided"""
    update_epochs: int = 4
    """passes over the steps of an iteration"""
    norm_adv: bool = True
    """normalize the advantages in each minibatch"""
    clip_coef: float = 0.1
    """change of an action's probability, as a ratio, beyond which it gains nothing"""
    clip_vloss: bool = True
    """clip the change of the value as well, at the same number"""
    ent_coef: float = 0.01
    """weight of the entropy in the loss"""
    vf_coef: float = 0.5
    """weight of the value loss in the loss"""
    max_grad_norm: float = 0.5
    """a gradient with a larger norm is scaled down to this"""
    target_kl: float | None = None
    """KL divergence from the old policy after which an iteration makes no further pass; None is no limit"""


@dataclass
class Args(AlgorithmFlags, GameFlags, EvaluationFlags, WandbFlags, RunFlags):
    """All flags. ``--help`` shows them in these groups."""


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
    flag, _, value = word.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    if not isinstance(getattr(Args, name, None), bool) or value.lower() not in ("true", "false"):
        return word
    return flag if value.lower() == "true" else f"--no-{name}"


def parse_args(default: Args | None = None) -> Args:
    """The flags of the command line; those that are not given are as in ``default``.

    Ends the program with one sentence if the game is unknown, or --resume or --evaluate cannot be meant.
    """
    groups = {
        "algorithm": AlgorithmFlags,
        "game": GameFlags,
        "evaluation": EvaluationFlags,
        "W&B": WandbFlags,
        "run": RunFlags,
    }
    default = default or Args()
    types, defaults = {}, {}
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
    args.env_id = game_name(args.env_id)
    return args


def check_args(args: Args) -> None:
    """Ends the program with one sentence if a flag is out of its range."""
    ranges = [
        ("total_timesteps video_length eval_episodes max_episode_frames", 1, 10**12),
        ("checkpoint_frequency eval_frequency", 0, 10**12),
        ("seed", 0, 2**31),
        ("sticky_actions eval_epsilon", 0, 1),
        ("num_envs", 1, 10_000),  # a game takes 1 MB
        ("num_workers", 0, args.num_envs),
        ("learning_rate", 1e-12, 1),
        ("gamma gae_lambda", 0, 1),
        ("num_steps", 1, 100_000),
        ("num_minibatches", 1, 10**6),
        ("update_epochs", 1, 1000),
        ("clip_coef target_kl", 1e-12, 1000),
        ("ent_coef vf_coef", 0, 1000),
        ("max_grad_norm", 1e-12, 10**6),
    ]
    for names, low, high in ranges:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:  # nan is not in any range
                flag = f"--{name.replace('_', '-')}"
                sys.exit(f"error: {flag} is {value:,}: it must be between {low:,} and {high:,}")
    if WORLD_SIZE > 1 and args.evaluate:
        sys.exit("error: --evaluate is for one process: start it without torchrun")
    if args.num_envs % WORLD_SIZE:
        sys.exit(f"error: --num-envs {args.num_envs} cannot be divided among {WORLD_SIZE} ranks: make it a multiple")
    steps = args.num_steps * args.num_envs // WORLD_SIZE
    if steps % args.num_minibatches or steps == args.num_minibatches:
        parts = f"the {steps} steps of an iteration (on each rank) into parts of 2 or more"
        advice = "change it, --num-steps or --num-envs"
        sys.exit(f"error: --num-minibatches {args.num_minibatches} does not divide {parts}: {advice}")


def device_types() -> list[str]:
    """The kinds of device that this machine has, the fastest first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [accelerator.type, "cpu"] if accelerator else ["cpu"]


def find_device(name: str) -> torch.device:
    """The device that ``--device`` means; ends the program if this machine has none such."""
    usable = device_types()
    try:
        device = torch.device(usable[0] if name == "auto" else name)
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


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: to hand it back and to fault it in anew takes a tenth of an update on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # other C libraries have none
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: the highest that it takes
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def guard_streams() -> None:
    """From now on what cannot be printed is lost, no more, and /dev/null stands in for closed standard streams.

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

    Those that are ignored stay so: nohup and scripts have their reasons.
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


# ------------------------------------------------------------------------------------------- Atari environment

STACK = 4  # frames in an observation
SIZE = 84  # height and width of a frame
FRAME_SKIP = 4  # emulator frames in an agent step
NOOP_MAX = 30  # most idle frames at the start of a game


def game_name(env_id: str) -> str:
    """'Breakout' for 'Breakout', 'ALE/Breakout-v5' and 'BreakoutNoFrameskip-v4'.

    Ends the program with the closest names if there is no such game.
    """
    games = [name.removeprefix("ALE/").removesuffix("-v5") for name in gym.registry if name.startswith("ALE/")]
    name = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d)?$", "", env_id)
    if name not in games:
        close = difflib.get_close_matches(name, games) or ["Breakout", "Pong"]
        sys.exit(f"error: --env-id {env_id} is no game here: did you mean {', '.join(close)}?")
    return name


def unwrap(reward: float) -> float:
    """The true points of a step in which the score ran over its last digit, as from 999,950 to 50.

    The emulator reports the difference, -999,900 for 100. A score of 6 digits or more falls by its highest tenth for
    no other reason.
    """
    for limit in (1e5, 1e6, 1e7):
        if -limit < reward <= -0.9 * limit:
            return reward + limit
    return reward


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

    Another environment in its place needs the same methods, and ``game``, ``action_names``, ``stack``, ``lives``,
    ``game_ended``, ``episode_return``, ``episode_length``, ``unique_frames`` and ``recording``.
    """

    def __init__(self, args: Args):
        self.game = game_name(args.env_id)
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
        self.max_episode_frames, self.episodic_life = args.max_episode_frames, args.episodic_life
        self.sticky_actions = args.sticky_actions
        self.last_action = ale_py.Action.NOOP  # the action of the last emulator frame
        self.observation_space = gym.spaces.Box(0, 255, (STACK, SIZE, SIZE), np.uint8)
        self.screens = np.zeros((2, *self.ale.getScreenDims()), np.uint8)  # the last two emulator frames
        self.recording = False  # set it before ``reset``
        self.colors = np.zeros((*self.screens.shape, 3), np.uint8)  # the same in RGB, while recording
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
            self.colors[:] = self.ale.getScreenRGB()
            self.last_action = ale_py.Action.NOOP
            self.game_ended = False
            self.episode_return, self.episode_length = 0.0, 0
            self.frames_seen.clear()
            self._push_frame()
        self.stack[:-1] = 0
        if self.fire_action is not None:
            self._repeat_action(self.fire_action)
            self.stack[:-1] = 0
            if self.game_ended:
                return self.reset()
        self.lives = self.ale.lives()
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
            if frame >= FRAME_SKIP - 2:
                self.ale.getScreenGrayscale(self.screens[FRAME_SKIP - 1 - frame])
        if reward < 0:
            reward = unwrap(reward)
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
            "random": self.np_random.bit_generator.state,
            "last_action": self.last_action.value,
            "screens": self.screens.tobytes(),
            "stack": self.stack.tobytes(),
            "frames_seen": np.array(sorted(self.frames_seen), np.uint32).tobytes(),
            "game_ended": self.game_ended,
            "lives": self.lives,
            "episode_return": self.episode_return,
            "episode_length": self.episode_length,
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where ``state`` was taken; raises an error if it is damaged or of another game."""
        self.ale.act(ale_py.Action.NOOP)  # ale-py 0.12.1 restores some games only into an emulator that has run
        try:
            self.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
        except SystemError:
            raise ValueError("the emulator's state is damaged or of another game") from None
        self.np_random.bit_generator.state = state["random"]
        self.last_action = ale_py.Action(state["last_action"])
        self.screens[:] = np.frombuffer(state["screens"], np.uint8).reshape(self.screens.shape)
        self.stack[:] = np.frombuffer(state["stack"], np.uint8).reshape(self.stack.shape)
        self.frames_seen = set(np.frombuffer(state["frames_seen"], np.uint32).tolist())
        self.game_ended = bool(state["game_ended"])
        self.lives = int(state["lives"])
        self.episode_return = float(state["episode_return"])
        self.episode_length = int(state["episode_length"])
        for name, value in self.state_dict().items():
            lossy = name == "emulator" and self.game == "MiniatureGolf"  # ale-py 0.12.1 loses the count of its strokes
            if value != state[name] and not lossy:
                raise ValueError(f"{name} is damaged or of another game")


# -------------------------------------------------------------------------------------- vector of environments


class EnvSlice:
    """The environments that one process steps, one after another, on their rows of the shared arrays."""

    def __init__(self, args: Args, first: int, last: int, buffers: dict[str, tuple]):
        self.first, self.envs = first, [Atari(args) for _ in range(first, last)]
        self.arrays = {name: array[first:last] for name, array in as_arrays(buffers).items()}

    def send(self, message: tuple[str, list]) -> None:
        """Calls the method named first with the argument that follows; ``recv`` returns the result, as a pipe does.

        What is wrong with a state that cannot be loaded is a result too, a ValueError.
        """
        method, argument = message
        try:
            self.result = getattr(self, method)(argument)
        except Exception as error:
            if method != "load_state_dict":
                raise
            self.result = error if isinstance(error, ValueError) else ValueError(repr(error))

    def recv(self):
        return self.result

    def close(self) -> None:
        pass

    def reset(self, seeds: list[tuple[int, int]]) -> None:
        for env, seed, observation in zip(self.envs, seeds, self.arrays["observations"]):
            observation[:] = env.reset(seed=derive_seed(*seed))[0]

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


def derive_seed(*numbers: int) -> int:
    """A seed made of several numbers: seeds 1 and 2 have no games in common, as ``seed + i`` would."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def as_arrays(buffers: dict[str, tuple]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(raw, dtype).reshape(shape) for name, (raw, dtype, shape) in buffers.items()}


def work(pipe, inherited: list, make_slice, *share) -> None:
    """Body of a worker process: serves a slice until the main process closes the pipe or dies."""
    for number in STOP_SIGNALS:  # terminals and job schedulers signal every process: the main one decides,
        signal.signal(number, signal.SIG_IGN)  # and needs the games for its checkpoint
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

    def reset(self, seed: int, first: int = 0) -> np.ndarray:
        """Starts a new game everywhere; returns the observations.

        ``first`` is the number of the first environment, if these are a share of all that have this ``seed``.
        """
        self._send("reset", [(seed, first + i) for i in range(self.num_envs)])
        self._recv()
        return self.arrays["observations"]

    def state_dict(self) -> list[dict]:
        """The states of all environments; not between ``send`` and ``recv``."""
        self._send("state_dict", [None] * self.num_envs)
        return self._recv()

    def load_state_dict(self, states: list[dict]) -> np.ndarray:
        """Goes on where the states were taken; raises a ValueError if they are damaged or of other games."""
        if len(states) != self.num_envs:
            raise ValueError(f"there are {len(states)} games, not {self.num_envs}")
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
            if isinstance(result, ValueError):
                raise result
            if isinstance(result, Exception):
                sys.exit(f"error: environment worker {i} failed:\n{result}")
            results += result or []
        return results

    def _fail(self, i: int) -> None:
        worker, games = self.workers[i], f"{self.bounds[i]} to {self.bounds[i + 1] - 1}"
        worker.join(timeout=5)
        sys.exit(f"error: environment worker {i} (process {worker.pid}, environments {games}) died with exit code"
                 f" {worker.exitcode}: go on from the last checkpoint with --resume")  # fmt: skip


# ------------------------------------------------------------------------------------------------------ ranks


def own_share(args: Args) -> Args:
    """The flags of this rank: its share of the games and of the processes that run them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_envs = args.num_envs // WORLD_SIZE
    default = min(cores // LOCAL_WORLD_SIZE, num_envs)
    num_workers = default if args.num_workers is None else args.num_workers // WORLD_SIZE
    return replace(args, num_envs=num_envs, num_workers=num_workers)


def halve(share: Args) -> list[Args]:
    """The flags of two halves of the games, or of all together where one process runs them or they cannot be halved."""
    if share.num_workers < 2 or share.num_envs % 2:
        return [share]
    return [replace(share, num_envs=share.num_envs // 2, num_workers=(share.num_workers + i) // 2) for i in range(2)]


def join_ranks(device: torch.device) -> None:
    """Waits for all ranks; after this they can work together."""
    store, _, _ = next(dist.rendezvous("env://"))
    # On one machine, torchrun can start its ranks anew with the store of those before, whose addresses are still there.
    attempt = RESTARTS if LOCAL_WORLD_SIZE == WORLD_SIZE else 0
    store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)


def together(operation, *arguments) -> None:
    """Calls an operation of ``torch.distributed`` that needs all ranks; ends the program if one of them has ended."""
    try:
        operation(*arguments)
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        sys.exit(f"error: rank {RANK} has lost another rank: go on from the last checkpoint with --resume ({reason})")


def gather(item) -> list:
    """The items of all ranks, in their order."""
    items = [item] * WORLD_SIZE
    if WORLD_SIZE > 1:
        together(dist.all_gather_object, items, item)
    return items


def average(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of ``tensor`` over all ranks, in its place."""
    if WORLD_SIZE > 1:
        together(dist.all_reduce, tensor)
        tensor /= WORLD_SIZE
    return tensor


# a folder that each torchrun has of its own, the same for all of its restarts
LAUNCH = os.environ.get("TORCHELASTIC_ERROR_FILE", "").split("attempt_")[0]


def resume_after_restart() -> None:
    """If torchrun has started the ranks anew, adds --resume with the last checkpoint of this launch to the flags."""
    if RESTARTS == 0 or (args := parse_args()).resume:
        return
    runs = Path(args.run_dir).glob(f"{game_name(args.env_id)}__{args.exp_name}__{args.seed}__*/checkpoint.pt")
    for path in sorted(runs, key=os.path.getmtime, reverse=True):
        if LAUNCH in [rank["launch"] for rank in load(path, needs="ranks")["ranks"]]:
            sys.argv += ["--resume", str(path)]
            return


# ---------------------------------------------------------------------------------------------------- network

BLOCK = 4  # height and width of a block of pixels, the stride of the first convolution


def as_blocks(observations: torch.Tensor) -> torch.Tensor:
    """Observations uint8 [batch, 4, 84, 84] with the 16 pixels of each block as channels: [batch, 64, 21, 21].

    A convolution of 8x8 with stride 4 is one of 2x2 on blocks, and faster on 64 channels than on 4. This is what
    ``pixel_unshuffle`` does, but channels_last and in a fraction of its time: the 4 pixels of a row move as one int32.
    """
    rows = observations.view(torch.int32).unflatten(2, (-1, BLOCK))  # batch, frame, y, pixel y, x
    return rows.permute(0, 2, 4, 1, 3).flatten(3).view(torch.uint8).movedim(-1, 1)


class ActorCritic(nn.Module):
    """The network of Mnih et al. 2015 with two heads: blocks uint8 [batch, 64, 21, 21] to logits and values.

    The logits are those of the policy, float32 [batch, actions], the values float32 [batch]. ``dtype`` is the precision
    in which all but the heads compute; the weights stay float32.
    """

    def __init__(self, num_actions: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.first = nn.Conv2d(STACK * BLOCK**2, 32, 2)  # 8x8 with stride 4 in pixels
        self.convolutions = nn.Sequential(
            nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=1), nn.ReLU()
        )
        self.hidden = nn.Sequential(nn.Linear(7 * 7 * 64, 512), nn.ReLU())
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)
        gains = {self.actor: 0.01, self.critic: 1.0}  # a policy that is almost uniform at the start
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(blocks.device.type, self.dtype, enabled=self.dtype != torch.float32):
            # the weights are divided instead of the pixels: these are exact in bfloat16 as they are, and many more
            maps = nn.functional.conv2d(blocks.to(self.dtype), self.first.weight / 255, self.first.bias)
            features = self.hidden(self.convolutions(maps).movedim(1, -1).flatten(1))  # channels last: not copied
        return self.actor(features.float()), self.critic(features.float()).squeeze(1)


# ---------------------------------------------------------------------------------------------------- rollout


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


class Minibatch(NamedTuple):
    blocks: torch.Tensor  # uint8 [size, 64, 21, 21]
    actions: torch.Tensor  # int64 [size]
    logprobs: torch.Tensor  # float32 [size], of the actions under the policy that drew them
    values: torch.Tensor  # float32 [size], as they were estimated then
    returns: torch.Tensor  # float32 [size], what the values are to be


class Rollout:
    """An iteration's steps on ``device``: row t of each array is step t of all environments.

    ``blocks`` and ``values`` have one row more, for the state that the next iteration starts from. The blocks of the
    observations are channels_last in memory, as the first convolution wants them: not reordered in every epoch.
    """

    def __init__(self, num_steps: int, num_envs: int, gamma: float, gae_lambda: float, device: torch.device):
        check_memory(f"--num-steps {num_steps}", num_steps * num_envs * STACK * SIZE**2, device)
        self.gamma, self.gae_lambda = gamma, gae_lambda
        shape, longer = (num_steps, num_envs), (num_steps + 1, num_envs)
        height, channels = SIZE // BLOCK, STACK * BLOCK**2
        self.blocks = torch.zeros(*longer, height, height, channels, dtype=torch.uint8, device=device).movedim(-1, 2)
        self.values = torch.zeros(longer, device=device)
        self.actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs, self.advantages, self.returns = (torch.zeros(shape, device=device) for _ in range(3))
        # these come from the emulators, and stay in main memory until the iteration ends
        self.rewards, self.ends = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)

    def columns(self, first: int, last: int) -> "Rollout":
        """The part of the environments ``first`` to ``last`` - 1, in the same memory."""
        part = copy.copy(self)
        part.apply(lambda array: array[:, first:last])
        return part

    def apply(self, function) -> None:
        """Replaces every array by what ``function`` makes of it."""
        for name, array in vars(self).items():
            if isinstance(array, torch.Tensor):
                setattr(self, name, function(array))

    def estimate_advantages(self, rewards: torch.Tensor, ends: torch.Tensor) -> None:
        """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16).

        ``rewards`` are float32 and ``ends`` bool, [num_steps, num_envs]; an end is a step after which nothing more is
        to be had. The reward of a step that was truncated includes the discounted value of the state it led to.
        """
        discounts = self.gamma * ~ends
        deltas = rewards + discounts * self.values[1:] - self.values[:-1]
        advantages = torch.zeros_like(deltas[0])
        for step in reversed(range(len(deltas))):
            advantages = deltas[step] + self.gae_lambda * discounts[step] * advantages
            self.advantages[step] = advantages
        torch.add(self.advantages, self.values[:-1], out=self.returns)

    def minibatch(self, indices: torch.Tensor) -> Minibatch:
        """The steps with the numbers ``indices`` (int64 [size]), counted row by row."""
        arrays = (self.blocks[:-1].movedim(2, -1), self.actions, self.logprobs, self.values[:-1], self.returns)
        blocks, *others = (array.flatten(0, 1).index_select(0, indices) for array in arrays)
        return Minibatch(blocks.movedim(-1, 1), *others)


def deviations(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, size] less their means, which are taken over the rows of all ranks, as are all statistics."""
    return rows - average(rows.mean(1, keepdim=True))


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, size] with mean 0 and standard deviation 1 each."""
    rows, count = deviations(rows), rows.shape[1] * WORLD_SIZE
    variances = average(rows.square().mean(1, keepdim=True)) * count / (count - 1)
    return rows / (variances.sqrt() + 1e-8)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """The share of the returns' variance that the values foresaw: 1 for perfect ones, 0 for the best constant."""
    rows = deviations(torch.stack([returns.flatten(), (returns - values).flatten()]))
    variance, unexplained = average(rows.square().mean(1)).tolist()
    return 1 - unexplained / variance if variance else math.nan


# ---------------------------------------------------------------------------------------------------- learner


class Agent:
    """Network and optimizer. On CUDA, acting and both halves of an update are captured as graphs."""

    def __init__(self, args: Args, num_actions: int, device: torch.device):
        self.args = args
        self.precision = find_precision(args.precision, device)
        dtype = getattr(torch, self.precision)
        self.network = ActorCritic(num_actions, dtype).to(device)
        self.learning_rate = torch.tensor(args.learning_rate, device=device)  # a graph would keep a number as it is
        options = {"fused": True, "capturable": device.type == "cuda"} if device.type != "mps" else {}
        self.optimizer = torch.optim.Adam(self.network.parameters(), self.learning_rate, eps=1e-5, **options)
        self.metrics = torch.zeros(len(METRICS), device=device)  # of the last minibatch
        self.losses = torch.zeros(len(METRICS) + 1, device=device)  # sums of the metrics since the last log, count

    @torch.no_grad()
    def act(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions drawn from the policy, int64, their log probabilities and the values, float32, all [num_envs]."""
        logits, values = self.network(blocks)
        log_policy = logits.log_softmax(1)
        gumbel = -torch.empty_like(logits).exponential_().log()
        actions = (log_policy + gumbel).argmax(1)
        return actions, log_policy.gather(1, actions[:, None]).squeeze(1), values

    @torch.no_grad()
    def value(self, blocks: torch.Tensor) -> torch.Tensor:
        """Values, float32 [num_envs]."""
        return self.network(blocks)[1]

    @torch.no_grad()
    def think(self, observation: torch.Tensor, rng: np.random.Generator) -> tuple[tuple[np.ndarray, float], int]:
        """What the overlay shows of one observation and an action drawn from the policy.

        That is the probability of each action, float32 [actions], and the value.
        """
        logits, value = self.network(as_blocks(observation[None]))
        log_policy = logits[0].log_softmax(0).cpu().numpy()
        action = int((log_policy + rng.gumbel(size=len(log_policy))).argmax())
        return (np.exp(log_policy), value.item()), action

    def compute_gradients(self, blocks, actions, logprobs, values, returns, advantages) -> None:
        """Gradients of the loss (Schulman et al. 2017, eq. 7 and 9) of a ``Minibatch`` and its advantages [size]."""
        args = self.args
        logits, new_values = self.network(blocks)
        log_policy = logits.log_softmax(1)
        log_ratio = log_policy.gather(1, actions[:, None]).squeeze(1) - logprobs
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
        entropy = -(log_policy.exp() * log_policy).sum(1).mean()
        value_errors = (new_values - returns).square()
        if args.clip_vloss:
            clipped_values = values + (new_values - values).clamp(-args.clip_coef, args.clip_coef)
            value_errors = torch.max(value_errors, (clipped_values - returns).square())
        value_loss = 0.5 * value_errors.mean()
        loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            approx_kl = (ratio - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
            clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
            metrics = (policy_loss, value_loss, entropy, -log_ratio.mean(), approx_kl, clipfrac)
            torch.stack(metrics, out=self.metrics)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Gradients and metrics become their means over all ranks, in one all-reduce."""
        if WORLD_SIZE > 1:
            tensors = [*(parameter.grad for parameter in self.network.parameters()), self.metrics]
            flat = average(torch.cat([tensor.flatten() for tensor in tensors]))
            for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(mean.view_as(tensor))

    def apply_gradients(self) -> None:
        """Adam's step along the gradients."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.losses[:-1] += self.metrics
        self.losses[-1] += 1

    def mean_losses(self) -> dict[str, float]:
        """Means since ``losses`` was last set to zero; ends the program if the loss is not finite."""
        *sums, count = self.losses.tolist()
        if not math.isfinite(loss := sums[0] + sums[1]):
            sys.exit(f"error: the loss became {loss}: go on from the last checkpoint with a lower --learning-rate")
        return {f"losses/{name}": total / count for name, total in zip(METRICS, sums)} if count else {}

    def state_dict(self) -> dict:
        parts = ("network", "optimizer")
        return {name: getattr(self, name).state_dict() for name in parts} | {"losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        load_moments(self.optimizer, state["optimizer"])
        fill(self.losses, state["losses"])


def fill(ours: torch.Tensor | dict, saved: torch.Tensor | dict) -> None:
    """Copies a saved tensor, or each of a dictionary, into ours; raises an error if a name, shape or dtype differs."""
    if isinstance(ours, dict):
        if set(ours) != set(saved):
            raise KeyError(f"{list(saved)} are saved where {list(ours)} belong")
        for name, tensor in ours.items():
            fill(tensor, saved[name])
    elif not isinstance(saved, torch.Tensor) or saved.shape != ours.shape or saved.dtype != ours.dtype:
        raise ValueError(f"what is saved is no {ours.dtype} {list(ours.shape)}")
    else:
        ours.copy_(saved)


def load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Takes over the moments of a ``state_dict``, not its options: those are of this start and of this device."""
    if saved["state"] and not optimizer.state:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes the moments as this device needs them; gradients of zero move no parameter
        optimizer.zero_grad()
    fill(optimizer.state_dict()["state"], saved["state"])


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


def share_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` in memory that this process shares with those which it forks from now on."""
    memory = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``array`` on the device; on CUDA it is made without waiting."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone().to(device)


# ---------------------------------------------------------------------------------------------------- players


class Player(EnvSlice):
    """Plays the environments ``first`` to ``last`` - 1 of this rank with the policy, into their columns of the rollout.

    They are those of ``vectors``: while the emulators of one run, the policy computes for another. Without vectors they
    run in this process.
    """

    def __init__(self, agent, rollout, vectors: list[AtariVector] | None, args: Args, first: int, last: int, _):
        self.rollout = rollout.columns(first, last)
        self.device = rollout.values.device
        vectors = vectors or [AtariVector(replace(args, num_envs=last - first, num_workers=0))]
        size = vectors[0].num_envs
        self.halves = [(envs, slice(i * size, (i + 1) * size)) for i, envs in enumerate(vectors)]
        first_of_all = RANK * args.num_envs + first
        torch.manual_seed(derive_seed(args.seed, first_of_all))  # every player draws its own actions
        graph = CudaGraph if self.device.type == "cuda" else lambda function: function
        self.act, self.value = graph(agent.act), graph(agent.value)
        # inside another autocast a weight is cast once, not at every step; a graph would go on with the first cast
        self.casts_kept = torch.autocast("cpu", enabled=False) if self.device.type == "cpu" else nullcontext()

    def reset(self, seeds: list[tuple[int, int]]) -> None:
        for envs, columns in self.halves:
            self.observe(-1, columns, envs.reset(*seeds[columns.start]))

    def observe(self, step: int, columns: slice, observations: np.ndarray) -> None:
        self.rollout.blocks[step, columns] = as_blocks(upload(observations, self.device))

    def play(self, _) -> list[dict]:
        """Plays an iteration; returns the games that ended, each with the number of its last step, from 1 on."""
        rollout, num_steps, games = self.rollout, len(self.rollout.actions), []
        rewards, ends = rollout.rewards.numpy(), rollout.ends.numpy()
        rollout.blocks[0] = rollout.blocks[-1]
        with self.casts_kept:
            for step in range(num_steps + 1):
                for envs, columns in self.halves:
                    if step > 0:
                        observations, rewards[step - 1, columns], terminated, truncated, ended = envs.recv()
                        self.observe(step, columns, observations)
                        ends[step - 1, columns] = terminated | truncated
                        cut_off = truncated & ~terminated
                        if cut_off.any():  # its last state's value stands for the rewards that the game still had
                            final_blocks = as_blocks(upload(envs.arrays["final_observations"], self.device))
                            final_values = self.value(final_blocks).cpu().numpy()
                            rewards[step - 1, columns] += rollout.gamma * final_values * cut_off
                        games += [game | {"step": step} for game in ended]
                    if step < num_steps:
                        actions, logprobs, values = self.act(rollout.blocks[step, columns])
                        envs.send(actions.cpu().numpy())
                        rollout.actions[step, columns], rollout.logprobs[step, columns] = actions, logprobs
                        rollout.values[step, columns] = values
                    else:
                        rollout.values[step, columns] = self.value(rollout.blocks[step, columns])
        return games

    def state_dict(self, _) -> list[dict]:
        states = sum((envs.state_dict() for envs, _ in self.halves), [])
        states[0]["policy_random"] = torch.get_rng_state().numpy().tobytes()
        return states

    def load_state_dict(self, states: list[dict]) -> None:
        for envs, columns in self.halves:
            self.observe(-1, columns, envs.load_state_dict(states[columns]))
        if "policy_random" in states[0]:  # otherwise the games were divided among other players
            torch.set_rng_state(torch.frombuffer(bytearray(states[0]["policy_random"]), dtype=torch.uint8))

    def close(self) -> None:
        for envs, _ in self.halves:
            envs.close()


class Players(AtariVector):
    """The players of this rank: one in each of ``num_workers`` processes, which see every update, or one in this."""

    def __init__(self, args: Args, agent: Agent, rollout: Rollout, vectors: list[AtariVector] | None):
        self.make_slice = partial(Player, agent, rollout, vectors)
        super().__init__(args)

    def play(self) -> list[dict]:
        """Plays an iteration into the rollout; returns the games that ended, in their order in time."""
        self._send("play", [None] * self.num_envs)
        return sorted(self._recv(), key=lambda game: game["step"])


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
    sys.exit(f"error: OpenCV 5 is needed and cv2 is {cv2.__version__}: pip uninstall opencv-python,"
             " then pip install --force-reinstall --no-deps opencv-python-headless")  # fmt: skip
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
    """The lowest finite value and the highest, or what is ``least`` above the lowest if that is more.

    ``least`` is a share of the largest value if that is above 1.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        finite = np.zeros(1)
    low = float(finite.min())
    high = float(finite.max())
    span = least * max(1.0, abs(low), abs(high))
    return low, max(high, low + span)


class Overlay(gym.Wrapper):
    """Draws the game beside what the network thinks of it, 960x630, RGB.

    Call ``think`` with the values of the state before each ``step``; ``render`` then returns the picture of that
    state (one array, overwritten by the next call). Once the game has ended it returns the picture of its end, which
    nobody thought about. Drawing is left to ``render``: steps that are not recorded cost nothing.
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
        self.entropies = deque(maxlen=TRACE_STEPS)  # of the policy in each of them
        self.returns = deque(maxlen=TRACE_STEPS)  # return of the game up to each of them

    def reset(self, **kwargs):
        new_game = self.env.game_ended
        outcome = self.env.reset(**kwargs)
        if new_game:
            self.new_game()
            self.has_lives = self.env.lives > 0
        return outcome

    def step(self, action: int):
        observation, reward, terminated, self.truncated, info = self.env.step(action)
        return observation, reward, terminated, self.truncated, info

    def think(self, thoughts: tuple[np.ndarray, float], action: int) -> None:
        """Notes the probability of each action in the current state, its value and the action about to be taken."""
        self.probabilities, value = thoughts
        self.action = action
        self.greedy = int(np.argmax(self.probabilities))
        self.values.append(value)
        self.entropies.append(-float((self.probabilities * np.log(self.probabilities + 1e-12)).sum()))
        self.returns.append(self.env.episode_return)

    def render(self) -> np.ndarray:
        self.draw_game()
        if self.env.game_ended:
            self.draw_end()
        else:
            self.draw_policy(top=104, bottom=394)
        self.draw_trace(self.values, "V(s), last 10 s", GREEDY, top=434, bottom=480)
        span = (0.0, math.log(self.env.action_space.n))  # of a certain and of a uniform policy
        self.draw_trace(self.entropies, "entropy, last 10 s", GREEDY, top=514, bottom=550, span=span)
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

    def draw_policy(self, top: int, bottom: int) -> None:
        """One bar an action, as long as the action is probable."""
        key = {"most probable": GREEDY, "taken": CHOSEN}
        self.title(top - 14, "actions", "probability", key)
        pitch = min(36, (bottom - top) // len(self.probabilities))
        size = min(15, pitch - 3)
        left = self.LEFT + 130
        width = 240
        for i, value in enumerate(self.probabilities.tolist()):
            y = top + i * pitch
            self.box(left, y + 3, left + width, y + pitch - 4, GRID)
            if value > 0:
                color = GREEDY if i == self.greedy else BAR
                self.box(left, y + 3, left + round(width * value), y + pitch - 4, color)
            if i == self.action:
                self.box(left - 4, y, left + width + 4, y + pitch - 1, CHOSEN, 2)
            self.label(i, value, y + (pitch + size) // 2 - 2, size)

    def draw_trace(self, values: deque, title: str, color: tuple, top: int, bottom: int, span=None) -> None:
        """Values of the last seconds on the axis ``span``; a line at a state is the reward that its action brought."""
        values = np.array(values)
        low, high = span or finite_range(values, TRACE_SPAN)
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
            "unique frames": f"{env.unique_frames:.2f}",
        }
        if self.has_lives:
            facts["lives"] = str(env.lives)
        columns = (0, 100, 180, 262, 392)
        for column, (name, value) in zip(columns, facts.items()):
            self.text(name, self.LEFT + column, top, QUIET, 14)
            self.text(value, self.LEFT + column, top + 23, TEXT, 18, 600)

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

    def title(self, y: int, text: str, figure: str, key: dict) -> None:
        """Heads a part: its name, words in the colors that they explain, a figure at the right."""
        x = self.text(text, self.LEFT, y, QUIET, 14)
        for word, color in key.items():
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
        self.count = 0  # pictures written
        self.still = None  # one of the last of them
        self.ffmpeg = None

    @property
    def active(self) -> bool:
        return self.count < self.length

    def write(self, env: Overlay) -> None:
        """Adds one picture of ``env``, unless the video is closed, has failed or has its full length."""
        if not self.active:
            return
        if self.count + 1 == self.length and not env.env.game_ended:
            env.notice = "the video is cut here"
            say(f"{self.path} is cut after {self.length:,} steps, the game goes on: see more with --video-length")
        picture = env.render()
        try:
            if self.ffmpeg is None:
                self.start(picture)
            self.ffmpeg.stdin.write(picture)
        except BrokenPipeError:
            self.close()  # asks ffmpeg what happened
        except Exception as error:
            self.fail(error)
        else:
            if self.count % 100 == 0:
                self.still = picture.copy()
            self.count += 1

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
        self.length = self.count
        if self.ffmpeg:
            _, complaint = self.ffmpeg.communicate()
            if self.ffmpeg.returncode:
                *_, last_line = ["", *complaint.decode(errors="replace").splitlines()]
                self.fail(f"ffmpeg ended with {self.ffmpeg.returncode} {last_line}")
            self.ffmpeg = None

    def fail(self, reason) -> None:
        say(f"warning: no video {self.path}: {reason}", file=sys.stderr)
        self.length = self.count = 0


# ------------------------------------------------------------------------------------------------ checkpoints

# never taken from a file, which may be a stranger's: paths, addresses and accounts
LOCAL_FLAGS = ("run_dir", "resume", "evaluate", "wandb_mode", "wandb_project_name", "wandb_entity", "wandb_group")


def make_run_dir(args: Args) -> Path:
    """Makes the folder of a run and returns its path; starts in the same second get different names."""
    start_time = time.strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id}__{slug(args.exp_name)}__{args.seed}__{start_time}"
    path = Path(args.run_dir) / name
    number = 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = path.with_name(f"{name}-{number}")
        except OSError as error:
            sys.exit(f"error: the run folder {path} cannot be made: {error.strerror}")


def lock(run_dir: Path) -> None:
    """Keeps a run's folder for this process until it ends; ends the program if another process has it.

    Call it after the workers have forked: they inherit open files, and would keep the lock of a main process that died.
    """
    if fcntl is not None:
        folder = os.open(run_dir, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: another process is training the run in {run_dir}: wait for its end, or stop it")
        except OSError:  # a file system without locks
            pass
    for half_written in run_dir.glob("*.tmp"):  # by a process that was killed
        half_written.unlink()


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
        say(f"warning: {path} was not written, what was there before is kept: {reason}", file=sys.stderr)
        with suppress(OSError):
            beside.unlink()
        return False


def header(args: Args, global_step: int) -> dict:
    """What every checkpoint and every model begins with."""
    script = Path(__file__).name
    return {"algorithm": ALGORITHM, "script": script, "args": asdict(args), "global_step": global_step}


def model(args: Args, agent: Agent, global_step: int) -> dict:
    """What ``--evaluate`` needs."""
    return header(args, global_step) | {"agent": {"network": agent.network.state_dict()}}


def load(path: Path, part: str) -> dict:
    """Opens a checkpoint or a model; ends the program if it is missing, of another algorithm or lacks ``part``.

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
    if part not in contents:
        sys.exit(f"error: {path} has no {part}: --resume needs a checkpoint.pt, a model.pt is for --evaluate")
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
    """``isinstance`` for the type of a flag, which may be a ``Literal``."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return isinstance(value, hint)


def read_flags(path: Path, part: str) -> Args:
    """The flags in a checkpoint or a model but for ``LOCAL_FLAGS``; ends the program if the file is damaged."""
    contents = load(path, part)
    if not is_intact(path):
        sys.exit(f"error: {path} is damaged: use another one")
    saved, types = Args(), get_type_hints(Args)
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
        say(f"this machine has no {saved.device}, where the run was: --device is auto")
        saved.device = "auto"
    return saved


def random_state(device: torch.device) -> dict:
    """The states of torch's random number generators, of the CPU and of a GPU."""
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda_state}


def load_random_state(state: dict, device: torch.device) -> None:
    """A run that moves between a CPU and a GPU goes on with the seed there."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_resume(args: Args, saved: Args, path: Path) -> None:
    """Ends the program if a flag cannot change on ``--resume``, or if the run is finished."""
    for name in FIXED_FLAGS:
        if getattr(args, name) != getattr(saved, name):
            sys.exit(f"error: --{name.replace('_', '-')} cannot change on --resume: it was {getattr(saved, name)}")
    if args.run_dir != Args.run_dir:
        sys.exit("error: --run-dir cannot act on --resume: a run goes on in its own folder")
    contents = load(path, "agent")
    step, model_path = contents["global_step"], path.parent / "model.pt"
    if step > args.total_timesteps or (step == args.total_timesteps and model_path.exists()):
        sys.exit(f"error: {path} is at step {step:,} of --total-timesteps {args.total_timesteps:,}: raise it to go on,"
                 f" or play the model with --evaluate {path.parent}")  # fmt: skip
    if contents["script"] != Path(__file__).name:
        say(f"warning: {path} was written by {contents['script']}, this is {Path(__file__).name}", file=sys.stderr)
    for name in LOCAL_FLAGS:
        before, now = contents["args"].get(name), getattr(args, name)
        if name.startswith("wandb") and before != now:
            say(f"note: --{name.replace('_', '-')} is {now}, it was {before}: no file decides where a run is logged")


def how_to_go_on(run_dir: Path, global_step: int, saved_step: int | None) -> str:
    """What is left of a run that was stopped."""
    if (run_dir / "model.pt").is_file():
        return f"stopped in the last evaluation; play the model with: --evaluate {run_dir / 'model.pt'}"
    if not (run_dir / "checkpoint.pt").is_file():
        return f"stopped at step {global_step:,}; nothing could be saved"
    if saved_step == global_step:
        return f"stopped at step {global_step:,}; go on with: --resume {run_dir}"
    return f"stopped at step {global_step:,}, which could not be saved; go on from an earlier one: --resume {run_dir}"


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
            group=args.wandb_group or f"{args.env_id}__{slug(args.exp_name)}",
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


def episode_means(prefix: str, games: list[dict]) -> dict[str, float]:
    """The charts of games that have ended, each the mean over them."""
    names = {"r": "episodic_return", "l": "episodic_length", "unique_frames": "unique_frames"}
    return {f"{prefix}/{name}": float(np.mean([game[key] for game in games])) for key, name in names.items()}


def evaluate(args: Args, agent: Agent, device, global_step: int, run_dir: Path, tracker, stopped=lambda: False) -> None:
    """Plays whole games, records the first, prints and logs the results.

    All its random states are its own, so that training does not depend on when it is evaluated. A true ``stopped()``
    ends it early, without results.
    """
    game = Atari(args)
    env = Overlay(game, f"{args.exp_name} \u2022 trained {global_step:,} steps", args.eval_epsilon)
    rng = np.random.default_rng([args.seed, global_step])
    video = run_dir / "videos" / f"{global_step:010d}.mp4"
    recorder = Recorder(video, args.video_length if args.capture_video else 0)
    game.recording = recorder.active
    episodes = []
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    while len(episodes) < args.eval_episodes and not stopped():
        thoughts, action = agent.think(upload(observation, device), rng)
        if rng.random() < args.eval_epsilon:
            action = int(rng.integers(env.action_space.n))
        env.think(thoughts, action)
        recorder.write(env)
        observation, _, terminated, truncated, info = env.step(action)
        if info:  # the end of the game is the last picture
            recorder.write(env)
            recorder.close()
            episodes.append(info["episode"])
        game.recording = recorder.active
        if terminated or truncated:
            observation, _ = env.reset()
    recorder.close()
    if len(episodes) < args.eval_episodes:
        return
    returns = [episode["r"] for episode in episodes]
    mean, spread = float(np.mean(returns)), float(np.std(returns))
    say(f"step {global_step:,}: return {mean:,.1f} \u00b1 {spread:,.1f} over {len(episodes)} games")
    tracker.log(episode_means("eval", episodes) | {"eval/episodic_return_std": spread}, global_step)
    if recorder.count:
        tracker.log_video(video, recorder.still, global_step)


# -------------------------------------------------------------------------------------------------- training


def train(args: Args, device: torch.device, run_dir: Path, resume: Path | None) -> int:
    """Trains anew or from the checkpoint ``resume``; returns the exit code, 128 + the signal if one stopped it.

    Every rank runs this with its share of the environments; what is logged, evaluated and saved is left to rank 0.
    """
    keep_freed_memory()
    all_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    share = own_share(args)
    # on a CPU the processes that run the games choose the actions too; elsewhere torch does not survive a fork
    in_processes = device.type == "cpu" and sys.platform == "linux"
    vectors = None if in_processes else [AtariVector(half) for half in halve(share)]
    set_up_torch(replace(args, seed=args.seed + RANK), device)

    agent = Agent(args, int(Atari(args).action_space.n), device)
    rollout = Rollout(args.num_steps, share.num_envs, args.gamma, args.gae_lambda, device)
    if in_processes:
        rollout.apply(share_memory)
        for parameter in agent.network.parameters():
            parameter.data = share_memory(parameter.data)
    players = Players(share if in_processes else replace(share, num_workers=0), agent, rollout, vectors)
    if RANK == 0:
        lock(run_dir)
    if WORLD_SIZE > 1:
        join_ranks(device)
    global_step, saved_step, run_id = 0, None, None
    if resume:
        checkpoint = load(resume, part="ranks")  # not before the workers fork: they would keep its disk space
        try:
            own = checkpoint["ranks"][RANK]
            global_step = saved_step = checkpoint["global_step"]
            agent.load_state_dict(checkpoint["agent"])
            players.load_state_dict(own["envs"])
            load_random_state(own["random"], device)
            if global_step % args.num_envs > 0:
                raise ValueError(f"its global_step is {global_step} with {args.num_envs} games")
            run_id = slug(checkpoint["wandb_run_id"]) if checkpoint["wandb_run_id"] else None
            if checkpoint["precision"] != agent.precision and RANK == 0:
                say(f"the precision is {agent.precision} here; it was {checkpoint['precision']}")
        except Exception as error:
            refuse(resume, error)
        del checkpoint, own  # lets go of the file, so that the next checkpoint frees its space
    else:
        for parameter in agent.network.parameters() if WORLD_SIZE > 1 else ():
            together(dist.broadcast, parameter.data, 0)
        players.reset(args.seed, RANK * share.num_envs)

    graph = CudaGraph if device.type == "cuda" else lambda function: function
    estimate_advantages = graph(rollout.estimate_advantages)
    compute_gradients = graph(lambda indices, x: agent.compute_gradients(*rollout.minibatch(indices), x))
    apply_gradients = graph(agent.apply_gradients)

    tracker = Tracker(args if RANK == 0 else replace(args, wandb_mode="disabled"), run_dir, run_id=run_id)
    stop_signals = catch_signals()
    exit_code = 1

    def passed(frequency: int) -> int:
        """How many multiples of ``frequency`` the last iteration has reached."""
        before = global_step - args.num_steps * args.num_envs
        return global_step // frequency - before // frequency if frequency else 0

    def save_checkpoint() -> None:
        nonlocal saved_step
        agent.mean_losses()  # a loss that is not finite ends the run here, before the last checkpoint is replaced
        own = {"envs": players.state_dict(), "launch": LAUNCH, "random": random_state(device)}
        ranks = gather(own)
        if RANK == 0:
            contents = header(args, global_step) | {"precision": agent.precision, "wandb_run_id": tracker.run_id}
            contents |= {"agent": agent.state_dict(), "ranks": ranks}
            if save(run_dir / "checkpoint.pt", contents):
                saved_step = global_step

    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=True if RANK else None)
    returns, signals = deque(maxlen=20), []
    clock, clock_step = time.perf_counter(), global_step
    try:
        while global_step < args.total_timesteps and not signals:
            # play
            torch.set_num_threads(1)  # threads that wait for work spin, on cores that the emulators need
            games = [game | {"global_step": global_step + game["step"] * args.num_envs} for game in players.play()]
            global_step += args.num_steps * args.num_envs

            # learn
            torch.set_num_threads(all_threads)
            estimate_advantages(upload(rollout.rewards, device), upload(rollout.ends, device))
            remaining = 1 - (global_step - args.num_steps * args.num_envs) / args.total_timesteps
            agent.learning_rate.fill_(args.learning_rate * (remaining if args.anneal_lr else 1))
            for _ in range(args.update_epochs):
                indices = torch.randperm(rollout.ends.numel(), device=device).view(args.num_minibatches, -1)
                advantages = rollout.advantages.flatten()[indices]
                for minibatch in zip(indices, normalize(advantages) if args.norm_adv else advantages):
                    compute_gradients(*minibatch)
                    agent.average_gradients()
                    apply_gradients()
                if args.target_kl and agent.metrics[METRICS.index("approx_kl")].item() > args.target_kl:
                    break

            # log
            games = sorted(sum(gather(games), []), key=lambda game: game["global_step"])
            returns.extend(game["r"] for game in games)
            for step, group in groupby(games, key=lambda game: game["global_step"]):
                tracker.log(episode_means("charts", list(group)), step)
            if passed(LOG_FREQUENCY):
                sps = (global_step - clock_step) / (time.perf_counter() - clock)
                explained = {"losses/explained_variance": explained_variance(rollout.values[:-1], rollout.returns)}
                charts = {"charts/SPS": sps, "charts/learning_rate": agent.learning_rate.item()}
                tracker.log(charts | agent.mean_losses() | explained, global_step)
                agent.losses.zero_()
                bar.update(global_step - bar.n)
                recent = f"{np.mean(returns):.1f}" if returns else "-"
                bar.set_postfix_str(f"SPS {sps:.0f}, return {recent}")
                clock, clock_step = time.perf_counter(), global_step

            pause = time.perf_counter()
            if passed(args.checkpoint_frequency):
                save_checkpoint()
            if passed(args.eval_frequency) and global_step < args.total_timesteps and RANK == 0:
                evaluate(args, agent, device, global_step, run_dir, tracker, stopped=lambda: stop_signals)
            signals = sum(gather(stop_signals), [])  # all ranks stop when one is told to
            clock += time.perf_counter() - pause

        if gather(saved_step)[0] != global_step:
            save_checkpoint()
        if global_step >= args.total_timesteps and RANK == 0:
            saved = save(run_dir / "model.pt", model(args, agent, global_step))
            exit_code = 0 if saved else 1
            if saved:
                tracker.log_model(run_dir / "model.pt")
            evaluate(args, agent, device, global_step, run_dir, tracker, stopped=lambda: stop_signals)
        exit_code = gather(exit_code)[0]  # also waits for rank 0
        signals = sum(gather(stop_signals), [])
        bar.close()
        if signals:
            exit_code = 128 + signals[0]
            if RANK == 0:
                say(how_to_go_on(run_dir, global_step, saved_step))
    finally:
        bar.close()
        players.close()
        tracker.finish(exit_code, stopped=lambda: stop_signals)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return exit_code


def play(args: Args, device: torch.device, path: Path) -> int:
    """Plays and records a saved model; returns the exit code."""
    contents = load(path, "agent")
    set_up_torch(args, device)
    agent = Agent(args, int(Atari(args).action_space.n), device)
    try:
        agent.network.load_state_dict(contents["agent"]["network"])
    except Exception as error:
        refuse(path, error)
    run_dir = make_run_dir(args)
    say(f"{args.env_id} on {device}, {agent.precision}: {run_dir}")
    tracker = Tracker(args, run_dir, job_type="eval")
    stop_signals = catch_signals()
    evaluate(args, agent, device, contents["global_step"], run_dir, tracker, stopped=lambda: stop_signals)
    exit_code = 128 + stop_signals[0] if stop_signals else 0
    tracker.finish(exit_code, stopped=lambda: stop_signals)
    return exit_code


def main() -> int:
    resume_after_restart()
    args = parse_args()
    if args.resume or args.evaluate:
        path = Path(args.resume or args.evaluate)
        path = path / "checkpoint.pt" if path.is_dir() else path
        saved = read_flags(path, part="ranks" if args.resume else "agent")
        args = parse_args(default=saved)
    check_args(args)
    device = find_device(args.device)
    if WORLD_SIZE > 1 and device.type == "cuda":
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if args.evaluate:
        return play(args, device, path)
    if args.resume:
        check_resume(args, saved, path)
        if (ranks := len(load(path, "ranks")["ranks"])) != WORLD_SIZE:
            sys.exit(f"error: {path} is of {ranks} ranks, here are {WORLD_SIZE}: start as many,"
                     f" with torchrun --nproc-per-node")  # fmt: skip
        return train(args, device, path.parent, path)
    if RANK > 0:
        return train(args, device, Path(args.run_dir), None)
    run_dir = make_run_dir(args)
    say(f"{args.env_id} on {device}: {run_dir}")
    try:
        return train(args, device, run_dir, None)
    finally:
        with suppress(OSError):
            run_dir.rmdir()  # a start that failed leaves no empty folder


if __name__ == "__main__":
    run_main()
