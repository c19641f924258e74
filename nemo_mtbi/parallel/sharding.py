"""A Transformers causal LM spread over tensor-parallel ranks with Megatron-Core layers, by the model's own published plan.

The model stays what it is: its linear layers are replaced by ``ColumnParallelLinear`` and ``RowParallelLinear``, its token
embedding by ``VocabParallelEmbedding``, its output layer by the matching rows. Logits stay spread over the vocabulary; the
objective (:mod:`nemo_mtbi.losses.imitation`) takes them so. No NeMo import in here.
"""

import fnmatch
import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.vocabulary import VocabularyShard

COLUMN, ROW = "colwise", "rowwise"
REPLICATED = ("replicated_with_grad_allreduce", "replicated", "colwise_gather_output", "rowwise_split_input")


class ColumnLinear(ColumnParallelLinear):
    """``ColumnParallelLinear`` that returns the output alone, as ``nn.Linear`` does. (..., in) -> (..., out / ranks)."""

    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_)[0]


class RowLinear(RowParallelLinear):
    """``RowParallelLinear`` that returns the output alone. (..., in / ranks) -> (..., out), summed over the ranks."""

    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_)[0]


class ScaledVocabParallelEmbedding(VocabParallelEmbedding):
    """Token embedding whose rows are spread over the ranks; ``scale`` is Gemma's factor on the output."""

    def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, input_: Tensor) -> Tensor:
        output = super().forward(input_)
        return output if self.scale == 1.0 else output * self.scale


class VocabularyHead(nn.Module):
    """This rank's rows of ``lm_head``. Called as a layer (generation), it gathers the logits of the whole vocabulary."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, vocabulary: int, shard: VocabularyShard
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.vocabulary, self.shard = weight, bias, vocabulary, shard

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., H) -> logits (..., V), without a gradient."""
        local = nn.functional.linear(hidden, self.weight, self.bias).detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(self.shard.group))]
        dist.all_gather(parts, local, group=self.shard.group)
        return torch.cat(parts, -1)[..., : self.vocabulary]


def initialize(tensor_model_parallel_size: int) -> None:
    """Set up Megatron-Core's process groups (tensor x data parallel) once ``torch.distributed`` is initialized.

    Raises:
        ConfigError: the world size is no multiple of the tensor-parallel size.
    """
    world = dist.get_world_size()
    if world % tensor_model_parallel_size:
        raise ConfigError(
            f"{world} processes cannot be divided into tensor-parallel groups of {tensor_model_parallel_size}. "
            "Start a multiple of tensor_model_parallel_size processes."
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_model_parallel_size)


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
            f"tensor_model_parallel_size={size} does not divide this LLM: {heads} attention heads, {kv} key/value heads, "
            f"feed-forward width {config.intermediate_size}. Sizes that do: {', '.join(map(str, allowed))}."
        )


def shard_llm(llm: Any) -> VocabularyShard:
    """Replace the layers of a loaded ``...ForCausalLM`` by this rank's shards, in place.

    Args:
        llm: a Transformers model with a tensor-parallel plan; :func:`initialize` has been called.

    Returns:
        Where this rank's rows of the vocabulary stand, for the objective.

    Raises:
        ConfigError: the model has no plan, or its sizes cannot be divided.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    plan = tensor_parallel_plan(llm)
    if not plan:
        raise ConfigError(
            f"{type(llm).__name__} publishes no tensor-parallel plan (_tp_plan); use tensor_model_parallel_size=1."
        )
    check_divisible(llm.config, size)
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=llm.dtype,
    )
    for name, module in list(llm.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        style = next((s for pattern, s in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style in (COLUMN, ROW):
            parent, _, leaf = name.rpartition(".")
            setattr(llm.get_submodule(parent), leaf, _shard_linear(module, style, leaf, llm.config, config, rank, size))
        elif style not in REPLICATED:
            logging.getLogger(__name__).warning(
                "%s has no tensor-parallel plan (%s): replicated on every rank", name, style
            )
    for module in llm.modules():
        if hasattr(module, "num_key_value_groups"):
            kv = llm.config.num_key_value_heads
            module.num_key_value_groups = (llm.config.num_attention_heads // size) // max(1, kv // size)
    return _shard_vocabulary(llm, config, group, rank, size)


def _slice(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    return tensor.detach().chunk(size, dim)[rank].clone()


def _shard_linear(
    module: nn.Linear, style: str, leaf: str, hf: Any, config: ModelParallelConfig, rank: int, size: int
) -> nn.Module:
    bias = module.bias
    weight: Tensor = module.weight
    local_bias: Tensor | None = bias
    if style == COLUMN:
        kv = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
        outputs = module.out_features
        if leaf in ("k_proj", "v_proj") and kv < size:
            # Fewer key/value heads than ranks: each head is kept on several ranks.
            weight = _slice(weight, 0, rank // (size // kv), kv)
            local_bias = _slice(bias, 0, rank // (size // kv), kv) if bias is not None else None
            outputs = weight.shape[0] * size
        else:
            weight = _slice(weight, 0, rank, size)
            local_bias = _slice(bias, 0, rank, size) if bias is not None else None
        new: Any = ColumnLinear(
            module.in_features,
            outputs,
            config=config,
            init_method=lambda _: None,
            bias=bias is not None,
            gather_output=False,
        )
    else:
        weight = _slice(weight, 1, rank, size)
        new = RowLinear(
            module.in_features, module.out_features, config=config, init_method=lambda _: None, bias=bias is not None,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
    new.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    if bias is not None and local_bias is not None:
        new.bias = nn.Parameter(local_bias.detach().clone(), requires_grad=bias.requires_grad)
    return new


def _shard_vocabulary(llm: Any, config: ModelParallelConfig, group: Any, rank: int, size: int) -> VocabularyShard:
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    vocabulary = embedding.weight.shape[0]
    rows = math.ceil(vocabulary / size)
    shard = VocabularyShard(rank * rows, max(0, min(rows, vocabulary - rank * rows)), group)

    def local(weight: Tensor) -> Tensor:
        padded = weight.new_zeros(rows, *weight.shape[1:])
        part = weight.detach()[rank * rows : (rank + 1) * rows]
        padded[: part.shape[0]] = part
        return padded

    new = ScaledVocabParallelEmbedding(
        rows * size, embedding.weight.shape[1], init_method=lambda _: None, config=config,
        scale=float(getattr(embedding, "embed_scale", 1.0)),
    )  # fmt: skip
    new.weight = nn.Parameter(local(embedding.weight), requires_grad=embedding.weight.requires_grad)
    tied = head.weight is embedding.weight
    weight = new.weight if tied else nn.Parameter(local(head.weight), requires_grad=head.weight.requires_grad)
    bias = None if head.bias is None else nn.Parameter(local(head.bias), requires_grad=head.bias.requires_grad)
    llm.set_input_embeddings(new)
    llm.lm_head = VocabularyHead(weight, bias, vocabulary, shard)
    return shard
