"""A checkpoint goes on elsewhere and with other flags: its weights and moments are taken, all else is of the new start.

The GPUs are pretended: their tensors lie in main memory and are known by their storage.
"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import apex_dqn_atari
import bootstrapped_dqn_atari
import c51_atari
import dqn_atari
import dqn_atari_visual
import ppo_atari

pytestmark = pytest.mark.slow

SCRIPTS = [dqn_atari, c51_atari, bootstrapped_dqn_atari, apex_dqn_atari, ppo_atari]
CPU, T = torch.device("cpu"), torch.Tensor


class PretendedDevices(TorchFunctionMode):
    """Tensors can be made for cuda and mps and be moved; operations on those of two devices are refused."""

    def __init__(self):
        super().__init__()
        self.places = {}  # the weak references keep an address from being used again

    def where(self, x: torch.Tensor) -> torch.device:
        return self.places.get(x.untyped_storage()._cdata, (CPU,))[0]

    def put(self, tree, device: torch.device):
        for x in tree_leaves(tree):
            if isinstance(x, T):
                storage = x.untyped_storage()
                self.places.setdefault(storage._cdata, (device, StorageWeakRef(storage)))
        return tree

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, T)]
        devices = {self.where(x) for x in inputs if x.dim()} or {self.where(x) for x in inputs} or {CPU}
        if func == T.device.__get__:
            return self.where(args[0])
        if func == T.is_cpu.__get__:
            return self.where(args[0]) == CPU
        if func == T.to:
            device, dtype, _, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
            here, device = self.where(args[0]), device or self.where(args[0])
            layout = layout or torch.preserve_format
            return self.put(args[0].to(dtype or args[0].dtype, copy=device != here, memory_format=layout), device)
        if len(devices) > 1 and func not in (T.copy_, T.data.__set__, torch._has_compatible_shallow_copy_type):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {devices}")
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else devices.pop()
        if "device" in kwargs:
            kwargs["device"] = CPU
        return self.put(func(*args, **kwargs), device)


def slim(network: type) -> type:
    """Without the layer that most of the weights are in; it cannot compute anything."""

    class Slim(network):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for i, layer in enumerate(self.trunk):
                if isinstance(layer, nn.Linear):
                    self.trunk[i] = nn.Linear(8, layer.out_features)

    return Slim


@pytest.fixture(scope="module", autouse=True)
def slim_networks():
    with pytest.MonkeyPatch.context() as patch:
        for script in (*SCRIPTS, dqn_atari_visual):
            name = "ActorCritic" if script is ppo_atari else "QNetwork"
            patch.setattr(script, name, slim(getattr(script, name)))
        yield


def make_agent(script, device="cpu", seed=0, **flags):
    torch.manual_seed(seed)
    return script.Agent(script.Args(**({"precision": "float32"} | flags)), 4, torch.device(device))


def learn(agent, seed: int) -> None:
    """A step of the optimizer with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters(agent):
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.zeros_like(parameter).copy_(gradient)  # in the parameter's memory format
    agent.optimizer.step()


def parameters(agent) -> list:
    return agent.optimizer.param_groups[0]["params"]


def options(agent) -> dict:
    return {name: value for name, value in agent.optimizer.param_groups[0].items() if name != "params"}


def moments(agent) -> list[dict]:
    """Device, dtype, shape and strides of each moment of each parameter."""
    return [
        {name: (x.device, x.dtype, x.shape, x.stride()) for name, x in state.items()}
        for state in agent.optimizer.state.values()
    ]


def through_a_file(agent, path):
    torch.save(agent.state_dict(), path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_agent_moves_between_devices(tmp_path, script):
    """Options and the kind of every moment are those of an agent that has always been there, and it learns the same."""
    with PretendedDevices():
        native, states = {}, {}
        for device in ("cpu", "cuda", "mps"):
            native[device] = make_agent(script, device)
            learn(native[device], 0)
            states[device] = through_a_file(native[device], tmp_path / device)
            learn(native[device], 1)
        for target in native:
            moved = make_agent(script, target, seed=1)
            for source in native:
                moved.load_state_dict(states[source])
                assert options(moved) == options(native[target])
                assert moments(moved) == moments(native[target])
                if script is not ppo_atari:
                    for ours, theirs in zip(targets(moved), targets(native[source])):
                        torch.testing.assert_close(ours.to("cpu"), theirs.to("cpu"), rtol=0, atol=0)
                learn(moved, 1)
                exactly = {"rtol": 0, "atol": 0} if source == target else {"rtol": 1e-5, "atol": 1e-6}  # fused or not
                for ours, theirs in zip(parameters(moved), parameters(native[source])):
                    torch.testing.assert_close(ours.to("cpu"), theirs.to("cpu"), **exactly)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_weights_of_convolutions_lie_as_the_device_needs_them(script):
    layouts = {"cpu": torch.channels_last, "cuda": torch.channels_last, "mps": torch.contiguous_format}
    with PretendedDevices():
        for device, layout in layouts.items():
            agent = make_agent(script, device)
            weights = parameters(agent) + ([] if script is ppo_atari else targets(agent))
            weights = [x for x in weights if x.dim() == 4]
            assert len(weights) >= 3 and all(x.is_contiguous(memory_format=layout) for x in weights)


def targets(agent) -> list[torch.Tensor]:
    return list(agent.target_network.state_dict().values())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_options_of_a_new_start_hold(tmp_path, script):
    """The learning rate and, in C51, Adam's epsilon, which follows from the batch size."""
    flags = {"learning_rate": 1e-2} | ({} if script is ppo_atari else {"batch_size": 64})
    agent, moved, native = make_agent(script), make_agent(script, seed=1, **flags), make_agent(script, **flags)
    learn(agent, 0)
    moved.load_state_dict(through_a_file(agent, tmp_path / "agent"))
    assert options(moved) == options(native) != options(agent)
    if script is ppo_atari:  # the schedule goes on writing to this tensor
        assert options(moved)["lr"] is moved.learning_rate


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_precision_is_found_anew(monkeypatch, tmp_path, script):
    """What auto means is another matter on each machine: a state of bfloat16 goes on in float32, and back."""
    agents = {}
    for precision, has_instructions in (("bfloat16", True), ("float32", False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=has_instructions: found)
        agents[precision] = make_agent(script, precision="auto", seed=len(agents))
        assert agents[precision].precision == precision
        learn(agents[precision], 0)
    fresh = {precision: make_agent(script, precision=precision, seed=9).state_dict() for precision in agents}
    for precision, agent in agents.items():
        other = agents["float32" if precision == "bfloat16" else "bfloat16"]
        agent.load_state_dict(through_a_file(other, tmp_path / precision))
        for part in set(agent.state_dict()) - {"optimizer", "metrics", "updates"}:
            for name, tensor in agent.state_dict()[part].items():
                assert tensor.dtype == fresh[precision][part][name].dtype
                torch.testing.assert_close(tensor.float(), other.state_dict()[part][name].float(), rtol=1e-2, atol=0)


def spoil(state: dict, path: str, value) -> None:
    """Replaces what lies at ``path``, or takes it away if the value is None."""
    *folders, name = [int(part) if part.isdigit() else part for part in path.split("/")]
    for folder in folders:
        state = state[folder]
    if value is None:
        del state[name]
    else:
        state[name] = value


@pytest.fixture(scope="module", params=[dqn_atari, ppo_atari], ids=lambda script: script.__name__)
def learned(request):
    """An agent after one update."""
    agent = make_agent(request.param)
    learn(agent, 0)
    return agent


@pytest.mark.parametrize(
    "path, value",
    [
        ("optimizer", []),
        ("optimizer/state", {}),
        ("optimizer/state/0", None),
        ("optimizer/state/99", {}),
        ("optimizer/state/0", {}),
        ("optimizer/state/0/step", 1.0),
        ("optimizer/state/0/exp_avg", None),
        ("optimizer/state/0/exp_avg", torch.zeros(())),
        ("optimizer/state/0/exp_avg", torch.zeros(1, 1, 1, 1)),
        ("optimizer/state/0/exp_avg_sq", torch.zeros(32, 4, 8, 8, dtype=torch.float64)),
        ("optimizer/state/0/more", torch.zeros(())),
        ("metrics", torch.zeros(1)),
        ("metrics", None),
        ("metrics", "many"),
        ("metrics", []),
        ("metrics", {"td_loss": 1.0}),
        ("metrics", {"td_loss": torch.zeros(3)}),
    ],
)
def test_state_that_is_not_sane_is_refused(learned, path, value):
    state = copy.deepcopy(learned.state_dict())
    learned.load_state_dict(state)
    spoil(state, path, value)
    with pytest.raises((AttributeError, KeyError, RuntimeError, TypeError, ValueError)):
        learned.load_state_dict(state)


def test_one_function_sets_up_the_device(monkeypatch):
    """Seed, device and arithmetic: nothing of it is left to chance or to what ran before."""
    settings = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: settings.update(device=index))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: settings.update(matmul=name))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: settings.update(threads=number))
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace())
    for seed, deterministic in ((7, True), (8, False)):
        dqn_atari.set_up_torch(dqn_atari.Args(seed=seed, torch_deterministic=deterministic), torch.device("cuda:1"))
        assert torch.initial_seed() == seed
        assert settings == {"device": 1, "matmul": "high", "threads": 1}
        assert vars(torch.backends.cudnn) == {"deterministic": deterministic, "benchmark": not deterministic}
    settings.clear()
    dqn_atari.set_up_torch(dqn_atari.Args(), CPU)
    assert settings == {}


@pytest.mark.parametrize("script", [*SCRIPTS, dqn_atari_visual], ids=lambda script: script.__name__)
def test_evaluating_sets_up_the_device(monkeypatch, tmp_path, script):
    """With ``--evaluate`` as in training, and before the agent is made."""
    made = []
    agent = make_agent(script, env_id="Breakout")
    script.save(tmp_path / "model.pt", script.model(script.Args(env_id="Breakout"), agent, 0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "set_up_torch", lambda args, device: made.append(device))
    monkeypatch.setattr(script, "Agent", lambda *arguments: made.append("agent") or agent)
    monkeypatch.setattr(script, "evaluate", lambda *arguments, **flags: made.append("evaluation"))
    monkeypatch.setattr(script, "catch_signals", list)
    monkeypatch.setattr(sys, "argv", ["", "--evaluate", "model.pt", "--wandb-mode", "disabled", "--device", "cpu"])
    assert script.main() == 0
    assert made == [CPU, "agent", "evaluation"]


def test_devices_are_those_of_the_machine(monkeypatch):
    def machine(kind, count):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: kind)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    for kind, count in (("cuda", 2), ("mps", 1), (None, 0)):
        machine(torch.device(kind) if kind else None, count)
        assert dqn_atari.find_device("auto") == torch.device("cuda" if kind == "cuda" else "cpu")
        assert dqn_atari.find_device("cpu") == CPU
        for name in {"cuda:2", "cuda:1", "cuda", "mps", "mps:1", "meta", "nonsense"}:
            there = name in {"cuda": ("cuda", "cuda:1"), "mps": ("mps",), None: ()}[kind]
            if there:
                assert dqn_atari.find_device(name) == torch.device(name)
            else:
                with pytest.raises(SystemExit, match=f"error: --device {name} is .*: this machine has .*cpu"):
                    dqn_atari.find_device(name)


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_agent_moves_to_a_gpu_and_back(tmp_path, script):
    """On a real one, in a captured step, which refuses the options of a CPU's optimizer."""
    agent, moved, back = make_agent(script), make_agent(script, "cuda", seed=1), make_agent(script, seed=2)
    learn(agent, 0)
    moved.load_state_dict(through_a_file(agent, tmp_path / "to"))
    step = script.CudaGraph(moved.optimizer.step)
    for one in (agent, moved):
        learn(one, 1)
    for _ in range(5):
        agent.optimizer.step()
        step()
    assert step.graph is not None
    back.load_state_dict(through_a_file(moved, tmp_path / "back"))
    for one in (agent, moved, back):
        learn(one, 2)
    for one in (moved, back):
        for ours, theirs in zip(parameters(one), parameters(agent)):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-5)
