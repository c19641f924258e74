"""The model's configuration: every default in one place, checked before any weight is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.data.interleaving import InterleavingPolicy, Schedule
from nemo_mtbi.data.messages import NOTHING_HEARD_ANSWER, SPEECH_POSITIONS
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.imitation import ImitationObjective
from nemo_mtbi.process import fast_bfloat16

DTYPES = ("float32", "bfloat16")
AUTO = "auto"  # bfloat16 where this machine computes faster in it, else float32
TEACHERS = ("online", "cached", "unfused", "none")
MEANS_OVER = ("tokens", "answers")
PERCEPTION_KEYS = (
    "encoder_layers",
    "encoder_taps",
    "fusion",
    "input_length",
    "modality_adapter",
    "round_seconds",
    "window_seconds",
    *("encoder", "preprocessor", "spec_augment", "output_dim", "target", "decoder", "_target_", "proj"),  # NeMo's
)


@dataclass
class ImitationConfig:
    """Objective of the imitation stage; see :mod:`nemo_mtbi.losses.imitation`.

    ``w_ctc`` weighs the connector's own loss on the transcripts (CTC; cross-entropy of an attention decoder),
    ``w_align`` the word-level alignment term, ``w_risk`` the minimum risk over ``risk_samples`` hypotheses of a
    connector that writes text (the greedy one, the others drawn at ``risk_temperature``); ``teacher`` is ``online``,
    ``cached`` (top-k stored with the targets), ``unfused`` (the student on all positions, where ``perception.fusion``
    merges some; validation has the online one) or ``none`` (CE alone); ``task_weights`` multiplies the loss of a task.
    CE and KL are means over response ``tokens``, or over ``answers`` of the mean over their tokens (``mean_over``): one
    word then weighs as much as a paragraph (verl's token-mean and seq-mean-token-mean).
    """

    w_ce: float = 1.0
    w_kl: float = 1.0
    w_ctc: float = 0.0
    w_align: float = 0.0
    w_risk: float = 0.0
    risk_samples: int = 4
    risk_temperature: float = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"
    teacher: str = "online"
    mean_over: str = "tokens"
    task_weights: dict[str, float] = field(default_factory=dict)

    @property
    def by_answer(self) -> bool:
        """Whether answers weigh alike, not tokens."""
        return self.mean_over == "answers"

    @property
    def by_the_llm(self) -> bool:
        """Whether the LLM's own loss counts: CE or KL."""
        return self.w_ce > 0 or self.w_kl > 0

    def objective(self) -> ImitationObjective:
        return ImitationObjective(self.w_ce, self.w_kl, self.temperature, self.divergence)


@dataclass
class InterleavingConfig:
    """See :class:`nemo_mtbi.data.interleaving.InterleavingPolicy`; ``schedule`` is a list of [step, factor]."""

    probability: float = 0.5
    text_share: float = 0.5
    span_words: float = 3.0
    span_distribution: str = "geometric"
    level: str = "embedding"
    schedule: list[list[float]] = field(default_factory=lambda: [[0, 1.0]])
    seed: int = 0

    def policy(self) -> InterleavingPolicy:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return InterleavingPolicy(
            **{**values, "schedule": Schedule({int(step): factor for step, factor in self.schedule})}
        )


@dataclass
class AlignmentStageConfig:
    """The alignment stage, the connector's warm start: weights of its two terms, and the learning rate that it needs.

    Its trainer and optimizer are ``alignment_stage`` in train.yaml.
    """

    w_ctc: float = 1.0
    w_align: float = 0.0
    lr: float = 1.0e-3


@dataclass
class CTCVocabularyConfig:
    """Tokens that a CTC connector can emit: those of the training transcripts, most frequent first."""

    max_size: int = 8192
    min_count: int = 1


@dataclass
class ParameterGroupConfig:
    """Trained parameters whose names match ``pattern`` (a regular expression, from the beginning), with own settings.

    The first matching group wins; what no group matches has the optimizer's settings.
    """

    pattern: str = MISSING
    lr: float | None = None
    weight_decay: float | None = None


@dataclass
class ModelConfig:
    """``model`` in YAML. ``perception``, ``optimizer``, ``lr_scheduler`` and ``lora`` are NeMo's own sections.

    Attributes:
        pretrained_llm: ``offline:`` part, hub name or local directory of the LLM.
        pretrained_asr: Whisper or NeMo ASR model that provides the speech encoder (``offline:``, hub name, path,
            .nemo).
        prompt_format: a NeMo prompt format, or ``chat_template`` for the tokenizer's own.
        speech_position: the speech stands ``after`` or ``before`` the task prompt.
        llm_dtype, encoder_dtype: storage and compute type of the frozen parts (``float32``, ``bfloat16`` or ``auto``);
            the connector stays float32.
        nothing_heard_answer: the answer where a connector that writes text hears no speech in the question's audio;
            null: the LLM's own, to a transcript "...".
        prefix_cache_tokens: tokens of prompt beginnings whose keys and values are kept (0: none); see PrefixStore.
        packing: compute the examples' own positions alone, no padding, where the LLM can (all layers full attention by
            Transformers' ``sdpa`` or ``flash_attention_*``) and there is enough padding; see models/packing.py.
        tensor_model_parallel_size: ranks that hold the LLM together; ``trainer.tensor_model_parallel_size`` sets it.
        sequence_parallel: with tensor parallelism, spread what lies between attention and feed-forward blocks over
            positions.
        activation_checkpointing: keep only each layer's input for the backward pass and compute the rest again; turns
            the kept prompt beginnings off.
        fused_norms: RMSNorms of the LLM as one kernel each (Transformer Engine's, NVIDIA apex's or PyTorch's).
        parameter_groups: see :class:`ParameterGroupConfig`; over ``optimizer``.
        shard_optimizer: spread the optimizer's states over the data-parallel ranks (ZeRO stage 1); see
            :mod:`nemo_mtbi.parallel.sharded_optimizer`.
        max_bad_steps: stop after this many optimizer steps skipped for a non-finite loss or gradient.
    """

    pretrained_llm: str = MISSING
    pretrained_asr: str = MISSING
    pretrained_weights: bool = True
    audio_locator_tag: str = "<|audio|>"
    prompt_format: str = "chat_template"
    speech_position: str = "after"
    llm_dtype: str = "float32"
    encoder_dtype: str = "float32"
    perception: Any = MISSING
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    interleaving: InterleavingConfig = field(default_factory=InterleavingConfig)
    alignment_stage: AlignmentStageConfig = field(default_factory=AlignmentStageConfig)
    ctc_vocabulary: CTCVocabularyConfig = field(default_factory=CTCVocabularyConfig)
    freeze_params: list[str] = field(
        default_factory=lambda: [r"^embed_tokens\..+$", r"^llm\..+$", r"^perception\.encoder.+$"]
    )
    prevent_freeze_params: list[str] = field(default_factory=list)
    optimizer: Any = None
    parameter_groups: list[ParameterGroupConfig] = field(default_factory=list)
    shard_optimizer: bool = False
    lr_scheduler: Any = None
    lora: Any = None
    nothing_heard_answer: str | None = NOTHING_HEARD_ANSWER
    trust_remote_code: bool = False
    prefix_cache_tokens: int = 4096
    packing: bool = True
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    fused_norms: bool = False
    max_bad_steps: int = 20
    # Written by an export, read by from_pretrained / restore_from (as in NeMo's SALM).
    llm_config_path: str | None = None  # where the export lies now; not written
    tokenizer_path: str | None = None  # likewise
    references: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None
    architectures: Any = None
    target: str | None = None
    torch_dtype: str | None = None


def model_config(cfg: DictConfig | dict[str, Any]) -> ModelConfig:
    """Fill in defaults and check everything that can be checked without weights.

    Raises:
        ConfigError: lists every problem found: unknown keys, wrong types, values out of range.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), plain(cfg))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"model: {error.msg if hasattr(error, 'msg') else error} (key: {error.full_key})") from error
    assert isinstance(config, ModelConfig)
    problems = []
    for name in ("pretrained_llm", "pretrained_asr", "perception"):
        if getattr(config, name) in (None, MISSING):
            problems.append(f"model.{name} is required")
    for name in ("llm_dtype", "encoder_dtype"):
        if getattr(config, name) == AUTO:
            setattr(config, name, "bfloat16" if fast_bfloat16() else "float32")
        if getattr(config, name) not in DTYPES:
            problems.append(f"model.{name}={getattr(config, name)!r}: use {', '.join(DTYPES)} or {AUTO}")
    if config.speech_position not in SPEECH_POSITIONS:
        problems.append(f"model.speech_position={config.speech_position!r}: use {' or '.join(SPEECH_POSITIONS)}")
    if config.imitation.teacher not in TEACHERS:
        problems.append(f"model.imitation.teacher={config.imitation.teacher!r}: use {', '.join(TEACHERS)}")
    if config.imitation.mean_over not in MEANS_OVER:
        problems.append(f"model.imitation.mean_over={config.imitation.mean_over!r}: use {' or '.join(MEANS_OVER)}")
    if config.imitation.teacher == "none" and config.imitation.w_kl > 0:
        problems.append("model.imitation: w_kl > 0 needs teacher=online, cached or unfused")
    fusion = config.perception.get("fusion") if isinstance(config.perception, dict) else None
    if config.imitation.teacher == "unfused" and not fusion:
        problems.append("model.imitation.teacher=unfused needs model.perception.fusion, which merges positions")
    if config.sequence_parallel and config.tensor_model_parallel_size > 1 and not torch.cuda.is_available():
        problems.append("model.sequence_parallel=true needs GPUs")
    imitation = config.imitation
    terms = imitation.w_ctc > 0 or imitation.w_align > 0 or imitation.w_risk > 0
    if imitation.w_risk < 0 or imitation.risk_samples < 2 or imitation.risk_temperature <= 0:
        problems.append(
            f"model.imitation: w_risk={imitation.w_risk} must be >= 0, risk_samples={imitation.risk_samples} at least "
            f"2, risk_temperature={imitation.risk_temperature} positive"
        )
    if imitation.w_risk > 0 and not imitation.by_the_llm:
        problems.append("model.imitation: w_risk weighs hypotheses by CE and KL, so w_ce or w_kl must be above 0")
    if not config.imitation.by_the_llm and not terms:
        problems.append("model.imitation: w_ce, w_kl, w_ctc and w_align are all 0, so nothing is trained")
    for key, value in {
        "imitation.w_ctc": imitation.w_ctc,
        "imitation.w_align": imitation.w_align,
        "alignment_stage.w_ctc": config.alignment_stage.w_ctc,
        "alignment_stage.w_align": config.alignment_stage.w_align,
        "max_bad_steps": config.max_bad_steps,
        "prefix_cache_tokens": config.prefix_cache_tokens,
        **{f"imitation.task_weights.{task}": weight for task, weight in imitation.task_weights.items()},
    }.items():
        if value < 0:
            problems.append(f"model.{key}={value} must be at least 0")
    if config.ctc_vocabulary.max_size < 1:
        problems.append(f"model.ctc_vocabulary.max_size={config.ctc_vocabulary.max_size} must be at least 1")
    cuts_audio = config.interleaving.level == "waveform" and config.interleaving.probability > 0
    if cuts_audio and terms:
        problems.append(
            "model.interleaving.level=waveform cuts the audio, so imitation.w_ctc, w_align and w_risk must be 0"
        )
    prompt = (config.perception.get("modality_adapter") or {}).get("acoustic_prompt")
    if prompt is not None and not isinstance(prompt, str):
        problems.append(
            f"model.perception.modality_adapter.acoustic_prompt={prompt} is no text: write it in quotes (braces are "
            "YAML's own)"
        )
    if cuts_audio and prompt is not None:
        problems.append(
            "model.interleaving.level=waveform cuts the audio, an acoustic_prompt describes all of it: use embedding"
        )
    for group in config.parameter_groups:
        try:
            re.compile(group.pattern)
        except re.error as error:
            problems.append(f"model.parameter_groups: {group.pattern!r} is no regular expression ({error})")
        if group.lr is None and group.weight_decay is None:
            problems.append(f"model.parameter_groups: {group.pattern!r} sets neither lr nor weight_decay")
    for build in (config.imitation.objective, config.interleaving.policy):
        try:
            build()
        except ConfigError as error:
            problems.append(f"model: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def misspelled(place: str, keys: Any, known: Sequence[str]) -> list[str]:
    """Problems: keys that look like known ones of ours. (NeMo's sections have more than we know.)"""
    found = [(str(key), get_close_matches(str(key), known, 1, 0.85)) for key in keys or ()]
    return [f"{place}.{key}: did you mean {near[0]}?" for key, near in found if near and key not in known]


def plain(value: Any) -> Any:
    """A configuration as dictionaries and lists."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return value
