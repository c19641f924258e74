"""An LLM whose weights each rank reads by itself: built empty, then filled from the files, as far as it holds them."""

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.tensors import INDEX, SINGLE, weight_files, weight_map
from nemo_mtbi.modules.causal_lm import causal_lm
from nemo_mtbi.parallel.parts import part_of

FLOATS = ("F64", "F32", "F16", "BF16")


def empty_llm(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A ``...ForCausalLM`` whose parameters take no memory yet (``meta``); buffers are real.

    For :func:`load_shards`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    llm.tie_weights()  # the context makes a parameter of its own at every place
    return llm


def materialize_adapters(llm: nn.Module, init: bool | str = True) -> None:
    """Initialize the LoRA matrices of a model whose own weights are still ``meta``.

    They are whole until it is sharded.

    Args:
        init: PEFT's ``init_lora_weights``, of those that leave the LLM's own weights alone.
    """
    for layer in llm.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                for matrix in (layer.lora_A[name], layer.lora_B[name]):
                    matrix.to_empty(device="cpu")
                if init is False:
                    for matrix in (layer.lora_A[name], layer.lora_B[name]):
                        matrix.reset_parameters()  # type: ignore[operator]
                else:
                    layer.reset_lora_parameters(name, init_lora_weights=init)


def load_shards(llm: nn.Module, folder: str | Path, device: torch.device) -> None:
    """Read this rank's parts of all ``meta`` parameters from the safetensors files of a Hugging Face directory.

    A part is read straight from the file, so no rank ever holds a whole weight that is spread.

    Args:
        llm: ``...ForCausalLM``, or one with LoRA (whose own weights are there already).
        folder: of the LLM (or its hub name), or of an exported speech LLM.

    Raises:
        ConfigError: the directory has no safetensors, a weight is missing or quantized there, or it cannot be had.
    """
    files = _weight_files(local_snapshot(str(folder)))
    loaded: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module_name, module in causal_lm(llm).named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            name = own_name(f"{module_name}.{leaf}".lstrip("."))
            if id(parameter) not in loaded:
                loaded[id(parameter)] = _read(files, name, parameter, device)
            setattr(module, leaf, loaded[id(parameter)])


def local_snapshot(name: str) -> Path:
    """The folder of an LLM: a local one as it is; of a hub name, the snapshot in the cache, fetched if it is not there.

    Several ranks may ask at once: ``huggingface_hub`` locks each file.

    Raises:
        ConfigError: neither a folder nor a model of the hub that can be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[INDEX]))
        index = folder / INDEX
        # What the index names: some repositories hold the weights in a second form too.
        files = sorted(set(weight_map(index).values())) if index.is_file() else [SINGLE]
        return Path(snapshot_download(name, allow_patterns=[INDEX, *files]))
    except Exception as error:  # of the hub, the network, or a name that is none
        raise ConfigError(
            f"{name} is no folder, and its weights cannot be taken from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Fix model.pretrained_llm, or fetch it first and give its folder."
        ) from error


def _weight_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name of a weight in the LLM -> the file that holds it, and its name there."""
    try:
        files = weight_files(folder)
    except ValueError as error:
        raise ConfigError(f"{folder / INDEX} is damaged: {error}.") from error
    if not files:
        raise ConfigError(f"{folder} has no safetensors weights; tensor parallelism reads no other format.")
    return {own_name(name): (file, name) for name, file in files.items()}


def own_name(name: str) -> str:
    """A weight's name in the LLM; in an exported speech LLM it stands under ``llm``, the embedding beside it."""
    if name.startswith("embed_tokens."):
        return f"model.{name}"
    return name.removeprefix("llm.").removeprefix("base_model.model.").replace(".base_layer.", ".")


def _read(files: dict[str, tuple[Path, str]], name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if name not in files:
        raise ConfigError(f"The LLM's files lack the weight {name} ({len(files)} others are there).")
    part = part_of(parameter)
    path, stored = files[name]
    with safe_open(path, "pt") as file:
        whole = file.get_slice(stored)
        if whole.get_dtype() not in FLOATS:
            raise ConfigError(
                f"The LLM's files hold {stored} as {whole.get_dtype()}: a quantized LLM, which tensor parallelism does "
                "not read. Take its unquantized weights, or tensor_model_parallel_size=1."
            )
        value = file.get_tensor(stored) if part is None else part.of(whole, whole.get_shape()[part.dim])
        # A part is a view of the mapped file, which would keep more of its pages in memory than are this rank's.
        value = value.to(device, parameter.dtype, copy=part is not None, memory_format=torch.contiguous_format)
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if part is not None:
        new.tensor_part = part  # type: ignore[attr-defined]
    return new
