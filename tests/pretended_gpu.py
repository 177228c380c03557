"""A GPU that is only pretended: tensors that say cuda:0 and hold their values on the CPU.

Tensors of two devices that meet are an error, as on a GPU. Where the host would wait for it is
counted by the line of this project, and so are operations. It knows nothing of time, memory, cuDNN
and NCCL.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fibldm import datasets

DEVICE = torch.device("cuda", 0)
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
READS |= {"nonzero", "equal", "allclose", "unique", "masked_select", "is_nonzero"}
MOVES = {"to", "cuda", "cpu"}
IN_FP32 = {"layer_norm", "softmax", "exp"}  # by CUDA's autocast; the CPU's leaves them as they are


class Cuda(Tensor):
    """A tensor of the pretended GPU. `Gpu` sees what is done with it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)  # so that it is a Parameter
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


class Operations(TorchDispatchMode):
    """Counts dispatches; and kernels: those that neither make a view nor only reserve memory."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches, self.kernels = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.dispatches += 1
        self.kernels += not func.is_view and "empty" not in func.__name__
        return func(*args, **kwargs or {})


class Gpu(TorchFunctionMode):
    """Within it the GPU is there, for one thread. `waits`: how often each line waited for it."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits, self.operations = waits, Operations()

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = any(isinstance(t, Cuda) for t in tensors)
        if name == "pin_memory":
            args[0].pinned = True
            return args[0]
        if name == "_has_compatible_shallow_copy_type":  # `Module.to` makes new parameters
            return False
        if here and func == Tensor.device.__get__:
            return DEVICE

        # Where the result is. All is computed on the CPU.
        target = kwargs.pop("device", None) or {"cpu": "cpu", "cuda": DEVICE}.get(name)
        if name == "to" and len(args) > 1 and isinstance(args[1], str | torch.device):
            target, args = args[1], (args[0], *args[2:])
        there = here if target is None else torch.device(target).type == "cuda"
        self.look(name, tensors, kwargs, here, there)
        if name in MOVES and target is not None:
            func, args = Tensor.to, (args[0], "cpu", *args[1:])
            kwargs["copy"] = here != there or kwargs.get("copy", False)
        with torch._C.DisableTorchFunctionSubclass():
            if not here and not there:
                return func(*args, **kwargs)
            with self.operations:
                if name in IN_FP32 and torch.is_autocast_enabled("cpu"):
                    args = tree_map_only(Tensor, lambda t: t.float(), args)
                result = func(*args, **kwargs)
            kind = Cuda if there else Tensor
            return tree_map_only(
                Tensor, lambda t: t if type(t) is kind else t.as_subclass(kind), result
            )

    def look(self, name: str, tensors: list, kwargs: dict, here: bool, there: bool) -> None:
        """Count what the host waits for; RuntimeError where tensors of two devices meet."""
        others = [t for t in tensors if not isinstance(t, Cuda)]
        if name == "copy_":
            here, there = (isinstance(t, Cuda) for t in (tensors[1], tensors[0]))
        if here and name in READS:
            self.wait(name)
        elif here and name == "numpy":
            raise TypeError("can't convert a cuda:0 tensor to numpy")
        elif name in MOVES or name in ("copy_", "tensor", "as_tensor"):
            ready = kwargs.get("non_blocking") and all(hasattr(t, "pinned") for t in others)
            if here != there and not (there and ready):
                self.wait("to cuda" if there else "to cpu")
        elif here and name in ("__getitem__", "__setitem__"):
            if others or any(t.dtype == torch.bool for t in tensors[1:]):
                self.wait(name)
        elif here and name not in ("__set__", "set_") and any(t.ndim for t in others):
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU, at {place()}")

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {place()}"] += 1


def place() -> str:
    """The innermost line of the package or of a script that is executed now."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "fibldm" or path.stem.startswith(("train_", "sample", "encode_")):
            return f"{path.name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "?"


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """PyTorch has a GPU with bf16, in this thread and in those that read ahead."""
    waits: Counter[str] = Counter()
    autocast, group = torch.autocast, torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def groups(*args: Any, **kwargs: Any) -> dict:
        found = group(*args, **kwargs)
        return {(DEVICE, dtype): tensors for (_, dtype), tensors in found.items()}

    def pool(max_workers: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers, initializer=lambda: Gpu(waits).__enter__())

    cuda = {
        "get_device_name": lambda device=None: "a pretended GPU",
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0), "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda: (2**36, 2**36), "max_memory_allocated": lambda: 2**30,
        "manual_seed_all": lambda seed: None, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    clip = torch.nn.utils.clip_grad
    before = torch.utils.deterministic.fill_uninitialized_memory
    with contextlib.ExitStack() as stack:
        for name, function in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for owner, name, function in (
            (torch, "autocast", lambda device, *how, **more: autocast("cpu", *how, **more)),
            (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None),
            (clip, "_has_foreach_support", lambda tensors, device: True),
            (clip, "_group_tensors_by_device_and_dtype", groups),
            (datasets, "ThreadPoolExecutor", pool),
        ):
            stack.enter_context(mock.patch.object(owner, name, function, create=True))
        try:
            yield stack.enter_context(Gpu(waits))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = before


def of_a_step(stage: Callable[[int], None], few: int, many: int) -> tuple[float, float, Counter]:
    """Dispatches, kernels and waits of one step, by runs of few and of many steps."""
    found = []
    for steps in few, many:
        with pretended_gpu() as gpu:
            stage(steps)
        found.append((gpu.operations.dispatches, gpu.operations.kernels, gpu.waits))
    (dispatches, kernels, waits), more = found
    steps, waits = many - few, more[2] - waits
    each = {where: count / steps for where, count in waits.items()}
    return (more[0] - dispatches) / steps, (more[1] - kernels) / steps, Counter(each)
