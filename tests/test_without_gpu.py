"""What the scripts do on CUDA, on a GPU that is only pretended (no_gpu.py): moves between devices, graphs, waits.

Every function that a script captures is recorded and replayed. A graph that keeps or leaves out something shows in the
checkpoint, which is then another one than that of a run on the CPU. What a GPU alone can show is in test_cuda.py.
"""

import functools
import importlib
import itertools
import shutil
import signal
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from no_gpu import CPU, GPU, pretended_gpu
from torch.utils._pytree import keystr, tree_flatten_with_path

import dqn_atari

pytestmark = pytest.mark.slow

FLAGS = (
    "--env-id Pong --seed 3 --max-episode-frames 80 --precision float32 --checkpoint-minutes 0"
    " --eval-frequency 0 --eval-episodes 1 --video-length 2"
)
DQN = (
    " --num-envs 2 --num-workers 0 --learning-starts 20 --buffer-size 50 --batch-size 8 --train-frequency 2"
    " --target-network-frequency 18 --exploration-fraction 0.5"
)
PPO = " --num-envs 2 --num-workers 2 --num-steps 8 --num-minibatches 2 --update-epochs 2 --max-grad-norm 0.1"
LOG_FREQUENCY = 44  # no start ends with it: metrics are in the checkpoint
MOVES = [("cpu", 32), ("cuda", 80), ("cuda", 112), ("cpu", 128)]  # --device and --total-timesteps of each start
ON_GPU = [("cuda", 80)]
# Waits that are no part of a step: they belong to a start, a checkpoint, an evaluation or the charts.
OUTSIDE = {
    *("__init__", "fill", "load_state_dict", "state_dict", "means", "check_finite", "explained_variance"),
    *("think", "gradient_saliency", "perturbation_saliency"),
}


class KeptGames:
    """Stands in for ``Game``: the four of a start are made once for all, since a reset or a restore leaves nothing."""

    def __init__(self, script):
        self.find_game = script.Atari.find_game
        self.games = itertools.cycle(
            [script.Atari(script.Args(env_id="Pong", max_episode_frames=80)) for _ in range(4)]
        )

    def __call__(self, args):
        game = next(self.games)
        game.game_ended = True  # as in one that has just been made
        return game


kept_games = functools.cache(KeptGames)


@pytest.fixture
def script(request, monkeypatch):
    """A script; ``ended`` lists how many games each step of a vector has ended."""
    script = importlib.import_module(request.param)
    recv = script.AtariVector.recv
    script.ended = []

    def counted(self):
        outcome = recv(self)
        script.ended.append(len(outcome[-1]))
        return outcome

    monkeypatch.setattr(script.AtariVector, "recv", counted)
    monkeypatch.setattr(script, "Game", kept_games(script))
    monkeypatch.setattr(script, "LOG_FREQUENCY", LOG_FREQUENCY)
    monkeypatch.setattr(script, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    handlers = {number: signal.getsignal(number) for number in script.STOP_SIGNALS}
    yield script
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(script, monkeypatch, flags: str, device: str) -> Counter | None:
    """``main`` as from the shell; returns the waits for the GPU, if there was one, that are a part of steps."""
    script.ended.clear()
    flags += f" --device {device} --wandb-mode disabled"
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags.split()])
    with pretended_gpu(script, monkeypatch) if device == "cuda" else nullcontext() as gpu:
        assert script.main() == 0
    return gpu and inside(gpu.waits)


def inside(waits: Counter) -> Counter:
    """Those that are a part of steps."""
    return Counter({place: number for place, number in waits.items() if place not in OUTSIDE})


# What a checkpoint holds of a start or a device: the flags, Adam's options, CUDA's generator, W&B's name of the run.
NOT_COMPARED = ("'args'", "'param_groups'", "'cuda'", "'wandb_run_id'")


def flatten(contents: dict) -> dict:
    """All values of nested dictionaries and lists, by their places."""
    values = {keystr(place): value for place, value in tree_flatten_with_path(contents)[0]}
    return {place: value for place, value in values.items() if not any(word in place for word in NOT_COMPARED)}


def assert_same(ours: dict, theirs: dict) -> None:
    def same(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    ours, theirs = flatten(ours), flatten(theirs)
    assert set(ours) == set(theirs)
    assert [place for place in ours if not same(ours[place], theirs[place])] == []


def checkpoint(folder: Path) -> dict:
    (path,) = folder.glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


def expected_waits(script, flags: str, steps: int, logs: int) -> Counter:
    """For the actions once a step, and for what a step brings only now and then."""
    if script.__name__ == "ppo_atari":
        cut = sum(ended > 0 for ended in script.ended)  # the value of a game's last state
        return Counter(send_actions=2 * steps, receive=cut, train=logs)  # both halves of the games act in a step
    of_heads = sum(script.ended) if script.__name__ == "bootstrapped_dqn_atari" else 0
    to_main_memory = 2 * steps if "--replay-device cpu" in flags else 0  # frames and actions
    return Counter(train=steps + logs + of_heads, add=to_main_memory)


@pytest.mark.parametrize(
    "script, flags, starts",
    [
        ("dqn_atari", DQN, MOVES),
        ("dqn_atari", DQN + " --replay-device cpu", ON_GPU),
        ("ppo_atari", PPO, MOVES),
        ("c51_atari", DQN, ON_GPU),
        ("bootstrapped_dqn_atari", DQN + " --num-heads 3 --mask-probability 0.5", ON_GPU),
        ("dqn_atari_visual", DQN, ON_GPU),
    ],
    indirect=["script"],
)
def test_a_run_on_a_gpu_is_that_on_a_cpu(script, flags, starts, tmp_path, monkeypatch):
    """To the bit, wherever it is resumed; and it waits for the GPU only where it must."""
    if script.__name__ != "dqn_atari_visual":  # its saliency maps are made for videos only
        flags += " --no-capture-video"

    def go_on(folder: Path, device: str, steps: int) -> Counter | None:
        resumed = "".join(f" --resume {run}" for run in folder.glob("*"))
        new = "" if resumed else f" --run-dir {folder}"
        return start(script, monkeypatch, FLAGS + flags + resumed + new + f" --total-timesteps {steps}", device)

    plain, moved, before = tmp_path / "plain", tmp_path / "moved", 0
    for device, steps in starts:
        go_on(plain, "cpu", steps)
        if (device, before) == ("cpu", 0):
            shutil.copytree(plain, moved)
        waits = go_on(moved, device, steps) if device == "cuda" or before else None
        assert_same(checkpoint(moved), checkpoint(plain))
        if device == "cuda":
            logs = steps // LOG_FREQUENCY - before // LOG_FREQUENCY
            assert waits == expected_waits(script, flags, (steps - before) // 2, logs)
        before = steps


@pytest.mark.parametrize("replay_device, precision", [(GPU, "bfloat16"), (CPU, "float32")])
def test_apex_learns_on_a_gpu_as_on_a_cpu(replay_device, precision, monkeypatch):
    """Sample, update and priorities, from chunks that come as from actors; the replay grows and wraps."""
    import apex_dqn_atari as script

    args = script.Args(precision=precision, num_actors=1, envs_per_actor=2, buffer_size=320, batch_size=4)

    def chunk(rng) -> dict:
        shape = (script.CHUNK, 2)
        bytes_of = {name: rng.integers(4, size=shape, dtype=np.uint8) for name in ("ages", "actions")}
        bytes_of["frames"] = rng.integers(256, size=(*shape, script.SIZE, script.SIZE), dtype=np.uint8)
        return bytes_of | {name: rng.random(shape, np.float32) for name in ("returns", "discounts", "priorities")}

    def learn(device: torch.device, replay_device: torch.device) -> dict:
        torch.manual_seed(0)
        rng = np.random.default_rng(1)
        agent = script.Agent(args, 4, device)
        replay = script.Replay(args, replay_device)
        learn = script.one_ahead(script.capture_learning(args, agent, replay), device)
        for number in range(5):
            replay.add(0, chunk(rng), follows=number > 0)
            for _ in range(3):
                learn()
            agent.update_target()
        return {"agent": agent.state_dict(), "replay": replay.state_dict()}

    plain = learn(CPU, CPU)
    with pretended_gpu(script, monkeypatch) as gpu:
        learned = learn(GPU, replay_device)
    assert_same(learned, plain)
    of_td_errors = 0 if replay_device == GPU else 15
    assert inside(gpu.waits) == Counter(call=14, learn_from_main_memory=of_td_errors)  # call: for the one before


# -------------------------------------------------------------------------------------- the stand-ins themselves


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * 2 if x.any() else x,
        lambda x: x[x > 0],
        lambda x: x * torch.tensor(2.0, device=x.device),
        lambda x: x * torch.ones(()),  # in main memory
        lambda x: x.cpu(),
    ],
)
def test_what_cannot_be_captured_is_refused(function, monkeypatch):
    with pretended_gpu(dqn_atari, monkeypatch):
        graph = dqn_atari.CudaGraph(function)
        x = torch.ones(3, device=GPU)
        for _ in range(3):  # these calls are plain ones
            graph(x)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            graph(x)


def test_graph_keeps_what_it_was_captured_with(monkeypatch):
    """It writes to the same tensors again and draws anew, but a new number or another tensor does not reach it."""
    with pretended_gpu(dqn_atari, monkeypatch):
        now = {"number": 1.0, "replaced": torch.ones(3, device=GPU), "filled": torch.ones(3, device=GPU)}
        total = torch.zeros(3, device=GPU)

        def add(x):
            total.add_(x)
            return [x * value for value in now.values()] + [torch.rand(3, device=x.device)]

        graph = dqn_atari.CudaGraph(add)
        for _ in range(4):
            *_, drawn = (y.clone() for y in graph(torch.ones(3, device=GPU)))
        now["number"] = 5.0
        now["replaced"] = torch.full((3,), 5.0, device=GPU)
        now["filled"].fill_(5.0)
        *products, drawn_next = graph(torch.full((3,), 2.0, device=GPU))
        assert [y.tolist() for y in products] == [[2.0] * 3, [2.0] * 3, [10.0] * 3]
        assert drawn.tolist() != drawn_next.tolist()
        assert total.tolist() == [6.0] * 3


def test_devices_do_not_mix(monkeypatch):
    with pretended_gpu(dqn_atari, monkeypatch) as gpu:
        there = torch.ones(3, device=GPU)
        here = torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there.device, here.device, there.cpu().device) == (GPU, CPU, CPU)
        gpu.waits.clear()
        for x in (np.ones(3), np.ones((4, 4)).T[1:3], torch.ones(4, 4)[:, 1:3]):
            assert dqn_atari.upload(x, GPU).device == GPU
        assert not gpu.waits
        here.to(GPU)
        there[:2].copy_(here[:2])
        there.sum().item()
        assert gpu.waits.total() == 3
