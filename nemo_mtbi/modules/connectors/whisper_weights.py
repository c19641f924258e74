"""What a :class:`WhisperRecognizer` takes from a pretrained Whisper: settings, weights, tokenizer."""

from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.connectors.whisper_recognizer import FRAMES_PER_SECOND, WhisperRecognizer
from nemo_mtbi.modules.whisper import SAMPLE_RATE, WhisperPreprocessor

# Whisper never writes these, but transcripts hold them, so a decoder that is trained on transcripts must be able to.
WRITTEN_SYMBOLS = set('"():;/-') | {"--", '("', "(("}
SILENCE_FRAMES = 10  # one is enough for tiny.en


def whisper_decoder_settings(name: str, language: str | None, kept_layers: int | None = None) -> dict[str, Any]:
    """What :class:`WhisperRecognizer` must know of a Whisper model.

    Args:
        name: Whisper model (hub name or directory).
        language: of a multilingual model.
        kept_layers: of the encoder that stay frozen (None: all).

    Raises:
        ConfigError: a multilingual model without a language, an English one with one, no generation_config.json.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(name)
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError as error:
        raise ConfigError(
            f"{name} has no generation_config.json, which names the tokens that are never written."
        ) from error
    if getattr(generation, "is_multilingual", False) and language is None:
        raise ConfigError(f"{name} is multilingual: set model.perception.modality_adapter.language, e.g. en.")
    if not getattr(generation, "is_multilingual", False) and language is not None:
        raise ConfigError(f"{name} knows English alone: leave model.perception.modality_adapter.language out.")
    tokenizer = _whisper_tokenizer(name, language)
    suppressed = [i for i in getattr(generation, "suppress_tokens", None) or [] if i < tokenizer.eos_token_id]
    keep = (
        "d_model",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "decoder_layers",
        "decoder_attention_heads",
        "decoder_ffn_dim",
        "vocab_size",
        "max_source_positions",
        "max_target_positions",
        "pad_token_id",
    )
    return {
        "decoder": {key: getattr(config, key) for key in keep},
        "encoder_layers": 0 if kept_layers is None else config.encoder_layers - kept_layers,
        "prompt_ids": list(tokenizer.prefix_tokens),
        "eos_id": tokenizer.eos_token_id,
        "suppress_ids": [i for i in suppressed if tokenizer.decode([i]).strip() not in WRITTEN_SYMBOLS],
        "begin_suppress_ids": list(getattr(generation, "begin_suppress_tokens", None) or []),
        "silence_frames": SILENCE_FRAMES,
        "no_speech_id": tokenizer.prefix_tokens[-1] - 1,  # before "no timestamps", as in Transformers
        "tokenizer_bytes": len(tokenizer.backend_tokenizer.to_str().encode()),
    }


def load_whisper_decoder(connector: WhisperRecognizer, whisper: Any, name: str) -> None:
    """Take the decoder and the upper encoder layers of a ``transformers.WhisperModel``, and the tokenizer of that
    name.
    """
    connector.decoder.load_state_dict(whisper.decoder.state_dict())
    first = whisper.config.encoder_layers - len(connector.encoder_layers)
    for own, given in zip(connector.encoder_layers, whisper.encoder.layers[first:], strict=True):
        own.load_state_dict(given.state_dict())
    if connector.encoder_layers:
        connector.encoder_norm.load_state_dict(whisper.encoder.layer_norm.state_dict())
    connector.silence.copy_(_end_of_silence(whisper.encoder, first)[-len(connector.silence) :])
    connector.set_tokenizer(_whisper_tokenizer(name, connector.language).backend_tokenizer.to_str())


@torch.no_grad()
def _end_of_silence(encoder: Any, layers: int) -> Tensor:
    """Frames (T, D) of 30 s of silence behind the first ``layers`` layers of a Transformers Whisper encoder; behind all
    of them, normalized.
    """
    config = encoder.config
    preprocessor = WhisperPreprocessor(config.num_mel_bins)
    samples = SAMPLE_RATE * config.max_source_positions // FRAMES_PER_SECOND
    mel, _ = preprocessor(torch.zeros(1, samples), torch.tensor([samples]))
    frames = encoder(mel[..., : 2 * config.max_source_positions], output_hidden_states=True)
    whole = layers == config.encoder_layers
    return (frames.last_hidden_state if whole else frames.hidden_states[layers])[0]


def _whisper_tokenizer(name: str, language: str | None) -> Any:
    from transformers import WhisperTokenizer

    options: dict[str, Any] = {"language": language, "task": "transcribe"} if language else {}
    return WhisperTokenizer.from_pretrained(name, **options)
