"""NeMo's ``AudioPerceptionModule`` around a Whisper or a NeMo ASR encoder and a connector.

How it is built and identified. NeMo is imported where it builds something: a finished model is read without it.
"""

import inspect
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from nemo_mtbi.config import ModelConfig
from nemo_mtbi.errors import ConfigError, MTBIError
from nemo_mtbi.modules.causal_lm import is_frozen
from nemo_mtbi.modules.connectors.base import Connector
from nemo_mtbi.modules.connectors.whisper_recognizer import WhisperRecognizer
from nemo_mtbi.modules.connectors.whisper_weights import load_whisper_decoder, whisper_decoder_settings
from nemo_mtbi.modules.connectors.wordings import around_words
from nemo_mtbi.modules.fusion import Fusion
from nemo_mtbi.modules.whisper import SUBSAMPLING, WINDOW_SECONDS
from nemo_mtbi.pretrained.offline import resolve_pretrained

if TYPE_CHECKING:
    from nemo.collections.speechlm2.modules import AudioPerceptionModule

DECODER_TARGETS = ("WhisperDecoderConnector", "TwoChannelConnector")  # hold a Whisper's own decoder
DENSE_TARGETS = ("StackMLPConnector", "ConvBottleneckConnector")
WHISPER_KEYS = ("input_length", "round_seconds")


def setup_perception(model: Any) -> None:
    """Set ``model.perception`` from ``model.cfg`` and ``model.llm``; the encoder's weights with ``pretrained_weights``.

    The connector's ``feat_in``, ``output_dim`` and (CTC) ``vocab_size`` are filled in from the encoder, the LLM and the
    token set, where the configuration leaves them out.
    """
    cfg: DictConfig = model.cfg
    perception = cfg.perception
    # An exported configuration describes the encoder completely, so its source is not needed any more.
    built = not cfg.pretrained_weights and "_target_" in perception.get("encoder", {})
    name = cfg.pretrained_asr if built else resolve_pretrained(cfg.pretrained_asr)
    whisper = not built and is_whisper(name)
    with open_dict(cfg):
        adapter = perception.modality_adapter
        decoder = adapter._target_.endswith(DECODER_TARGETS)
        if not decoder and adapter.get("language") is None:  # of the default connector's YAML, with another `_target_`
            adapter.pop("language", None)
        if whisper:
            _configure_whisper(perception, name)
        if decoder and whisper:
            adapter.update(whisper_decoder_settings(name, adapter.get("language"), perception.encoder.get("layers")))
        elif whisper and "layers" in perception.encoder and adapter._target_.startswith("nemo_mtbi."):
            raise ConfigError(
                f"perception.encoder_layers leaves the upper layers to the connector, which {adapter._target_} does "
                f"not have; use {' or '.join(DECODER_TARGETS)}."
            )
        if adapter._target_.startswith("nemo_mtbi."):
            adapter.output_dim = model.llm.config.hidden_size
            if adapter.get("acoustic_prompt") is not None and adapter.get("acoustic_prompt_ids") is None:
                opening, described = around_words(model.tokenizer.tokenizer, adapter.acoustic_prompt)
                adapter.acoustic_opening_ids, adapter.acoustic_prompt_ids = opening, described
            if "feat_in" not in adapter:
                taps = len(perception.encoder.get("taps", [])) if whisper else 0
                width = perception.encoder.config.d_model if whisper else _nemo_config(name).encoder.d_model
                adapter.feat_in = int(width) * (1 + taps)
                if taps and adapter._target_.endswith(DENSE_TARGETS):
                    adapter.setdefault("encoder_layers", 1 + taps)
        perception.output_dim = model.llm.config.hidden_size
    if built:
        model.perception = _build(perception)
    elif whisper:
        model.perception = _build(perception)
        if cfg.pretrained_weights:
            from transformers import WhisperModel

            pretrained = WhisperModel.from_pretrained(name, dtype=torch.float32)  # large ones are kept in float16
            state, own = pretrained.encoder.state_dict(), model.perception.encoder.whisper.state_dict()
            model.perception.encoder.whisper.load_state_dict({key: value for key, value in state.items() if key in own})
            if decoder:
                load_whisper_decoder(model.perception.modality_adapter, pretrained, name)
    else:
        if not cfg.pretrained_weights:
            _configure_nemo(perception, name)
        from nemo.collections.speechlm2.parts.pretrained import setup_speech_encoder

        setup_speech_encoder(model, pretrained_weights=cfg.pretrained_weights)
    for part in model.perception.children():
        if hasattr(part, "sync_max_audio_length"):  # NeMo's: a collective at every pass, also where one rank has none
            part.sync_max_audio_length = False
    model.perception.fusion = fusion_of(perception, context=context_of(model.llm.config))
    model.perception.window_seconds = window_seconds(perception)
    if (connector := connector_of(model.perception)) is not None:
        connector.window_seconds = model.perception.window_seconds


def context_of(llm_config: Any) -> int | None:
    """Positions that the LLM can read; None: unknown."""
    return getattr(llm_config, "max_position_embeddings", None)


def window_seconds(perception: Any, whisper: bool = False) -> float:
    """Longest audio that the encoder is given at once (``perception.window_seconds``); longer audio is cut where it is
    quiet (:mod:`nemo_mtbi.data.audio_windows`).

    Raises:
        ConfigError: not from 1 s on, or more than Whisper's 30 s.
    """
    value = perception.get("window_seconds", WINDOW_SECONDS)
    if type(value) not in (int, float) or not 1 <= value < math.inf:
        raise ConfigError(f"perception.window_seconds={value}: give seconds, at least 1.")
    whisper |= str((perception.get("encoder") or {}).get("_target_", "")).startswith("nemo_mtbi.modules.whisper")
    if whisper and value > WINDOW_SECONDS:
        raise ConfigError(f"perception.window_seconds={value}: Whisper's encoder takes up to {WINDOW_SECONDS} s.")
    return float(value)


def window_samples(perception: Any) -> tuple[int, int, int]:
    """Sampling rate; samples of the encoder's longest window, whole frames; samples of a frame."""
    rate = int(perception.preprocessor.featurizer.sample_rate)
    frame = round(encoder_frame_seconds(perception) * rate)
    return rate, int(perception.window_seconds * rate) // frame * frame, frame


def fusion_of(perception: Any, options: dict[str, Any] | None = None, context: int | None = None) -> Fusion | None:
    """The :class:`Fusion` that a configuration's ``perception.fusion`` describes, or ``options`` in its place.

    Args:
        perception: the configuration.
        options: of the fusion.
        context: positions that the LLM can read.

    Raises:
        ConfigError: an unknown key, an impossible budget, one that the LLM's context does not hold, or a connector
            whose positions cannot be merged.
    """
    options = options or perception.get("fusion")
    if not options:
        return None
    adapter = perception.get("modality_adapter") or {}
    target = str(adapter.get("_target_", ""))
    texts = target.endswith("WhisperDecoderConnector") or adapter.get("acoustic_prompt") is not None
    if texts or not target.startswith("nemo_mtbi."):
        raise ConfigError(
            f"perception.fusion merges positions of the connector; {target.rpartition('.')[2]} has none that can be "
            "merged (a decoder writes the LLM's own tokens, an acoustic_prompt is made of them). Use a dense, CTC or "
            "two-channel connector, or leave fusion out."
        )
    try:
        fusion = Fusion(**OmegaConf.to_container(OmegaConf.create(options)))  # type: ignore[arg-type]
    except TypeError as error:
        known = "max_positions, per_second, sampled, sampled_per_second"
        raise ConfigError(f"perception.fusion={dict(options)}: known keys are {known} ({error}).") from error
    largest = max((b for b in (fusion.max_positions, *fusion.sampled) if b is not None), default=0)
    if context is not None and largest >= context:
        raise ConfigError(f"A budget of {largest} positions does not fit the LLM, whose context has {context}.")
    return fusion


def _build(perception: DictConfig) -> "AudioPerceptionModule":
    from nemo.collections.speechlm2.modules import AudioPerceptionModule

    try:
        return AudioPerceptionModule(perception).train()
    except InstantiationException as error:  # Hydra's, around what a part said about its settings
        if isinstance(error.__cause__, MTBIError):
            raise error.__cause__ from None
        raise


def require_fitting_encoder(config: ModelConfig) -> None:
    """Check, before any weight is loaded, that the connector can read the encoder.

    Raises:
        ConfigError: an impossible ``fusion`` or ``window_seconds``; a connector that is a Whisper's decoder, or layers
            of one, with an encoder that is no Whisper; risk over the hypotheses of a connector that has none.
    """
    perception = config.perception
    fusion_of(perception)
    window_seconds(perception)
    target = str((perception.get("modality_adapter") or {}).get("_target_", ""))
    if config.imitation.w_risk > 0 and not target.endswith(DECODER_TARGETS):
        raise ConfigError(
            f"model.imitation.w_risk={config.imitation.w_risk} needs a connector that writes text "
            f"({' or '.join(DECODER_TARGETS)}); {target.rpartition('.')[2]} does not."
        )
    if "_target_" in perception.get("encoder", {}):  # an export, which describes itself
        return
    name = resolve_pretrained(config.pretrained_asr)
    if is_whisper(name):
        window_seconds(perception, whisper=True)
        return
    if target.endswith(DECODER_TARGETS):
        raise ConfigError(f"{target.rpartition('.')[2]} needs a Whisper model as model.pretrained_asr, {name} is none.")
    for key in ("encoder_layers", "encoder_taps"):
        if perception.get(key):
            raise ConfigError(f"model.perception.{key}={perception[key]} is for Whisper encoders; {name} is none.")


def is_whisper(name: str) -> bool:
    """Whether the name is a Whisper model for Transformers (a directory with config.json, or a hub name)."""
    if name.endswith(".nemo"):
        return False
    if Path(name).is_dir() or "whisper" in name.lower():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name).model_type == "whisper"
    return False


def _configure_whisper(perception: DictConfig, name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    keep = (
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "num_mel_bins",
        "max_source_positions",
    )
    shared = {key: perception.pop(key) for key in WHISPER_KEYS if key in perception}
    perception.preprocessor = {
        "_target_": "nemo_mtbi.modules.whisper.WhisperPreprocessor",
        "num_mel_bins": config.num_mel_bins,
        **shared,
    }
    kept, taps = perception.pop("encoder_layers", None), list(perception.pop("encoder_taps", None) or [])
    if kept == config.encoder_layers:  # all of them: the whole encoder, with its final normalization
        kept = None
    perception.encoder = {
        "_target_": "nemo_mtbi.modules.whisper.WhisperEncoder",
        "config": {key: getattr(config, key) for key in keep},
        **shared,
        **({} if kept is None else {"layers": kept}),
        **({"taps": taps} if taps else {}),
    }


def _configure_nemo(perception: DictConfig, name: str) -> None:
    """Describe a NeMo ASR model's encoder, as ``setup_speech_encoder`` does when it loads the weights too."""
    config = _nemo_config(name)
    own = {key: value for key, value in (perception.get("encoder") or {}).items() if value is not None}
    with open_dict(perception):
        perception.preprocessor = config.preprocessor
        perception.encoder = OmegaConf.merge(config.encoder, own)


def _nemo_config(name: str) -> DictConfig:
    from nemo.collections.asr.models import ASRModel

    if name.endswith(".nemo"):
        return ASRModel.restore_from(name, return_config=True)
    return ASRModel.from_pretrained(name, return_config=True)


def freeze(parameters: Iterable[tuple[str, nn.Parameter]], config: ModelConfig) -> None:
    """Freeze what ``freeze_params`` matches and ``prevent_freeze_params`` does not; LoRA adapters stay trainable."""
    for name, parameter in parameters:
        if "lora_" not in name and is_frozen_by(config, name):
            parameter.requires_grad_(False)


def is_frozen_by(config: ModelConfig, name: str) -> bool:
    """Whether the configuration freezes the parameter of that name."""
    frozen, kept = config.freeze_params, config.prevent_freeze_params
    return any(re.match(p, name) for p in frozen) and not any(re.match(p, name) for p in kept)


def frozen_recognizer(perception: DictConfig, config: ModelConfig) -> WhisperRecognizer | None:
    """The recognizer of a configuration's connector with its pretrained weights, without an LLM; None where the
    connector has none, or trains its decoder. (Its ``writing_key`` is None where other parts of it are trained.)

    Args:
        perception: whose encoder is configured (:func:`setup_perception`).
        config: of the model, with the connector.
    """
    adapter = config.perception.get("modality_adapter") or {}
    prefix = "perception.modality_adapter"
    if not str(adapter.get("_target_", "")).endswith(DECODER_TARGETS):
        return None
    if not is_frozen_by(config, f"{prefix}.decoder.layer_norm.weight"):
        return None
    from transformers import WhisperModel

    name = resolve_pretrained(config.pretrained_asr)
    known = inspect.signature(WhisperRecognizer).parameters
    given = {key: value for key, value in adapter.items() if key in known}
    settings = whisper_decoder_settings(name, adapter.get("language"), perception.encoder.get("layers"))
    recognizer = WhisperRecognizer(**(given | settings))
    load_whisper_decoder(recognizer, WhisperModel.from_pretrained(name, dtype=torch.float32), name)
    freeze(recognizer.named_parameters(prefix=prefix), config)
    return recognizer.eval()


def require_fixed_features(perception: "AudioPerceptionModule") -> None:
    """
    Raises:
        ConfigError: features of the encoder differ from step to step, so they cannot be cached.
    """
    if not is_frozen(perception.encoder):
        raise ConfigError("Encoder features cannot be cached: the encoder is trained (see model.freeze_params).")
    if perception.spec_augmentation is not None:
        raise ConfigError("Encoder features cannot be cached: perception.spec_augment changes them at every step.")


def _input_length(perception_cfg: DictConfig) -> list[str]:
    encoder = perception_cfg.encoder
    taps = ["taps" + ".".join(map(str, encoder.taps))] if "taps" in encoder else []
    if (window := window_seconds(perception_cfg)) != WINDOW_SECONDS:
        taps.append(f"window{window:g}")
    if "layers" in encoder:
        lengths = (encoder.get("input_length", "trained"), encoder.get("round_seconds", 2.0), encoder.layers)
        return [*map(str, lengths), *taps]
    return [*(str(encoder[k]) for k in WHISPER_KEYS if k in encoder), *taps]


def input_length_reference(perception_cfg: DictConfig) -> dict[str, str]:
    """The encoder's input length and layers as a reference that trained weights are bound to.

    Empty for NeMo encoders.
    """
    values = _input_length(perception_cfg)
    return {"input_length": "/".join(values)} if values else {}


def encoder_key(perception_cfg: DictConfig, fingerprint: str, dtype: str) -> str:
    """Identity of an encoder's features: weights, input length, layers and precision; the key of the feature cache."""
    return "-".join([fingerprint, *_input_length(perception_cfg), dtype])


def encoder_frame_seconds(perception: Any) -> float:
    """Duration of one frame that the connector receives."""
    featurizer = perception.preprocessor.featurizer
    hop = featurizer.hop_length / featurizer.sample_rate
    return hop * getattr(perception.encoder, "subsampling_factor", SUBSAMPLING)


def connector_of(perception: Any) -> Connector | None:
    """Our connector, or None where the modality adapter is one of NeMo's own."""
    adapter = perception.modality_adapter
    return adapter if isinstance(adapter, Connector) else None


def writing_key(perception: Any) -> str | None:
    """:meth:`Connector.writing_key` of our connector."""
    connector = connector_of(perception)
    return None if connector is None else connector.writing_key()
