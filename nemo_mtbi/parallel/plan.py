"""What a training run would need on GPUs: bytes by part, the longest batch, hours. Nothing is loaded.

Bytes of the frozen LLM are those of its real layers, built on PyTorch's ``meta`` device and cut by
:func:`nemo_mtbi.parallel.sharding.shard_llm` for one rank of a pretended process group. The rest is arithmetic.

Letters: P parameters of the LLM, K layers, H width, L positions of an example, n tensor-parallel ranks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.causal_lm import used_and_trained
from nemo_mtbi.parallel.loading import empty_llm
from nemo_mtbi.parallel.plan_config import GB, PlanConfig
from nemo_mtbi.parallel.sharding import check_divisible, shard_llm

LOGIT_BYTES = 0.5 * GB  # chunks of logits and their gradients, see losses/imitation.py
TRAINED_BYTES, ADAM_BYTES = 8, 8  # float32: weight and gradient; two moments
# What a layer of frozen weights in bfloat16 keeps of a position for its backward pass, without scores (measured
# with saved-tensor hooks on Llama, Qwen, Gemma): of each unit of the feed-forward width the gate, its activation and
# the other factor; queries, keys, values and what attention gives; of each norm its input in float32.
FEED_FORWARD_BYTES, ATTENTION_BYTES, NORM_BYTES = 6, 2, 4
CONTEXT_BYTES = 1.5 * GB  # CUDA, NCCL, libraries


@dataclass(frozen=True)
class Plan:
    """What it comes to.

    Attributes:
        parameters: P.
        bytes_by_part: on one GPU, without activations.
        bytes_per_position: of the LLM's activations.
        bytes_per_example: of the connector's.
        example_positions: L.
        longest_batch: positions of a micro-batch that fit on a GPU; 0: the frozen parts alone do not.
        positions_per_second: of all GPUs.
        examples: of the run.
        hours: of it.
    """

    parameters: int
    bytes_by_part: dict[str, float]
    bytes_per_position: float
    bytes_per_example: float
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
    llm = measured(llm_config, n, config.trust_remote_code)
    copies = config.gpus // n if config.shard_optimizer else 1
    parts = {
        "frozen LLM (bf16)": float(llm.own_bytes),
        "frozen encoder (bf16)": 2.0 * config.encoder_parameters,
        "connector, gradients, Adam": (TRAINED_BYTES + ADAM_BYTES / copies) * config.connector_parameters,
        "chunks of logits": LOGIT_BYTES,
        "CUDA and libraries": CONTEXT_BYTES,
    }
    layers, width = llm_config.num_hidden_layers, llm_config.hidden_size
    one_layer = llm.shared_bytes / n + llm.norm_bytes / (n if config.sequence_parallel else 1)
    per_position = one_layer * layers if not config.activation_checkpointing else 2 * width * layers + one_layer
    per_example = config.connector_mb_per_example * 1e6
    length = where.prompt + round(where.per_second * config.utterance_seconds) + where.response
    left = config.gpu_memory_gb * GB - sum(parts.values())
    # Forward, and backward to the inputs alone, since the weights are frozen; a second forward where memory is saved.
    passes = 2 + config.activation_checkpointing + (config.teacher == "online")
    products = llm.layer_weights + llm.head_weights * where.response / length
    flops = passes * (2 * products + 2 * layers * width * length)
    rate = config.gpus * config.gpu_tflops * 1e12 * config.utilization / flops
    examples = config.hours_of_speech * 3600 / config.utterance_seconds * config.examples_per_utterance * config.epochs
    return Plan(
        llm.whole_bytes // 2,
        parts,
        per_position,
        per_example,
        length,
        max(0, math.floor(left / (per_position + per_example / length))),
        rate,
        examples,
        examples * length / rate / 3600,
    )


@dataclass(frozen=True)
class Measured:
    """Of an LLM that is not loaded.

    Attributes:
        whole_bytes, own_bytes: its weights in bf16: all, and those of one of ``n`` ranks.
        layer_weights, head_weights: entries of the matrices that a position is multiplied with; of a mixture, those of
            the experts that it goes to.
        shared_bytes, norm_bytes: that one layer keeps of a position: what the ranks share, and what each keeps whole
            unless the sequence is spread too.
    """

    whole_bytes: int
    own_bytes: int
    layer_weights: float
    head_weights: float
    shared_bytes: float
    norm_bytes: float


def measured(config: Any, size: int, trust_remote_code: bool = False) -> Measured:
    """On the LLM's real layers, for one of ``size`` tensor-parallel ranks.

    Raises:
        ConfigError: it cannot be cut into so many.
    """
    llm = empty_llm(config, torch.bfloat16, trust_remote_code)
    config = llm.config
    whole = _bytes(llm)
    layer_weights, _ = used_and_trained(llm.model.layers.parameters(), config)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = head * heads, head * (getattr(config, "num_key_value_heads", None) or heads)
    experts = getattr(config, "num_experts_per_tok", None)
    of_experts = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    inner = experts * of_experts if experts else config.intermediate_size
    inner += getattr(config, "shared_expert_intermediate_size", None) or 0
    norms = [p.numel() for n, p in llm.model.layers[0].named_parameters() if p.ndim == 1 and n.endswith("norm.weight")]
    of_heads = any(own == head != config.hidden_size for own in norms)  # normalized queries and keys
    shared = FEED_FORWARD_BYTES * inner + 2 * ATTENTION_BYTES * (queries + keys)
    found = partial(
        Measured,
        whole,
        layer_weights=layer_weights,
        head_weights=float(llm.lm_head.weight.numel()),
        shared_bytes=shared + of_heads * NORM_BYTES * (queries + keys),
        norm_bytes=NORM_BYTES * config.hidden_size * norms.count(config.hidden_size),
    )
    if size == 1:
        return found(own_bytes=whole)
    check_divisible(config, size)
    with pretended_ranks(size):
        shard_llm(llm)
        return found(own_bytes=_bytes(llm))


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
