"""The single-frame replay against a naive list of full transitions."""

import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, Naive, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dqn_atari
from dqn_atari import HISTORY, SIZE, Args, Replay, find_replay_device, free_memory

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


@pytest.mark.parametrize("num_envs", [1, 5])
@pytest.mark.slow
def test_samples_equal_full_transitions(num_envs):
    """Every drawn transition is the naive one; those drawn are exactly those that are valid."""
    rng = np.random.default_rng(num_envs)
    torch.manual_seed(0)
    rows = 40
    replay = Replay(rows * num_envs + num_envs // 2, num_envs, CPU)
    naive = [Naive(1, 1.0) for _ in range(num_envs)]
    for step in range(3 * rows + 7):
        frames = rng.integers(0, 256, (num_envs, SIZE, SIZE), dtype=np.uint8)
        frames[:, 0, :4] = np.arange(num_envs)[:, None]  # a tag that tells the transition drawn: environment and step
        frames[:, 0, 4:8] = step
        actions, rewards = rng.integers(0, 18, num_envs), rng.integers(-1, 2, num_envs).astype(np.float32)
        terminated, truncated = rng.random(num_envs) < 0.1, rng.random(num_envs) < 0.05
        for i in range(num_envs):
            naive[i].add(frames[i], actions[i], rewards[i], terminated[i], truncated[i])
        replay.add(*map(torch.from_numpy, (frames, actions, rewards, terminated, truncated)))
        if step not in (9, rows - 2, rows - 1, rows, rows + 2, 2 * rows + 5, 3 * rows + 6):
            continue
        stored = step + 1
        first = max(0, stored - rows + HISTORY)
        valid = {
            (i, t) for i in range(num_envs) for t in range(first, stored - 1) if naive[i].transition(t) is not None
        }
        expected = {(i, t): naive[i].transition(t) for i, t in valid}
        drawn = set()
        for _ in range(2 * num_envs):
            batch = replay.sample(320)
            tags = batch.observations[:, -1, 0, [0, 4]].tolist()
            drawn.update(map(tuple, tags))
            stacks, actions, rewards, next_stacks, discounts = zip(*(expected[i, t] for i, t in tags))
            running = [i for i, discount in enumerate(discounts) if discount]
            assert np.array_equal(batch.observations, np.stack(stacks))
            assert batch.actions.tolist() == list(actions)
            assert batch.rewards.tolist() == list(rewards)
            assert batch.terminated.tolist() == [discount == 0 for discount in discounts]
            assert np.array_equal(batch.next_observations[running], np.stack([next_stacks[i] for i in running]))
        assert drawn == valid


def test_sampling_is_uniform():
    """Each valid transition comes up equally often (chi-square over 64,000 draws, 1e-6 tail)."""
    torch.manual_seed(0)
    replay = Replay(60, 2, CPU)
    for step in range(50):
        frames = torch.full((2, SIZE, SIZE), step, dtype=torch.uint8)
        frames[1, 0, 0] += 100
        truncated = torch.tensor([step % 7 == 0, False])
        replay.add(frames, torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.bool), truncated)
    counts = torch.zeros(256)
    for _ in range(1000):
        counts += torch.bincount(replay.sample(64).observations[:, -1, 0, 0].long(), minlength=256)
    valid = [t + 100 * i for i in range(2) for t in range(23, 49) if not (i == 0 and t % 7 == 0)]
    assert set(counts.nonzero().flatten().tolist()) == set(valid)
    expected = 64_000 / len(valid)
    chi_square = ((counts[valid] - expected) ** 2 / expected).sum().item()
    assert chi_square < 107  # 48 - 1 degrees of freedom


def test_state_survives_a_checkpoint(tmp_path):
    """A restored replay draws the same samples and goes on storing at the same place."""
    replay, other = (Replay(70, 2, CPU) for _ in range(2))

    def add(replay, step):
        generator = torch.Generator().manual_seed(step)
        frames = torch.randint(0, 256, (2, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        ends = torch.rand(2, generator=generator)
        replay.add(frames, torch.tensor([step % 5, 1]), torch.tensor([1.0, step]), ends < 0.1, ends > 0.95)

    for steps in (range(20), range(20, 100)):
        for step in steps:
            add(replay, step)
        torch.save(replay.state_dict(), tmp_path / "replay.pt")
        assert (tmp_path / "replay.pt").stat().st_size < 1.1 * min(100, replay.num_steps) * 2 * 7063
        other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True, mmap=True))
        for r in (replay, other):
            torch.manual_seed(1)
            for step in range(500, 503):
                add(r, step)
        for a, b in zip(replay.sample(32), other.sample(32)):
            assert a.shape == b.shape
        torch.manual_seed(2)
        first = replay.sample(32)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(first, other.sample(32)))


def stored(rows: int, steps: int) -> Replay:
    """A replay of two environments with random steps."""
    replay, generator = Replay(2 * rows, 2, CPU), torch.Generator().manual_seed(0)
    for step in range(steps):
        frames = torch.randint(1, 256, (2, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        replay.add(frames, torch.full((2,), step % 4), torch.ones(2), torch.zeros(2) > 0, torch.zeros(2) > 0)
    return replay


@pytest.mark.parametrize("num_steps", [-1, -21, 19, 21, 30, 10**6, 2**70, 20.0, "20", None, [20]])
def test_counter_that_is_not_of_the_arrays_is_refused(num_steps):
    state = stored(30, 20).state_dict()
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        Replay(60, 2, CPU).load_state_dict(state | {"num_steps": num_steps})


def test_counter_beyond_all_numbers_is_refused():
    state = stored(10, 20).state_dict()
    Replay(20, 2, CPU).load_state_dict(state)
    with pytest.raises(ValueError):
        Replay(20, 2, CPU).load_state_dict(state | {"num_steps": 2**70})


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("frames", lambda array: array[:, :1]),  # these would be broadcast
        ("frames", lambda array: array[:, :, :1]),
        ("rewards", lambda array: array[:1]),
        ("ends", lambda array: array[0]),
        ("actions", lambda array: array.long()),
        ("rewards", lambda array: array.double()),
        ("rewards", lambda array: array.tolist()),
        ("ends", lambda array: torch.cat([array, array])),
        ("frames", lambda array: None),
    ],
)
def test_array_of_another_kind_is_refused(name, spoil):
    state = stored(30, 20).state_dict()
    with pytest.raises(ValueError):
        Replay(60, 2, CPU).load_state_dict(state | {name: spoil(state[name])})
    del state[name]
    with pytest.raises(KeyError):
        Replay(60, 2, CPU).load_state_dict(state)


def test_state_of_a_longer_replay_is_refused():
    with pytest.raises(ValueError):
        Replay(60, 2, CPU).load_state_dict(stored(40, 40).state_dict())


class LargestTensor(TorchDispatchMode):
    """The most bytes that a tensor made meanwhile has."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                self.nbytes = max(self.nbytes, x.nbytes)
        return result


def test_loading_makes_no_second_copy():
    """Not on another device either (meta stands for one): the file is read into the arrays."""
    state = stored(30, 20).state_dict()
    for device in (CPU, torch.device("meta")):
        replay = Replay(60, 2, device)
        with LargestTensor() as largest:
            replay.load_state_dict(state)
        assert largest.nbytes < 100


FILL = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from dqn_atari import SIZE, Replay

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before = resident()
replay = Replay(100_000, 10, torch.device("cpu"))
print(resident() - before)
for _ in range(2000):
    replay.add(torch.ones(10, SIZE, SIZE), *torch.zeros(4, 10).bool())
print(resident() - before)
print(bool(replay.frames[20_000:21_000].any() or replay.frames[-1000:].any()))
"""


@on_linux
@pytest.mark.slow
def test_memory_is_taken_as_it_is_filled(tmp_path):
    """Of a replay of 700 MB, hardly any at first; its frames are zeros all the same.

    In a process of its own: one that has freed much memory would give it to the replay, and take none.
    """
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    result = run(tmp_path, "", script)
    assert result.returncode == 0, result.stderr
    at_first, filled, any_set = result.stdout.split()
    assert int(at_first) < 50e6
    assert 141e6 < int(filled) < 250e6
    assert any_set == "False"


LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "dqn_atari.py")!r}, run_name="__main__")
"""


@on_linux
@pytest.mark.slow
def test_limit_of_the_shell_is_told_in_one_sentence(tmp_path):
    """With ``ulimit -d`` the memory is there, and this process cannot have it."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    flags = "--device cpu --env-id Pong --num-envs 1 --num-workers 0 --wandb-mode disabled --buffer-size 320000"
    result = run(tmp_path, flags, script)
    assert result.returncode == 1
    assert result.stderr == (
        "error: the replay needs 2.3 GB, more than this process may have (ulimit): lower --buffer-size\n"
    )


LIMIT, NONE = "1500000000\n", "9223372036854771712\n"
V1 = "12:cpu,cpuacct:/docker/4f\n4:memory:/docker/4f\n0::/\n"


@pytest.mark.parametrize(
    "cgroups, files, limited",
    [
        ("0::/\n", {"memory.max": LIMIT}, True),  # a container of its own, version 2
        ("0::/user/job\n", {"user/job/memory.max": LIMIT}, True),
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": LIMIT}, True),
        ("0::/user/job\n", {"user/job/memory.max": LIMIT, "user/memory.max": "99000000000\n"}, True),
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/other/memory.max": LIMIT}, False),
        (V1, {"memory/docker/4f/memory.limit_in_bytes": LIMIT, "memory/memory.limit_in_bytes": NONE}, True),
        (V1, {"memory/memory.limit_in_bytes": LIMIT}, True),  # a container's own is mounted at the top
        (V1, {"memory/docker/4f/memory.limit_in_bytes": NONE}, False),
        (None, {}, False),  # another system
    ],
)
def test_limit_of_a_container_counts(tmp_path, cgroups, files, limited):
    machine = free_memory(CPU, str(tmp_path))
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (files | ({"proc/self/cgroup": cgroups} if cgroups else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(CPU, str(tmp_path)) == (0.5e9 if limited else machine)
    assert machine > 0.5e9


@pytest.mark.parametrize(
    "device, replay_device, on_gpu, in_main_memory, expected",
    [
        ("cpu", "auto", 0, 8, "cpu"),
        ("cuda", "auto", 8, 8, "cuda"),
        ("cuda:1", "cuda", 8, 8, "cuda:1"),
        ("cuda", "cpu", 8, 8, "cpu"),
        ("cuda", "auto", 6, 8, "cpu"),
        ("mps", "auto", 0, 8, "cpu"),
        ("mps", "cpu", 0, 8, "cpu"),
        ("cuda", "cuda", 6, 8, "error: --buffer-size 1000000 needs 7.1 GB and cuda has 6.0 GB for it: lower it"),
        ("cuda", "auto", 8, 6, "error: --buffer-size 1000000 needs 7.1 GB and cpu has 6.0 GB for it: lower it"),
        ("cpu", "auto", 0, -1, "error: --buffer-size 1000000 needs 7.1 GB and cpu has 0.0 GB for it: lower it"),
        ("cpu", "cuda", 8, 8, "error: --replay-device cuda is not for a learner on cpu: give auto"),
        ("mps", "cuda", 8, 8, "error: --replay-device cuda is not for a learner on mps: give auto"),
    ],
)
def test_replay_goes_where_it_fits(monkeypatch, device, replay_device, on_gpu, in_main_memory, expected):
    """On the GPU only if it fits into main memory as well, through which every checkpoint goes."""
    gigabytes = {"cpu": in_main_memory, "cuda": on_gpu}
    monkeypatch.setattr(dqn_atari, "free_memory", lambda device: 1e9 * gigabytes[device.type])
    args = Args(replay_device=replay_device)
    if expected.startswith("error"):
        with pytest.raises(SystemExit) as error:
            find_replay_device(args, torch.device(device))
        assert error.value.code == expected
    else:
        assert find_replay_device(args, torch.device(device)) == torch.device(expected)
