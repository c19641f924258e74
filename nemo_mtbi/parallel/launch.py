"""Tensor parallelism outside training: launchers that ``torchrun`` starts once for each rank."""

import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.parallel.ranks import gathered_objects, rank_and_size

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # one rank may work alone that long (the cascade's ASR; finding the place in the data)


def join_ranks(size: int, launcher: str) -> torch.device:
    """Join the tensor-parallel group of all processes, and seed them alike, so that sampling draws the same tokens.

    Args:
        size: ranks that hold the LLM together; 1 is a plain process.
        launcher: name under ``nemo_mtbi.examples``, for the message.

    Returns:
        This process's device.

    Raises:
        ConfigError: another number of processes was started.
    """
    cuda = torch.cuda.is_available()
    if size == 1:
        return torch.device("cuda" if cuda else "cpu")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != size:
        raise ConfigError(
            f"tensor_model_parallel_size={size} needs {size} processes, {started} started. Launch it as "
            f"torchrun --nproc-per-node={size} -m nemo_mtbi.examples.{launcher} ..."
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(backend(), timeout=PATIENCE)
    initialize(size, PATIENCE)
    torch.manual_seed(0)
    return device


def chosen_device(name: str, size: int, launcher: str) -> torch.device:
    """The device of a launcher's ``device`` (``auto``, ``cpu``, ``cuda`` or ``cuda:N``); see :func:`join_ranks`.

    Apple's GPUs (``mps``) have no float64, in which positions are computed.

    Raises:
        ConfigError: no such device.
    """
    if size > 1 and name != "auto":
        raise ConfigError(f"device={name}: with tensor_model_parallel_size={size} each rank has its own; use auto.")
    if name == "auto":
        return join_ranks(size, launcher)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device={name}: use auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: PyTorch finds no such device here. Use device=auto.")
    return device


def backend() -> str:
    """Of the process groups. With GPUs also one for CPU tensors: weights meet that have not moved to a GPU yet, or
    that Lightning has taken from there after training.
    """
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def initialize(tensor_model_parallel_size: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Set up Megatron-Core's process groups (tensor x data parallel) once ``torch.distributed`` is initialized.

    Raises:
        ConfigError: the world size is no multiple of the tensor-parallel size.
    """
    from megatron.core import parallel_state  # start-up: one process needs none of it

    world = dist.get_world_size()
    if world % tensor_model_parallel_size:
        raise ConfigError(
            f"{world} processes cannot be divided into tensor-parallel groups of {tensor_model_parallel_size}. "
            "Start a multiple of tensor_model_parallel_size processes."
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first_rank(compute: Callable[[], T]) -> T:
    """What the first rank computes, on every rank."""
    box = [compute() if is_first_rank() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def tensors_from_first_rank(load: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors on the CPU that the first rank loads, on every rank; one travels at a time, as it is.

    Other ranks may not see the first one's files. (Pickled as one object they take four times their memory.)
    """
    own = load() if is_first_rank() else {}
    shapes = from_first_rank(lambda: {name: (t.shape, t.dtype) for name, t in own.items()})
    if dist.is_initialized():
        for name, (shape, dtype) in shapes.items():
            own[name] = own[name].contiguous() if is_first_rank() else torch.empty(shape, dtype=dtype)
            dist.broadcast(own[name], src=0)
    return own


def choose_gpu() -> None:
    """This process's own one as CUDA's current device, before anything is loaded to "cuda": NeMo loads encoders so."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if torch.cuda.is_available() and local is not None and int(local) < torch.cuda.device_count():
        torch.cuda.set_device(int(local))


@contextmanager
def once_per_node(folder: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """A temporary folder that the first rank of each node makes for all of them; it stays until all have left.

    Ranks that do not see it (containers with a file system of their own) make theirs.

    Raises:
        CheckpointError: what making it raised, on every rank of the node.
    """
    host = socket.gethostname()
    hosts = gathered_objects(host, None)
    with ExitStack() as stack:
        own, problem = None, None
        if hosts.index(host) == rank_and_size(None)[0]:
            try:
                own = stack.enter_context(folder())
            except (CheckpointError, OSError) as error:
                problem = str(error)
        shared, problem = gathered_objects((own, problem), None)[hosts.index(host)]
        if problem is not None:
            raise CheckpointError(problem)
        yield shared if shared.is_dir() else stack.enter_context(folder())
        gathered_objects(None, None)  # not after an error, of which the others, elsewhere, know nothing
