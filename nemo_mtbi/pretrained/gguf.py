"""Read an LLM in GGUF into an ordinary Hugging Face directory: weights dequantized once, tokenizer beside them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_mtbi.errors import ConfigError


def convert(model_file: Path, folder: Path, dtype: str, tied: bool = False) -> None:
    """Write model and tokenizer of a GGUF file to ``folder``.

    Args:
        model_file: the GGUF file.
        dtype: of the weights that are written.
        tied: the architecture has one matrix for embedding and output layer, which the file holds twice, quantized
            differently; the output layer's, which quantizers keep finer, is written for both.

    Raises:
        ConfigError: there is no GGUF reader.
    """
    if find_spec("gguf") is None:
        raise ConfigError("Offline parts in GGUF need its reader: pip install 'nemo-mtbi[demo]'.")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = model_file.parent, model_file.name
    # With the package `kernels`, Transformers would keep the weights packed: less memory, several times slower.
    plain: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    quantized: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=getattr(torch, dtype), **plain)
    fields = {k: v for k, v in quantized.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    state = quantized.state_dict()
    if tied:
        fields["tie_word_embeddings"] = True
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    # save_pretrained of a model read from GGUF raises: a fresh model without the quantization entry takes its weights.
    with torch.device("meta"):
        model = type(quantized)(type(quantized.config)(**fields))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
