"""A Transformers causal LM spread over tensor-parallel ranks with Megatron-Core layers, by the model's own published plan.

The model stays what it is: its linear layers are replaced by ``ColumnParallelLinear`` and ``RowParallelLinear``, its token
embedding by ``VocabParallelEmbedding``, its output layer by the matching rows. Logits stay spread over the vocabulary; the
objective (:mod:`nemo_mtbi.losses.imitation`) takes them so. No NeMo import in here.
"""

import copy
import fnmatch
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from safetensors import safe_open
from torch import Tensor, nn

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.vocabulary import VocabularyShard

COLUMN, ROW = "colwise", "rowwise"
FUSED = {
    ("qkv_proj", "colwise_gather_output"): COLUMN,
    ("gate_up_proj", "colwise_gather_output"): COLUMN,
    ("o_proj", "rowwise_split_input"): ROW,
    ("down_proj", "rowwise_split_input"): ROW,
}
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


def equalize_gradients(parameters: list[nn.Parameter]) -> None:
    """Give the ranks of a tensor-parallel group the same bits: atomic additions on GPUs round differently on each, and
    connectors that drift apart would in the end emit different numbers of positions."""
    group = parallel_state.get_tensor_model_parallel_group()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    for gradient in (p.grad for p in parameters):
        if gradient is not None:
            dist.broadcast(gradient, source, group=group)


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


def empty_llm(config: Any, dtype: torch.dtype) -> Any:
    """A ``...ForCausalLM`` whose parameters take no memory yet (``meta``); buffers are real. For :func:`load_shards`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    llm.tie_weights()  # the context makes a parameter of its own at every place
    return llm


def load_shards(llm: nn.Module, folder: str | Path, device: torch.device) -> None:
    """Read this rank's parts of all ``meta`` parameters from the safetensors files of a Hugging Face directory.

    A part is read straight from the file, so no rank ever holds a whole weight that is spread.

    Raises:
        ConfigError: the directory has no safetensors, or a weight is missing there.
    """
    files = _weight_files(Path(folder))
    loaded: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module_name, module in llm.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            if id(parameter) not in loaded:
                loaded[id(parameter)] = _read(files, name, parameter, device)
            setattr(module, leaf, loaded[id(parameter)])


def _weight_files(folder: Path) -> dict[str, Path]:
    """Weight name -> file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(f"{folder} has no safetensors weights; tensor parallelism reads no other format.")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(files: dict[str, Path], name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if name not in files:
        raise ConfigError(f"The LLM's files lack the weight {name} ({len(files)} others are there).")
    part: Part | None = getattr(parameter, "tensor_part", None)
    with safe_open(files[name], "pt") as file:
        if part is None:
            value = file.get_tensor(name)
        else:
            whole = file.get_slice(name)
            value = part.of(whole, whole.get_shape()[part.dim])
    new = nn.Parameter(value.to(device, parameter.dtype), requires_grad=parameter.requires_grad)
    if part is not None:
        new.tensor_part = part  # type: ignore[attr-defined]
    return new


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
        # Transformers keeps fused projections whole, because a plain cut would mix their blocks; ours keeps them apart.
        if style is not None:
            style = FUSED.get((name.rpartition(".")[2], style), style)
        if style in (COLUMN, ROW):
            parent, _, leaf = name.rpartition(".")
            setattr(llm.get_submodule(parent), leaf, _shard_linear(module, style, leaf, llm.config, config, rank, size))
        elif style not in REPLICATED:
            logging.getLogger(__name__).warning(
                "%s has no tensor-parallel plan (%s): replicated on every rank", name, style
            )
    _local_heads(llm, size)
    return _shard_vocabulary(llm, config, group, rank, size)


@dataclass(frozen=True)
class Part:
    """The part of a whole weight that a rank holds: ranges of dimension ``dim``, then zeros up to ``size`` entries.

    Kept on the parameter as ``tensor_part``, so that it can be read from a checkpoint without the rest.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]
    size: int

    @staticmethod
    def of_blocks(dim: int, blocks: list[int], parts: list[tuple[int, int]]) -> "Part":
        """Of a weight made of ``blocks`` one after another, of each the share ``(index, of how many)``."""
        ranges, begin = [], 0
        for block, (index, count) in zip(blocks, parts, strict=True):
            share = block // count
            ranges.append((begin + index * share, begin + (index + 1) * share))
            begin += block
        return Part(dim, tuple(ranges), sum(e - b for b, e in ranges))

    def of(self, whole: Any, length: int) -> Tensor:
        """The part of a tensor, or of a slice of a safetensors file, whose dimension ``dim`` is ``length`` long."""
        pieces = []
        for begin, end in self.ranges:
            begin, end = min(begin, length), min(end, length)
            pieces.append(whole[begin:end] if self.dim == 0 else whole[:, begin:end])
        missing = self.size - sum(p.shape[self.dim] for p in pieces)
        if missing:
            shape = list(pieces[0].shape)
            shape[self.dim] = missing
            pieces.append(pieces[0].new_zeros(shape))
        return torch.cat(pieces, self.dim)

    def parameter(self, whole: Tensor) -> nn.Parameter:
        """This part of a loaded (or not yet loaded, ``meta``) parameter."""
        new = nn.Parameter(self.of(whole.detach(), whole.shape[self.dim]), requires_grad=whole.requires_grad)
        new.tensor_part = self  # type: ignore[attr-defined]
        return new


def _shard_linear(
    module: nn.Linear, style: str, leaf: str, hf: Any, config: ModelParallelConfig, rank: int, size: int
) -> nn.Module:
    bias = module.bias
    if style == COLUMN:
        part = _column_part(module, leaf, hf, rank, size)
        new: Any = ColumnLinear(
            module.in_features, part.size * size, config=config, init_method=lambda _: None, bias=bias is not None,
            gather_output=False,
        )  # fmt: skip
        if bias is not None:
            new.bias = part.parameter(bias)
    else:
        part = Part.of_blocks(1, [module.in_features], [(rank, size)])
        new = RowLinear(
            module.in_features, module.out_features, config=config, init_method=lambda _: None, bias=bias is not None,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
        if bias is not None:
            new.bias = bias
    new.weight = part.parameter(module.weight)
    return new


def _column_part(module: nn.Linear, leaf: str, hf: Any, rank: int, size: int) -> Part:
    """Rows of a column-parallel layer; fused ones are cut block by block."""
    heads = hf.num_attention_heads
    kv = getattr(hf, "num_key_value_heads", None) or heads
    # Fewer key/value heads than ranks: each head is kept on several ranks.
    own, key_value = (rank, size), ((rank, size) if kv >= size else (rank // (size // kv), kv))
    if leaf == "qkv_proj":
        head = module.out_features // (heads + 2 * kv)
        return Part.of_blocks(0, [heads * head, kv * head, kv * head], [own, key_value, key_value])
    if leaf == "gate_up_proj":
        return Part.of_blocks(0, [module.out_features // 2] * 2, [own, own])
    return Part.of_blocks(0, [module.out_features], [key_value if leaf in ("k_proj", "v_proj") else own])


def _local_heads(llm: Any, size: int) -> None:
    """Tell attention modules how many heads they hold now."""
    heads, kv = llm.config.num_attention_heads, getattr(llm.config, "num_key_value_heads", None)
    local = copy.copy(llm.config)
    local.num_attention_heads = heads // size
    local.num_key_value_heads = max(1, (kv or heads) // size)
    for module in llm.modules():
        projection = getattr(module, "q_proj", getattr(module, "qkv_proj", None))
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
        rows * size, embedding.weight.shape[1], init_method=lambda _: None, config=config,
        scale=float(getattr(embedding, "embed_scale", 1.0)),
    )  # fmt: skip
    new.weight = part.parameter(embedding.weight)
    tied = head.weight is embedding.weight
    weight = new.weight if tied else part.parameter(head.weight)
    bias = None if head.bias is None else part.parameter(head.bias)
    llm.set_input_embeddings(new)
    llm.lm_head = VocabularyHead(weight, bias, vocabulary, shard)
    return shard
