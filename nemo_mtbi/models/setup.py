"""How MTBISALM is put together from its configuration: tokenizer, LLM, speech side, and what is frozen."""

import copy
import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.parts.lora import maybe_install_lora
from nemo.collections.speechlm2.parts.pretrained import load_pretrained_hf
from omegaconf import DictConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig

from nemo_mtbi.config import ModelConfig
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models.language_model import PrefixStore
from nemo_mtbi.modules.causal_lm import is_frozen, read_generation_config
from nemo_mtbi.modules.connectors.token import TokenConnector
from nemo_mtbi.modules.fused_norm import fuse_norms, rms_norm_class
from nemo_mtbi.modules.parameter_groups import parameter_groups
from nemo_mtbi.modules.perception import (
    connector_of,
    freeze,
    input_length_reference,
    is_frozen_by,
    require_fitting_encoder,
    setup_perception,
)
from nemo_mtbi.parallel.loading import empty_llm, materialize_adapters
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import resolve_pretrained

log = logging.getLogger(__name__)
LORA_INITIALIZATIONS = (True, False, "gaussian")  # of PEFT's

# Fields of SALM's configuration that NeMo reads from ``model.cfg``.
SALM_KEYS = ("pretrained_weights", "audio_locator_tag", "prompt_format", "freeze_params", "prevent_freeze_params")


def setup_parts(model: Any, cfg: dict[str, Any], config: ModelConfig) -> None:
    """Give ``model`` the parts that SALM has (``tokenizer``, ``llm``, ``embed_tokens``, ``perception``), and freeze
    them.

    SALM.__init__ would load every encoder as a NeMo ASR model and the LLM in fp32, so its steps are taken here.

    Raises:
        ConfigError: parts that cannot be trained together.
    """
    require_fitting_encoder(config)
    model.tokenizer = language_model_tokenizer(config)
    require_matching_groups(cfg, config, model.tokenizer)
    model.cfg = salm_config(cfg, config)
    model.audio_locator_tag = config.audio_locator_tag
    llm_path = config.llm_config_path or resolve_pretrained(config.pretrained_llm)
    model.llm_weights = llm_path  # where a rank reads its shard
    setup_llm(model, llm_path, config)
    setup_perception(model)
    model.perception.encoder.to(getattr(torch, config.encoder_dtype))
    model.references = config.references or {
        "llm": fingerprint(llm_path),
        "encoder": fingerprint(resolve_pretrained(config.pretrained_asr)),
        **input_length_reference(model.cfg.perception),
    }
    # Now rather than with the optimizer, so that evaluation tools see it too.
    freeze(model.named_parameters(), config)
    check_trainable(model, config)
    model.prefixes = prefix_store(model, config)


def language_model_tokenizer(config: ModelConfig) -> AutoTokenizer:
    """The LLM's, with the tag that stands for audio."""
    tokenizer = AutoTokenizer(
        config.tokenizer_path or resolve_pretrained(config.pretrained_llm),
        use_fast=True,
        trust_remote_code=config.trust_remote_code,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [config.audio_locator_tag]})
    return tokenizer


def salm_config(cfg: dict[str, Any], config: ModelConfig) -> DictConfig:
    """``model.cfg`` as NeMo reads it, with the defaults of the fields that it looks up."""
    own = DictConfig(cfg)
    for key in SALM_KEYS:
        own[key] = getattr(config, key)
    return own


def require_matching_groups(cfg: dict[str, Any], config: ModelConfig, tokenizer: AutoTokenizer) -> None:
    """Check, before any weight is loaded, that every parameter group has something to train.

    A finished model that is opened again (it describes its encoder) trains nothing, and its LoRA may be merged.

    Raises:
        ConfigError: a pattern matches no trained parameter that an earlier group leaves.
    """
    described = "_target_" in (config.perception.get("encoder") or {})
    if config.parameter_groups and config.pretrained_weights and not described:
        trained = [(name, p) for name, p in outline(cfg, config, tokenizer).named_parameters() if p.requires_grad]
        parameter_groups(trained, config.parameter_groups)


def outline(cfg: dict[str, Any], config: ModelConfig, tokenizer: AutoTokenizer) -> nn.Module:
    """The parts of the model on the ``meta`` device: names and shapes of all parameters, frozen or not, no weights."""
    model: Any = nn.Module()
    model.cfg = salm_config(copy.deepcopy(cfg), config)
    model.cfg.pretrained_weights = False
    model.tokenizer = tokenizer
    path = resolve_pretrained(config.pretrained_llm)
    with torch.random.fork_rng(devices=[]):  # what is built afterwards draws the same numbers
        with torch.device("meta"):
            llm_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
            model.llm = empty_llm(llm_config, getattr(torch, config.llm_dtype), config.trust_remote_code)
            model.embed_tokens = model.llm.model.embed_tokens
            del model.llm.model.embed_tokens
            maybe_install_lora(model)
        with init_empty_weights(include_buffers=False):  # NeMo's encoders compute with tensors as they are built
            setup_perception(model)
    freeze(model.named_parameters(), config)
    return model


def setup_llm(model: Any, path: str, config: ModelConfig) -> None:
    """LLM and token embedding apart, as SALM has them; LoRA adapters and fused norms where they are asked for.

    Raises:
        ConfigError: LoRA that would change the teacher, or is never read.
    """
    init = (config.lora or {}).get("init_lora_weights", True)
    if config.pretrained_weights and init not in LORA_INITIALIZATIONS:
        raise ConfigError(
            f"model.lora.init_lora_weights={init!r}: use {', '.join(map(str, LORA_INITIALIZATIONS))}. Others change "
            "the LLM's own weights, and the teacher is the LLM without LoRA, or begin with data."
        )
    dtype, remote_code = getattr(torch, config.llm_dtype), config.trust_remote_code
    sharded = config.tensor_model_parallel_size > 1
    if sharded:  # read in configure_model, when the ranks know each other
        model.llm = empty_llm(AutoConfig.from_pretrained(path, trust_remote_code=remote_code), dtype, remote_code)
    else:
        model.llm = load_pretrained_hf(path, config.pretrained_weights, dtype, remote_code)
    if sharded or not config.pretrained_weights:
        read_generation_config(model.llm, path)
    model.embed_tokens = model.llm.model.embed_tokens
    del model.llm.model.embed_tokens
    if config.fused_norms:
        count = fuse_norms(model.llm)
        log.info(f"{count} norms of the LLM are {rms_norm_class().__module__}'s")
    maybe_install_lora(model)
    if any(isinstance(m, LoraLayer) and n.endswith("lm_head") for n, m in model.llm.named_modules()):
        raise ConfigError(
            "model.lora adapts lm_head, which the objective reads as it is: leave it out of lora.target_modules."
        )
    if sharded:
        materialize_adapters(model.llm, init)


def trained_in_llm(model: Any) -> list[str]:
    """Names of the LLM's own weights that are trained, beside adapters."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)
    return [name for name, _ in named if name.startswith(("llm.", "embed_tokens."))]


def check_trainable(model: Any, config: ModelConfig) -> None:
    """
    Raises:
        ConfigError: weights of the LLM itself are trained under tensor parallelism, or with the LLM as its own online
            teacher; embeddings of which a connector keeps a copy; one of two names of a tensor; w_risk or w_ctc has
            nothing to train.
    """
    both = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.embed_tokens.weight]
    if len({is_frozen_by(config, name) for name in both}) > 1:
        raise ConfigError(
            f"model.freeze_params freezes only some of {', '.join(both)}, which are one tensor: freeze all or none."
        )
    if model.embed_tokens.weight.requires_grad and isinstance(connector_of(model.perception), TokenConnector):
        raise ConfigError(
            "model.freeze_params leaves embed_tokens trainable, and the connector gives the LLM its own tokens, whose "
            "embeddings it has read once. Freeze '^embed_tokens\\..+$' (and a head that is tied to it), or train LoRA."
        )
    encoder = any(p.requires_grad for p in model.perception.encoder.parameters())
    connector = connector_of(model.perception)
    if config.imitation.w_risk > 0 and not encoder and connector is not None and not connector.learns_by_risk:
        raise ConfigError(
            f"model.imitation.w_risk={config.imitation.w_risk} trains what a connector writes, and model.freeze_params "
            "freezes it."
        )
    if config.imitation.w_ctc > 0 and not encoder and connector is not None and not connector.learns_transcripts:
        raise ConfigError(
            f"model.imitation.w_ctc={config.imitation.w_ctc} trains the connector on transcripts, and "
            "model.freeze_params freezes what it would train. Set model.imitation.w_ctc=0."
        )
    trained = trained_in_llm(model)
    if trained and config.tensor_model_parallel_size > 1:
        raise ConfigError(
            f"model.freeze_params leaves {trained[0]} trainable; with trainer.tensor_model_parallel_size > 1 only LoRA "
            "(model.lora) can train in the LLM."
        )
    if trained and config.imitation.teacher in ("online", "unfused"):
        raise ConfigError(
            "teacher=online reads the LLM that is being trained here (model.freeze_params leaves some of it "
            "trainable). "
            "Use teacher=cached, or train LoRA adapters instead (model.lora), which the teacher does without."
        )


def prefix_store(model: Any, config: ModelConfig) -> PrefixStore | None:
    """Where prompt beginnings are kept; None where they cannot be.

    With LoRA the LLM changes, and so do the keys and values of the prompts; a layer that is computed twice would add
    its own to the kept ones twice.
    """
    frozen = is_frozen(model.llm) and is_frozen(model.embed_tokens) and not config.activation_checkpointing
    keep = config.prefix_cache_tokens if frozen else 0
    return PrefixStore(keep) if keep else None
