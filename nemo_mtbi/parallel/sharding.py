"""A Transformers causal LM spread over tensor-parallel ranks with Megatron-Core layers, by the model's own published
plan.

The model stays what it is: its linear layers are replaced by ``ColumnParallelLinear`` and ``RowParallelLinear``, its
token embedding by ``VocabParallelEmbedding``, its output layer by the matching rows. Logits stay spread over the
vocabulary; the objective (:mod:`nemo_mtbi.losses.imitation`) takes them so. No NeMo import in here.
"""

import copy
import fnmatch
import logging
import math
from collections import defaultdict
from typing import Any

import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from peft.tuners.lora import LoraLayer
from torch import nn

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.vocabulary import VocabularyShard
from nemo_mtbi.modules.causal_lm import RECOMPUTATION, causal_lm
from nemo_mtbi.parallel.blocks import SequenceParallel, share_input
from nemo_mtbi.parallel.layers import ColumnLinear, RowLinear, ScaledVocabParallelEmbedding, VocabularyHead
from nemo_mtbi.parallel.parts import Part, part_of

COLUMN, ROW = "colwise", "rowwise"
FUSED = {
    ("qkv_proj", "colwise_gather_output"): COLUMN,
    ("gate_up_proj", "colwise_gather_output"): COLUMN,
    ("o_proj", "rowwise_split_input"): ROW,
    ("down_proj", "rowwise_split_input"): ROW,
}
FUSED_INPUTS = ("qkv_proj", "gate_up_proj")
REPLICATED = ("replicated_with_grad_allreduce", "replicated", "colwise_gather_output", "rowwise_split_input")


def tensor_parallel_plan(llm: nn.Module) -> dict[str, str]:
    """The model's own plan, module name pattern -> style, relative to the ``...ForCausalLM``."""
    own = dict(getattr(llm, "_tp_plan", None) or {})
    base = getattr(llm.config, "base_model_tp_plan", None) or {}
    return {**{f"model.{k}": v for k, v in base.items()}, **own}


def check_divisible(config: Any, size: int) -> None:
    """
    Raises:
        ConfigError: heads or feed-forward width cannot be divided; names the sizes that can.
    """
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    allowed = [n for n in range(1, heads + 1) if not (heads % n or config.intermediate_size % n or (kv % n and n % kv))]
    if size not in allowed:
        raise ConfigError(
            f"tensor_model_parallel_size={size} does not divide this LLM: {heads} attention heads, {kv} key/value "
            f"heads, "
            f"feed-forward width {config.intermediate_size}. Sizes that do: {', '.join(map(str, allowed))}."
        )


def shard_llm(llm: nn.Module, sequence_parallel: bool = False) -> VocabularyShard:
    """Replace the layers of a ``...ForCausalLM`` by this rank's shards, in place.

    Args:
        llm: a Transformers model with a tensor-parallel plan, with LoRA or without; :func:`initialize` has been called.
        sequence_parallel: keep the activations between attention and feed-forward blocks spread over positions.

    Returns:
        Where this rank's rows of the vocabulary stand, for the objective.

    Raises:
        ConfigError: the model has no plan, or its sizes cannot be divided.
    """
    lm = causal_lm(llm)
    group = parallel_state.get_tensor_model_parallel_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    plan = tensor_parallel_plan(lm)
    if not plan:
        raise ConfigError(
            f"{type(lm).__name__} publishes no tensor-parallel plan (_tp_plan); use tensor_model_parallel_size=1."
        )
    check_divisible(lm.config, size)
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=lm.dtype,
    )
    require_layers(lm, plan)
    styles = {name: _style(lm, name, plan) for name, module in lm.named_modules() if _is_projection(name, module)}
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in styles:
        blocks[name.rpartition(".")[0]].append(name)
    for block, names in blocks.items():
        sharded = [n for n in names if styles[n] is not None]
        together = len(sharded) == len(names)
        if sequence_parallel and not together:
            raise ConfigError(
                f"sequence_parallel: {sorted(set(names) - set(sharded))[0]} stays whole on every rank by the LLM's "
                "tensor-parallel plan, so it needs all positions. Set model.sequence_parallel=false."
            )
        for name in sharded:
            _shard_layer(lm, name, styles[name], config, rank, size)
            if styles[name] == COLUMN and not together:
                share_input(lm.get_submodule(name))
            elif styles[name] == ROW and sequence_parallel:
                _leave_summands(lm.get_submodule(name))
        if together and not sequence_parallel:
            share_input(lm.get_submodule(block))
    if sequence_parallel:
        inside = [lm.get_submodule(b) for b, names in blocks.items() if styles[names[0]]]
        setattr(lm, RECOMPUTATION, SequenceParallel(lm.model, inside, size).recomputation)
    _local_heads(lm, size)
    return _shard_vocabulary(lm, config, group, rank, size)


def _is_projection(name: str, module: nn.Module) -> bool:
    """A linear layer of the LLM, or the LoRA layer around one."""
    parts = name.split(".")
    inside_adapter = "base_layer" in parts or "lora_A" in parts or "lora_B" in parts
    return isinstance(module, nn.Linear | LoraLayer) and not inside_adapter and name != "lm_head"


def require_layers(lm: nn.Module, plan: dict[str, str]) -> None:
    """
    Raises:
        ConfigError: the plan spreads parameters that are no linear layer, such as the experts of a mixture.
    """
    for name, _ in lm.named_parameters():
        style = next((s for pattern, s in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style is not None and style not in REPLICATED:
            raise ConfigError(
                f"{type(lm).__name__}: the plan spreads {name} ({style}), which is no linear layer (a mixture of "
                "experts, attention sinks); tensor parallelism here has none for it. Use tensor_model_parallel_size=1."
            )


def _style(lm: nn.Module, name: str, plan: dict[str, str]) -> str | None:
    """``COLUMN``, ``ROW``, or None where the layer stays whole."""
    style = next((s for pattern, s in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
    # Transformers keeps fused projections whole, because a plain cut would mix their blocks; ours keeps them apart.
    # Without a fused one beside it, a layer is whole for another reason (OLMo: a norm over all heads).
    block, _, leaf = name.rpartition(".")
    if style is not None and any(hasattr(lm.get_submodule(block), fused) for fused in FUSED_INPUTS):
        style = FUSED.get((leaf, style), style)
    if style in (COLUMN, ROW):
        return style
    if style not in REPLICATED:
        logging.getLogger(__name__).warning(
            "%s has no tensor-parallel plan (%s): replicated on every rank", name, style
        )
    return None


def _leave_summands(layer: nn.Module) -> None:
    """Let a row-parallel layer, and the LoRA layer around it, leave the sum over the ranks to its block."""
    for module in layer.modules():
        if isinstance(module, RowLinear):
            module.summed = False
    if isinstance(layer, LoraLayer):
        for b in layer.lora_B.parameters():
            b.partial_gradient = True  # type: ignore[attr-defined]


def _shard_layer(lm: Any, name: str, style: str | None, config: ModelParallelConfig, rank: int, size: int) -> None:
    """Replace one linear layer, under its LoRA layer if it has one."""
    parent, _, leaf = name.rpartition(".")
    module: Any = lm.get_submodule(name)
    base: Any = module.base_layer if isinstance(module, LoraLayer) else module
    new = _shard_linear(base, style, leaf, lm.config, config, rank, size)
    if isinstance(module, LoraLayer):
        module.base_layer = new
        _shard_adapters(module, name, style, config)
    else:
        setattr(lm.get_submodule(parent), leaf, new)


def _shard_adapters(layer: Any, name: str, style: str | None, config: ModelParallelConfig) -> None:
    """Cut LoRA's matrices with their layer: the rows of B of a column-parallel one, the columns of A of a
    row-parallel one.

    The other matrix is whole on every rank. That of a column-parallel layer sees only the gradient through this
    rank's rows.
    """
    part = part_of(layer.base_layer.weight)
    assert part is not None
    if layer.lora_variant or any(layer.lora_bias.values()):
        raise ConfigError(
            f"{name}: DoRA and LoRA with biases are not supported with tensor_model_parallel_size > 1; use plain LoRA."
        )
    if part.copies > 1 and len(part.ranges) > 1:
        raise ConfigError(
            f"{name}: LoRA on a fused projection with fewer key/value heads than ranks is not supported; take a "
            "tensor_model_parallel_size that divides them, or leave it out of lora.target_modules."
        )
    for key, a in layer.lora_A.items():
        if style == COLUMN:
            b = layer.lora_B[key]
            b.weight, b.out_features = part.parameter(b.weight), part.size
            a.weight.partial_gradient = True
        else:
            own = copy.copy(config)
            own.params_dtype = a.weight.dtype
            row = RowLinear(
                a.in_features,
                a.out_features,
                config=own,
                init_method=lambda _: None,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
            )
            row.weight = part.parameter(a.weight)
            layer.lora_A[key] = row


def _shard_linear(
    module: nn.Linear, style: str | None, leaf: str, hf: Any, config: ModelParallelConfig, rank: int, size: int
) -> nn.Module:
    bias = module.bias
    if style == COLUMN:
        part = _column_part(module, leaf, hf, rank, size)
        new: Any = ColumnLinear(
            module.in_features,
            part.size * size,
            config=config,
            init_method=lambda _: None,
            bias=bias is not None,
            gather_output=False,
            disable_grad_reduce=True,
        )
        if bias is not None:
            new.bias = part.parameter(bias)
    else:
        part = Part.of_blocks(1, [module.in_features], [(rank, size)])
        new = RowLinear(
            module.in_features,
            module.out_features,
            config=config,
            init_method=lambda _: None,
            bias=bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        if bias is not None:
            new.bias = bias
    new.weight = part.parameter(module.weight)
    return new


def _column_part(module: nn.Linear, leaf: str, hf: Any, rank: int, size: int) -> Part:
    """Rows of a column-parallel layer; fused ones are cut block by block."""
    heads = hf.num_attention_heads
    kv = getattr(hf, "num_key_value_heads", None) or heads
    # Fewer key/value heads than ranks: each head is kept on several ranks.
    copies = max(1, size // kv)
    own, key_value = (rank, size), ((rank, size) if kv >= size else (rank // copies, kv))
    if leaf == "qkv_proj":
        head = module.out_features // (heads + 2 * kv)
        return Part.of_blocks(0, [heads * head, kv * head, kv * head], [own, key_value, key_value], copies)
    if leaf == "gate_up_proj":
        return Part.of_blocks(0, [module.out_features // 2] * 2, [own, own])
    if leaf in ("k_proj", "v_proj"):
        return Part.of_blocks(0, [module.out_features], [key_value], copies)
    return Part.of_blocks(0, [module.out_features], [own])


def _local_heads(llm: Any, size: int) -> None:
    """Tell attention modules how many heads they hold now."""
    heads, kv = llm.config.num_attention_heads, getattr(llm.config, "num_key_value_heads", None)
    local = copy.copy(llm.config)
    local.num_attention_heads = heads // size
    local.num_key_value_heads = max(1, (kv or heads) // size)
    for module in llm.modules():
        projection = getattr(module, "q_proj", getattr(module, "qkv_proj", None))
        projection = projection.base_layer if isinstance(projection, LoraLayer) else projection
        if hasattr(module, "num_key_value_groups") and isinstance(projection, ColumnLinear):
            module.num_key_value_groups = local.num_attention_heads // local.num_key_value_heads
            if hasattr(module, "qkv_proj"):  # it cuts the fused projection by these
                module.config, module.num_key_value_heads = local, local.num_key_value_heads


def _shard_vocabulary(llm: Any, config: ModelParallelConfig, group: Any, rank: int, size: int) -> VocabularyShard:
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    vocabulary = embedding.weight.shape[0]
    rows = math.ceil(vocabulary / size)
    shard = VocabularyShard(rank * rows, max(0, min(rows, vocabulary - rank * rows)), group)

    part = Part(0, ((rank * rows, (rank + 1) * rows),), rows)
    new = ScaledVocabParallelEmbedding(
        rows * size,
        embedding.weight.shape[1],
        init_method=lambda _: None,
        config=config,
        scale=float(getattr(embedding, "embed_scale", 1.0)),
    )
    new.weight = part.parameter(embedding.weight)
    new.vocabulary = vocabulary
    tied = head.weight is embedding.weight
    weight = new.weight if tied else part.parameter(head.weight)
    bias = None if head.bias is None else part.parameter(head.bias)
    llm.set_input_embeddings(new)
    llm.lm_head = VocabularyHead(weight, bias, vocabulary, shard)
    return shard
