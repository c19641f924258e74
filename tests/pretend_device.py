"""A pretend GPU on a CPU: tensors with real data that say ``cuda:0``, refuse to meet CPU tensors, and count.

What it shows: every tensor of a step is on the device that it should be on, for what the CPU has to wait, how many
kernels start. What it does not: streams, memory, speed, the kernels' own precision. ``device`` is what Python code
sees; in C++, where autocast and autograd look, the tensors are the CPU's.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
PLACED = ("cat", "stack")  # refuse even CPU scalars


class OnGPU(Tensor):
    """A tensor with its data on the CPU, that says it is on a GPU."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, gpu: "PretendGPU | None" = None) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=data.device,
            requires_grad=data.requires_grad,
        )
        made.data_on_cpu = data.detach()
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        count("waits", "tolist")
        return self.data_on_cpu.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        require_one_device(name, args, kwargs)
        if name in WAITING or (name in INDEXING and any(_boolean(i) for i in args[1])):
            count("waits", name)
        if not _is_view(func):
            count("kernels", name)
        kwargs = {**(kwargs or {})}
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        written = func._schema.arguments[0].alias_info if func._schema.arguments else None
        if written is not None and written.is_write and isinstance(found, Tensor):
            return args[0]
        return tree_map(_outer, found)


def _inner(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, OnGPU) else value


def _outer(value: Any) -> Any:
    return OnGPU(value) if isinstance(value, Tensor) and not isinstance(value, OnGPU) else value


def _boolean(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def require_one_device(name: str, args: Any, kwargs: Any) -> None:
    """As CUDA's kernels: no tensor of the CPU beside one of the GPU, scalars excepted."""
    tensors: list[Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, (args, kwargs or {}))
    on_cpu = [t for t in tensors if not isinstance(t, OnGPU)]
    if not on_cpu or len(on_cpu) == len(tensors) or name in ("copy_", "_to_copy"):
        return
    if name in INDEXING and isinstance(args[0], OnGPU):  # an index on the CPU is copied
        on_cpu = [t for t in args[2:3] if not isinstance(t, OnGPU)]
    if name.startswith("_ctc_loss"):  # takes lengths on the CPU
        on_cpu = [t for t in args[:2] if isinstance(t, Tensor) and not isinstance(t, OnGPU)]
    if wrong := [t for t in on_cpu if t.dim() > 0 or name in PLACED]:
        shapes = ", ".join(str(tuple(t.shape)) for t in wrong)
        raise RuntimeError(f"{name}: expected all tensors on cuda:0, but found {shapes} on the CPU, at {where()}")


class _Move(torch.autograd.Function):
    """To the GPU or back, gradients the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return OnGPU(tensor.clone()) if to_gpu else _inner(tensor).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (_inner(grad) if ctx.to_gpu else _outer(grad)), None


class PretendGPU(TorchFunctionMode):
    """While it is entered, ``cuda`` is the pretend GPU.

    Attributes:
        waits: for what the CPU waited for the GPU, by operation and place.
        kernels: operations started, by name; those of modules under :meth:`apart` are left out.
    """

    current: "PretendGPU | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.kernels = Counter[str](), Counter[str]()
        self._apart = 0

    def __enter__(self) -> "PretendGPU":
        PretendGPU.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PretendGPU.current = None
        super().__exit__(*error)

    def apart(self, module: nn.Module) -> None:
        """Do not count the kernels of a module's forward pass."""
        module.register_forward_pre_hook(lambda *_: self._enter(1))
        module.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, step: int) -> None:
        self._apart += step

    def reset(self) -> None:
        self.waits.clear()
        self.kernels.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name == "pin_memory":
            first.is_in_pinned_memory = True
            return first
        if name in ("to", "cuda", "cpu") and isinstance(first, Tensor):
            return self._moved(name, first, args[1:], kwargs)
        if name == "pad_sequence" and any(isinstance(t, OnGPU) for t in first):
            longest = max(len(t) for t in first)
            zeros = [(0, 0) * (t.dim() - 1) + (0, longest - len(t)) for t in first]
            return torch.stack([nn.functional.pad(t, z) for t, z in zip(first, zeros, strict=True)])
        if _is(kwargs.get("device"), "cuda"):
            kwargs["device"] = "cpu"
            made = func(*args, **kwargs)
            if name in ("tensor", "as_tensor") and made.numel():
                count("waits", f"torch.{name} of numbers")
            return tree_map(_outer, made)
        return func(*args, **kwargs)

    def _moved(self, name: str, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        device = {"cuda": GPU, "cpu": torch.device("cpu")}.get(name, kwargs.get("device"))
        dtype = kwargs.get("dtype")
        for value in [*args, kwargs.get("other")]:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, str | torch.device):
                device = value
        if dtype is not None and dtype != tensor.dtype:
            tensor = torch._C.TensorBase.to(tensor, dtype)
        if _is(device, "cuda") and not isinstance(tensor, OnGPU):
            quick = kwargs.get("non_blocking") and getattr(tensor, "is_in_pinned_memory", False)
            if not quick and tensor.numel():
                count("waits", "to the GPU")
            return _Move.apply(tensor, True)
        if _is(device, "cpu") and isinstance(tensor, OnGPU):
            count("waits", "to the CPU")
            return _Move.apply(tensor, False)
        return tensor


def _is(device: Any, kind: str) -> bool:
    return device is not None and torch.device(device).type == kind


def count(what: str, name: str) -> None:
    gpu = PretendGPU.current
    if gpu is not None and what == "waits":
        gpu.waits[f"{name} at {where()}"] += 1
    elif gpu is not None and not gpu._apart:
        gpu.kernels[name] += 1


def where() -> str:
    """The innermost line of our own code."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "/nemo_mtbi/" in frame.filename and "site-packages" not in frame.filename:
            return f"{frame.filename.rpartition('/nemo_mtbi/')[2]}:{frame.lineno} {frame.line}"
    return "a backward pass"


def on_gpu(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the pretend GPU, in place."""
    known: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in known:
                moved = nn.Parameter(OnGPU(parameter.data), requires_grad=parameter.requires_grad)
                moved.__dict__.update({k: v for k, v in parameter.__dict__.items() if k != "data_on_cpu"})
                known[id(parameter)] = moved
            if parameter is not None:
                owner._parameters[name] = known[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, OnGPU):
                owner._buffers[name] = OnGPU(buffer)
    return module


@contextmanager
def pretend_gpu(module: nn.Module, apart: Callable[[], list[nn.Module]]) -> Iterator[PretendGPU]:
    """A module on the pretend GPU; kernels of the forward passes of ``apart()`` are not counted."""
    gpu = PretendGPU()
    on_gpu(module)
    for part in apart():
        gpu.apart(part)
    with gpu:
        yield gpu
