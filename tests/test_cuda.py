"""What only a GPU can show: captured graphs compute what the plain functions compute."""

import copy

import pytest
import torch
from helpers import random_batch

from dqn_atari import SIZE, Agent, Args, CudaGraph, Replay, find_replay_device

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_update_equals_plain_update(device, precision):
    """100 updates on the same batches: the parameters agree within float32 rounding, and the losses too."""
    torch.manual_seed(0)
    plain = Agent(Args(precision=precision), 4, device)
    captured = Agent(Args(precision=precision), 4, device)
    captured.load_state_dict(copy.deepcopy(plain.state_dict()))
    update = CudaGraph(captured.update)
    batch = [x.to(device) for x in random_batch(num_actions=4)]
    for step in range(100):
        batch[2] = torch.full_like(batch[2], (step % 7) / 7)
        plain.update(*batch)
        update(*batch)
    assert update.graph is not None
    means = captured.metrics.means()
    for name, mean in plain.metrics.means().items():
        assert means[name] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    for a, b in zip(plain.q_network.parameters(), captured.q_network.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_captured_sampling_sees_the_replay_grow(device):
    """The graph reads how much is stored from the device: later replays draw later steps, and never the same batch."""
    replay = Replay(1000, 1, device)

    def add(steps):
        for step in steps:
            frame = torch.full((1, SIZE, SIZE), step % 256, dtype=torch.uint8, device=device)
            zero = torch.zeros(1)
            replay.add(frame, zero, zero, zero.bool(), zero.bool())

    sample = CudaGraph(lambda: replay.sample(64))
    add(range(20))
    for _ in range(5):
        assert sample().observations[:, -1, 0, 0].max() < 20
    add(range(20, 200))
    first = sample().observations[:, -1, 0, 0].clone()
    assert first.max() > 100
    assert not torch.equal(first, sample().observations[:, -1, 0, 0])


def test_captured_acting_follows_epsilon(device):
    agent = Agent(Args(precision="float32"), 4, device)
    observations = random_batch(200)[0].to(device)
    act, epsilon = CudaGraph(agent.act), torch.zeros((), device=device)
    greedy = agent.q_network(observations).argmax(1)
    for _ in range(5):
        assert torch.equal(act(observations, epsilon), greedy)
    epsilon.fill_(1.0)
    assert torch.bincount(act(observations, epsilon), minlength=4).min() > 20


def test_replay_goes_where_it_fits(device):
    assert find_replay_device(Args(buffer_size=10_000), device).type == "cuda"
    assert find_replay_device(Args(buffer_size=10_000, replay_device="cpu"), device).type == "cpu"
    with pytest.raises(SystemExit, match="needs"):
        find_replay_device(Args(buffer_size=10**9, replay_device="cuda"), device)


@pytest.mark.parametrize("replay_device", ["cuda", "cpu"])
def test_training_runs_and_resumes(tmp_path, replay_device):
    """The command line on CUDA, stopped and resumed, with the replay on the GPU and in main memory."""
    from test_command_line import run

    flags = "--env-id Pong --total-timesteps 2000 --learning-starts 400 --buffer-size 1500"
    flags += f" --device cuda --replay-device {replay_device} --eval-episodes 1 --no-capture-video"
    flags += " --wandb-mode disabled"
    assert run(tmp_path, flags).returncode == 0
    folder = next((tmp_path / "runs").iterdir())
    resumed = run(tmp_path, f"--resume {folder} --total-timesteps 3000 --wandb-mode disabled")
    assert resumed.returncode == 0, resumed.stderr
