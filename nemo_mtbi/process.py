"""Settings of the process for work on CPUs."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's mallopt parameters (malloc.h)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
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
    if sys.platform == "linux" and not torch.cuda.is_available():
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # musl and others
            return
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**27)


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
