"""What a training run would need on GPUs: bytes by part, the longest batch, hours. Nothing is loaded.

Bytes of the frozen LLM are those of its real layers, built on PyTorch's ``meta`` device and cut by
:func:`nemo_mtbi.parallel.sharding.shard_llm` for one rank of a pretended process group. The rest is arithmetic.

Letters: P parameters of the LLM, K layers, H width, L positions of an example, n tensor-parallel ranks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.parallel.loading import empty_llm
from nemo_mtbi.parallel.plan_config import GB, PlanConfig
from nemo_mtbi.parallel.sharding import check_divisible, shard_llm

LOGIT_BYTES = 0.5 * GB  # chunks of logits and their gradients, see losses/chunk.py
ADAM_BYTES = 16  # float32 weight, gradient and two moments
# Of activations for each position, unit of width and layer (Korthikanti et al., arXiv 2205.05198, without attention
# scores): what the ranks share, and what each keeps whole unless the sequence is spread too (the inputs of both norms).
SHARED_BYTES, WHOLE_BYTES = 26, 8
CONTEXT_BYTES = 1.5 * GB  # CUDA, NCCL, libraries


@dataclass(frozen=True)
class Plan:
    """What it comes to.

    Attributes:
        parameters: P.
        bytes_by_part: on one GPU, without activations.
        bytes_per_position: of activations.
        example_positions: L.
        longest_batch: positions of a micro-batch that fit on a GPU; 0: the frozen parts alone do not.
        positions_per_second: of all GPUs.
        examples: of the run.
        hours: of it.
    """

    parameters: int
    bytes_by_part: dict[str, float]
    bytes_per_position: float
    example_positions: int
    longest_batch: int
    positions_per_second: float
    examples: float
    hours: float

    @property
    def fits(self) -> bool:
        return self.longest_batch >= self.example_positions


def plan(config: PlanConfig, llm_config: Any) -> Plan:
    """
    Args:
        config: checked.
        llm_config: Transformers' configuration of the LLM.

    Raises:
        ConfigError: the LLM cannot be cut that way.
    """
    llm_config = llm_config.get_text_config()
    n, where = config.tensor_model_parallel_size, config.positions
    whole, own = llm_bytes(llm_config, n, config.trust_remote_code)
    parts = {
        "frozen LLM (bf16)": float(own),
        "frozen encoder (bf16)": 2.0 * config.encoder_parameters,
        "connector, gradients, Adam": ADAM_BYTES * config.connector_parameters,
        "chunks of logits": LOGIT_BYTES,
        "CUDA and libraries": CONTEXT_BYTES,
    }
    layers, width = llm_config.num_hidden_layers, llm_config.hidden_size
    one_layer = width * (SHARED_BYTES / n + WHOLE_BYTES / (n if config.sequence_parallel else 1))
    per_position = one_layer * layers if not config.activation_checkpointing else 2 * width * layers + one_layer
    length = where.prompt + round(where.per_second * config.utterance_seconds) + where.response
    left = config.gpu_memory_gb * GB - sum(parts.values())
    parameters = whole // 2
    # Forward, and backward to the inputs alone, since the weights are frozen; a second forward where memory is saved.
    passes = 2 + config.activation_checkpointing + (config.teacher == "online")
    flops = passes * (2 * parameters + 2 * layers * width * length)
    rate = config.gpus * config.gpu_tflops * 1e12 * config.utilization / flops
    examples = config.hours_of_speech * 3600 / config.utterance_seconds * config.examples_per_utterance * config.epochs
    return Plan(
        parameters,
        parts,
        per_position,
        length,
        max(0, math.floor(left / per_position)),
        rate,
        examples,
        examples * length / rate / 3600,
    )


def llm_bytes(config: Any, size: int, trust_remote_code: bool = False) -> tuple[int, int]:
    """Bytes of an LLM's weights in bf16: of all, and of one of ``size`` tensor-parallel ranks.

    Raises:
        ConfigError: it cannot be cut into so many.
    """
    llm = empty_llm(config, torch.bfloat16, trust_remote_code)
    whole = _bytes(llm)
    if size == 1:
        return whole, whole
    check_divisible(llm.config, size)
    with pretended_ranks(size):
        shard_llm(llm)
        return whole, _bytes(llm)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in module.parameters()}.values())


@contextmanager
def pretended_ranks(size: int) -> Iterator[None]:
    """The first of ``size`` tensor-parallel ranks, without the others: nothing may be sent."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("A plan is made by one process; start it without torchrun.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        parallel_state.initialize_model_parallel(size, create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
