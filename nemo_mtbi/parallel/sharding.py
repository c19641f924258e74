"""A Transformers causal LM spread over tensor-parallel ranks with Megatron-Core layers, by the model's own published plan.

The model stays what it is: its linear layers are replaced by ``ColumnParallelLinear`` and ``RowParallelLinear``, its token
embedding by ``VocabParallelEmbedding``, its output layer by the matching rows. Logits stay spread over the vocabulary; the
objective (:mod:`nemo_mtbi.losses.imitation`) takes them so. No NeMo import in here.
"""

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


@dataclass(frozen=True)
class Part:
    """The part of a whole weight that a rank holds: ``size`` entries of dimension ``dim`` from ``begin``, then zeros.

    Kept on the parameter as ``tensor_part``, so that it can be read from a checkpoint without the rest.
    """

    dim: int
    begin: int
    size: int

    def of(self, whole: Any, length: int) -> Tensor:
        """The part of a tensor, or of a slice of a safetensors file, whose dimension ``dim`` is ``length`` long."""
        end = min(self.begin + self.size, length)
        begin = min(self.begin, end)
        part = whole[begin:end] if self.dim == 0 else whole[:, begin:end]
        if end - begin == self.size:
            return part.clone()
        shape = list(part.shape)
        shape[self.dim] = self.size - (end - begin)
        return torch.cat([part, part.new_zeros(shape)], self.dim)

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
        kv = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
        # Fewer key/value heads than ranks: each head is kept on several ranks.
        parts, index = (kv, rank // (size // kv)) if leaf in ("k_proj", "v_proj") and kv < size else (size, rank)
        rows = module.out_features // parts
        part = Part(0, index * rows, rows)
        new: Any = ColumnLinear(
            module.in_features, rows * size, config=config, init_method=lambda _: None, bias=bias is not None,
            gather_output=False,
        )  # fmt: skip
        if bias is not None:
            new.bias = part.parameter(bias)
    else:
        columns = module.in_features // size
        part = Part(1, rank * columns, columns)
        new = RowLinear(
            module.in_features, module.out_features, config=config, init_method=lambda _: None, bias=bias is not None,
            input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
        if bias is not None:
            new.bias = bias
    new.weight = part.parameter(module.weight)
    return new


def _shard_vocabulary(llm: Any, config: ModelParallelConfig, group: Any, rank: int, size: int) -> VocabularyShard:
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    vocabulary = embedding.weight.shape[0]
    rows = math.ceil(vocabulary / size)
    shard = VocabularyShard(rank * rows, max(0, min(rows, vocabulary - rank * rows)), group)

    part = Part(0, rank * rows, rows)
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
