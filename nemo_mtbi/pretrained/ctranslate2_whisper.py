"""Read a Whisper model in CTranslate2's layout into Transformers' ``WhisperForConditionalGeneration``.

The binary layout is the one that ``ctranslate2.specs.model_spec.ModelSpec`` writes (binary version 6): a header, then
(name, shape, dtype id, bytes) per variable, then aliases. Reading it takes NumPy alone, so the ``ctranslate2`` runtime
is needed only by the test that compares both encoders.
"""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from nemo_mtbi.errors import DataError

SUPPORTED_BINARY_VERSION = 6
# ids of ctranslate2.specs.model_spec._dtype_to_type_id
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
ENCODER_HEAD_DIM = 64  # every published Whisper size
MULTILINGUAL_VOCABULARY = 51865  # entries, at least; English-only Whisper has 51864


def _read_string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("H", stream.read(2))
    return stream.read(length)[:-1].decode("utf-8")


def _read_uint32(stream: BinaryIO) -> int:
    return struct.unpack("I", stream.read(4))[0]


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Variables of a CTranslate2 ``model.bin`` by name.

    Raises:
        DataError: the file's binary version or specification is not the one read here.
    """
    with open(path, "rb") as stream:
        version, spec = _read_uint32(stream), _read_string(stream)
        _read_uint32(stream)  # revision of the specification: names are the same in 1 to 3
        if version != SUPPORTED_BINARY_VERSION or spec != "WhisperSpec":
            raise DataError(
                f"{path} holds a {spec} of CTranslate2 binary version {version}; this reader knows WhisperSpec, "
                f"version {SUPPORTED_BINARY_VERSION}. Install the version of the package that requirements/ names, or "
                "pass a Hugging Face directory of Whisper instead."
            )
        variables = {}
        for _ in range(_read_uint32(stream)):
            name = _read_string(stream)
            (rank,) = struct.unpack("B", stream.read(1))
            shape = struct.unpack("I" * rank, stream.read(4 * rank))
            (type_id,) = struct.unpack("B", stream.read(1))
            raw = stream.read(_read_uint32(stream))
            # Scalars (flags, head counts) carry type ids of their own; only their raw bytes are kept.
            variables[name] = np.frombuffer(raw, DTYPES[type_id] if rank else np.int8).reshape(shape if rank else -1)
        for _ in range(_read_uint32(stream)):
            alias, target = _read_string(stream), _read_string(stream)
            variables[alias] = variables[target]
    return variables


def _attention(variables: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    """Split CTranslate2's fused projections; Whisper's key projection has no bias (CTranslate2 stores zeros)."""
    weights, biases = [], []
    fused = sorted(name for name in variables if name.startswith(f"{source}/linear_") and name.endswith("weight"))
    for name in fused[:-1]:
        weights.append(variables[name])
        biases.append(variables[name.replace("weight", "bias")])
    query, key, value = np.split(np.concatenate(weights), 3)
    query_bias, _, value_bias = np.split(np.concatenate(biases), 3)
    out = {
        f"{target}.q_proj.weight": query,
        f"{target}.q_proj.bias": query_bias,
        f"{target}.k_proj.weight": key,
        f"{target}.v_proj.weight": value,
        f"{target}.v_proj.bias": value_bias,
        f"{target}.out_proj.weight": variables[fused[-1]],
        f"{target}.out_proj.bias": variables[fused[-1].replace("weight", "bias")],
    }
    return out | _layer_norm(variables, f"{source}/layer_norm", f"{target}_layer_norm")


def _layer_norm(variables: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    return {f"{target}.weight": variables[f"{source}/gamma"], f"{target}.bias": variables[f"{source}/beta"]}


def _linear(variables: dict[str, np.ndarray], source: str, target: str) -> dict[str, np.ndarray]:
    return {f"{target}.weight": variables[f"{source}/weight"], f"{target}.bias": variables[f"{source}/bias"]}


def _stack(variables: dict[str, np.ndarray], stack: str, layers: int) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for index in range(layers):
        source, target = f"{stack}/layer_{index}", f"model.{stack}.layers.{index}"
        state |= _attention(variables, f"{source}/self_attention", f"{target}.self_attn")
        if stack == "decoder":
            state |= _attention(variables, f"{source}/attention", f"{target}.encoder_attn")
        state |= _layer_norm(variables, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        state |= _linear(variables, f"{source}/ffn/linear_0", f"{target}.fc1")
        state |= _linear(variables, f"{source}/ffn/linear_1", f"{target}.fc2")
    return state | _layer_norm(variables, f"{stack}/layer_norm", f"model.{stack}.layer_norm")


def convert(model_bin: Path, special_tokens: dict[str, int]) -> WhisperForConditionalGeneration:
    """Build the Transformers model (fp32, evaluation mode) from a CTranslate2 ``model.bin``.

    Args:
        model_bin: file written by CTranslate2's Whisper converter.
        special_tokens: ``WhisperConfig`` fields that the binary does not hold (token ids).
    """
    variables = read_variables(model_bin)

    def layers(stack: str) -> int:
        return len({name.split("/")[1] for name in variables if name.startswith(f"{stack}/layer_") and "ffn" in name})

    d_model, n_mels, _ = variables["encoder/conv1/weight"].shape
    ffn = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    heads = d_model // ENCODER_HEAD_DIM
    config = WhisperConfig(
        vocab_size=variables["decoder/embeddings/weight"].shape[0],
        num_mel_bins=n_mels,
        d_model=d_model,
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        **cast(dict[str, Any], special_tokens),
    )
    state = {
        "model.encoder.embed_positions.weight": variables["encoder/position_encodings/encodings"],
        "model.decoder.embed_positions.weight": variables["decoder/position_encodings/encodings"],
        "model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"],
        "proj_out.weight": variables["decoder/embeddings/weight"],
    }
    state |= _linear(variables, "encoder/conv1", "model.encoder.conv1")
    state |= _linear(variables, "encoder/conv2", "model.encoder.conv2")
    state |= _stack(variables, "encoder", config.encoder_layers) | _stack(variables, "decoder", config.decoder_layers)
    model = WhisperForConditionalGeneration(config)
    tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def write_directory(source: Path, folder: Path) -> None:
    """Write a Whisper of CTranslate2 (``model.bin``, ``config.json``, ``tokenizer.json``) as a Hugging Face directory.

    Ids of the special tokens come from the tokenizer; a multilingual model has tokens of languages and tasks.
    """
    converted = json.loads((source / "config.json").read_text())
    tokenizer: Any = WhisperTokenizer(tokenizer_file=str(source / "tokenizer.json"))

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    end, no_timestamps = token("endoftext"), token("notimestamps")
    special = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": token("startoftranscript"),
    }
    model = convert(source / "model.bin", special)
    # As openai/whisper decides; the English-only models have tokens of languages too, which mean nothing.
    multilingual = model.config.vocab_size >= MULTILINGUAL_VOCABULARY
    prompt: dict[str, Any] = {"forced_decoder_ids": [[1, no_timestamps]]}
    if multilingual:
        languages = {f"<|{code}|>": token(code) for code in LANGUAGES if token(code) in converted["lang_ids"]}
        tasks = {task: token(task) for task in ("transcribe", "translate")}
        # Without a task Transformers gives the decoder none, and it loops; the language it detects.
        prompt = {"lang_to_id": languages, "task_to_id": tasks, "task": "transcribe"}
    model.generation_config = GenerationConfig(
        **special,
        **prompt,
        is_multilingual=multilingual,
        no_timestamps_token_id=no_timestamps,
        suppress_tokens=converted["suppress_ids"],
        begin_suppress_tokens=converted["suppress_ids_begin"],
        alignment_heads=converted["alignment_heads"],
        max_length=model.config.max_target_positions,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
