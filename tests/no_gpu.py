"""A GPU that is not there, to show on a CPU what the scripts do on CUDA.

``PretendedGPU`` stands for the device and ``Recording`` for a CUDA graph. Both refuse what CUDA refuses, and compute
what a CPU computes: a run on the pretended GPU ends as one on the CPU, to the bit.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = torch.Tensor
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def tensors(tree) -> list[T]:
    return [x for x in tree_leaves(tree) if isinstance(x, T)]


def address(x: T) -> int:
    """Of the memory that ``x`` lies in, or is a view of."""
    return x.untyped_storage()._cdata


# ---------------------------------------------------------------------------------------------------- CUDA graphs

# Their result is a number for the host, or of a size that depends on values, or their values come from the host.
UNCAPTURABLE = {
    *("_local_scalar_dense", "equal", "is_nonzero"),
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"),
    *("lift_fresh", "_pin_memory"),  # the first one is torch.tensor(...)
}


class Recording(TorchDispatchMode):
    """The operations that are called inside ``with``, as a CUDA graph holds them: not executed, but to be replayed.

    They keep the tensors and numbers of that moment. So a replay does something else than the function where Python
    would have decided anew: a number that has changed, a tensor that another one has replaced.
    """

    active = False

    def __init__(self):
        super().__init__()
        self.operations = []  # each a function, its arguments, and its results if they are new tensors
        self.own = set()  # addresses of tensors that the operations made
        self.before = {}  # by address: memory that they wrote to, and a copy of what was there

    def __enter__(self):
        self.random_state = torch.get_rng_state()
        Recording.active = True
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        Recording.active = False
        torch.set_rng_state(self.random_state)
        for memory, contents in self.before.values():
            memory.copy_(contents)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        parameters = operation._schema.arguments
        name = operation._schema.name.split("::")[1]
        masks = [x for x in tensors(args[1:2]) if x.dtype in (torch.bool, torch.uint8)]
        if name in UNCAPTURABLE or (name in ("index", "index_put_") and masks):
            raise RuntimeError(f"{operation} cannot be captured: the host has to wait")

        named = dict(zip((x.name for x in parameters), args)) | kwargs
        written = tensors([named.get(x.name) for x in parameters if x.alias_info and x.alias_info.is_write])
        for x in written:
            if address(x) not in self.own and address(x) not in self.before:
                self.before[address(x)] = (x.untyped_storage(), x.untyped_storage().clone())
        results = operation(*args, **kwargs)
        there_before = {address(x) for x in tensors((args, kwargs))}
        fresh = [x for x in tensors(results) if address(x) not in there_before]
        self.own |= {address(x) for x in fresh}
        if fresh or written:  # else it is a view, which stays valid
            self.operations.append((operation, args, kwargs, tensors(results) if fresh else []))
        return results

    def replay(self) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for operation, args, kwargs, results in self.operations:
                again = tensors(operation(*args, **kwargs))
                for old, new in zip(results, again):
                    old.detach().copy_(new)


# -------------------------------------------------------------------------------------------------------- the GPU

# The host needs the values of a tensor, or how many they are.
WAITING = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__", "__contains__"),
    *("equal", "allclose", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave"),
}
MIXING = (T.copy_, T.__setitem__, T.data.__set__, torch._has_compatible_shallow_copy_type)


def one_hot(x: T, size: int) -> T:
    """As on a GPU, where the host does not look at the values."""
    return torch.zeros(*x.shape, size, dtype=torch.int64).scatter_(-1, x[..., None], 1)


class Event:
    """Of ``torch.cuda``: the host waits for it if it has been recorded."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        if self.recorded:
            self.gpu.wait()


class PretendedGPU(TorchFunctionMode):
    """Tensors for cuda lie in main memory and are known by their address; ``waits`` counts what the host waits for.

    Refused are operations on tensors of both devices, ``numpy()`` of one on the GPU and, in a recording, whatever
    waits or reads from main memory.
    """

    def __init__(self, script: str):
        super().__init__()
        self.script = script  # file name
        self.memory = {}  # by address; a weak reference keeps an address from being used again
        self.pinned = {}
        self.waits = Counter()  # by the function of the script

    def has(self, x: T) -> bool:
        return address(x) in self.memory

    def put(self, tree, where: dict):
        for x in tensors(tree):
            where.setdefault(address(x), StorageWeakRef(x.untyped_storage()))
        return tree

    def wait(self) -> None:
        if Recording.active:
            raise RuntimeError("cannot be captured: the host has to wait")
        frame = sys._getframe()
        while frame and (frame.f_code.co_filename != self.script or frame.f_code.co_name.startswith("<")):
            frame = frame.f_back
        self.waits[frame.f_code.co_name if frame else "?"] += 1

    def move(self, x: T, device=None, dtype=None, non_blocking=False, memory_format=None, copy=False) -> T:
        """``x.to(...)``. It waits unless it goes to the GPU from pinned memory as it lies there."""
        on_gpu = self.has(x) if device is None else device.type == "cuda"
        moved = on_gpu != self.has(x)
        if moved and not (on_gpu and non_blocking and address(x) in self.pinned and x.is_contiguous()):
            self.wait()
        options = {} if memory_format is None else {"memory_format": memory_format}
        y = x.to(dtype or x.dtype, copy=copy or moved, **options)
        return self.put(y, self.memory) if on_gpu else y

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = tensors((args, kwargs))
        on_gpu = [x for x in inputs if self.has(x)]
        in_main_memory = [x for x in inputs if not self.has(x)]

        if func == T.device.__get__:
            return GPU if on_gpu else CPU
        if func in (T.is_cuda.__get__, T.is_cpu.__get__):
            return bool(on_gpu) == (func == T.is_cuda.__get__)
        if func is T.cpu:
            return self.move(args[0], CPU)
        if func is T.to:
            copy = kwargs.pop("copy", False)
            return self.move(args[0], *torch._C._nn._parse_to(*args[1:], **kwargs), copy=copy)
        if func is T.pin_memory:
            pinned = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype)
            return self.put(pinned.copy_(args[0]), self.pinned)  # strides and gaps are kept
        if func in (T.numpy, T.__array__) and on_gpu:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        device = kwargs.pop("device", None)
        made_on_gpu = device is not None and torch.device(device).type == "cuda"
        needs_values = func.__name__ in WAITING
        if func in (T.__getitem__, T.__setitem__):
            indices = tensors(args[1])
            needs_values = any(x.dtype == torch.bool for x in indices)
            if func is T.__setitem__ and indices and not tensors(args[2]):
                needs_values = True  # the number is first a tensor in main memory
        if (on_gpu and needs_values) or (made_on_gpu and func in (torch.tensor, torch.as_tensor)):
            self.wait()
        if on_gpu and any(x.dim() for x in in_main_memory):
            if func not in MIXING:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")
            if func in (T.copy_, T.__setitem__):
                self.wait()
        if in_main_memory and Recording.active:
            raise RuntimeError(f"{func} cannot be captured: it reads from main memory")

        if func is F.one_hot and on_gpu:
            func = one_hot
        if device is not None:
            kwargs["device"] = CPU
        pinned = kwargs.pop("pin_memory", False)
        results = func(*args, **kwargs)
        if pinned:
            return self.put(results, self.pinned)
        if made_on_gpu or (on_gpu and device is None):
            there_before = {address(x) for x in inputs}
            if func == T.grad.__get__:
                there_before = set()
            self.put([x for x in tensors(results) if address(x) not in there_before], self.memory)
        return results


@contextmanager
def pretended_gpu(script, monkeypatch):
    """Inside, the module ``script`` finds a GPU; yields the ``PretendedGPU``."""
    gpu = PretendedGPU(script.__file__)
    group = torch._C._group_tensors_by_device_and_dtype
    autocast = torch.autocast

    def group_by_device(lists, with_indices=False):
        groups = group(lists, with_indices)
        return {
            (GPU if gpu.has(found[0][0]) else CPU, dtype): (found, at) for (_, dtype), (found, at) in groups.items()
        }

    stream = MagicMock()
    stream.is_capturing = lambda: Recording.active
    with monkeypatch.context() as patch, gpu:
        for name, stand_in in {
            "is_available": lambda: True,
            "set_device": lambda index: None,
            "mem_get_info": lambda device: (10**11, 10**11),
            "get_rng_state": lambda device: torch.get_rng_state(),  # there is one generator only
            "set_rng_state": lambda state, device: torch.set_rng_state(state),
            "CUDAGraph": Recording,
            "graph": lambda recording: recording,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "Event": lambda blocking: Event(gpu),
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: GPU)
        patch.setattr(torch.accelerator, "current_stream", lambda: stream)
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        patch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
        patch.setattr(torch, "autocast", lambda device, *arguments, **more: autocast("cpu", *arguments, **more))
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group_by_device)
        yield gpu
