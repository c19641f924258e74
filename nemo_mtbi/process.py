"""Settings of the process for work on CPUs."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's mallopt parameters (malloc.h)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
LARGEST_THRESHOLD = 32 * 2**20  # glibc accepts no more; larger blocks stay mapped, which also limits fragmentation


def tune(threads: int | None = None) -> None:
    """Number of PyTorch threads (None: its own choice), TensorFloat-32 on GPUs, and a heap that keeps what it has.

    Large temporaries are otherwise mapped, page-faulted and unmapped at every operation, which takes a good part of
    the loss's time. GPU memory is not concerned.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where the connector and its loss compute in fp32
    if not torch.cuda.is_available():
        heap_options({M_MMAP_THRESHOLD: LARGEST_THRESHOLD, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**27})


def heap_options(values: dict[int, int]) -> None:
    """glibc's ``mallopt``; nothing elsewhere."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others
        return
    for option, value in values.items():
        mallopt(option, value)


def expect_any_length() -> None:
    """Settings for audio of any length, in processes that answer; to be called before anything is computed.

    oneDNN keeps the CPU kernels of 32 shapes, not of 1,024: new lengths bring new shapes again and again, whose kernels
    take about a megabyte each and are seldom used again (one forward pass has fewer than 32). All threads share one
    heap: the thread that hears, and those that read requests, would each keep what the largest audio took.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    heap_options({M_ARENA_MAX: 1})


def fast_bfloat16() -> bool:
    """Whether this machine computes faster in bfloat16 than in float32: a GPU, or an x86 CPU with instructions for it.

    Other CPUs emulate it: a product of matrices takes three times as long as in float32 on a Xeon with AVX-512 alone.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = torch.cpu.get_capabilities()
    return any(instructions.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection, e.g. while NeMo is imported: the collector would walk its million objects again and again,
    which takes a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
