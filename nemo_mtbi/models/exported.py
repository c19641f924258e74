"""A finished speech LLM opened with Transformers and our own modules alone: NeMo takes seconds to import."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nemo_mtbi.checkpoints.exported import (
    CONFIG,
    checked_directory,
    export_folder,
    local_config,
    module_class,
    require_every_weight,
)
from nemo_mtbi.checkpoints.fast_loading import fill, without_initialization
from nemo_mtbi.config import model_config
from nemo_mtbi.data.chat_template import ChatTemplateFormat
from nemo_mtbi.io.tensors import weight_files
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.modules.causal_lm import read_generation_config
from nemo_mtbi.modules.perception import connector_of, encoder_frame_seconds, fusion_of, window_seconds
from nemo_mtbi.process import expect_any_length

OWN_PARTS = "nemo_mtbi.modules."


def open_speech_llm(
    path: str | Path, tensor_model_parallel_size: int = 1, trust_remote_code: bool = False
) -> SpeechLLM:
    """Open what answers, with as little as it needs: see :class:`ExportedSpeechLLM`; everything else through
    :meth:`nemo_mtbi.models.MTBISALM.restore_from`, which gives the same answers.

    Args:
        path: ``.nemo`` file, exported directory, or training run.
        tensor_model_parallel_size: ranks that hold the LLM together.
        trust_remote_code: of a training run, whether it may run code that its LLM brings.

    Raises:
        CheckpointError: missing, damaged, hostile, or another kind of model.
    """
    expect_any_length()
    path = Path(path)
    if tensor_model_parallel_size > 1 or (path / "model.json").is_file():
        from nemo_mtbi.models import MTBISALM  # start-up: NeMo

        return MTBISALM.restore_from(path, "cpu", tensor_model_parallel_size, trust_remote_code)
    with export_folder(path) as folder:  # a .nemo file is unpacked once, whatever opens it
        names = checked_directory(folder)
        if not needs_no_nemo(json.loads((folder / CONFIG).read_text())):
            from nemo_mtbi.models import MTBISALM

            return MTBISALM.from_pretrained(folder)
        model = ExportedSpeechLLM(folder)
        require_every_weight(model, folder, names)
        return model


def needs_no_nemo(cfg: dict[str, Any]) -> bool:
    """Whether all parts of an exported configuration are ours or Transformers'."""
    perception = cfg["perception"]
    parts = [
        (perception.get(name) or {}).get("_target_", "") for name in ("preprocessor", "encoder", "modality_adapter")
    ]
    return (
        all(target.startswith(OWN_PARTS) for target in parts)
        and cfg.get("prompt_format", ChatTemplateFormat.NAME) == ChatTemplateFormat.NAME
        and not any(cfg.get(key) for key in ("lora", "fused_norms"))
        and not perception.get("spec_augment")
    )


class Perception(nn.Module):
    """The parts of NeMo's ``AudioPerceptionModule`` under its names, without those that only training needs."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.preprocessor = own_part(cfg.preprocessor)
        self.encoder = own_part(cfg.encoder)
        self.modality_adapter = own_part(cfg.modality_adapter)
        self.proj = nn.Identity()
        self.spec_augmentation = None
        self.fusion, self.window_seconds = fusion_of(cfg), window_seconds(cfg)


def own_part(cfg: DictConfig) -> nn.Module:
    """A module by its ``_target_``; see :func:`nemo_mtbi.checkpoints.exported.module_class`."""
    options: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    found = module_class(options.pop("_target_"))
    return found(**{k: OmegaConf.create(v) if isinstance(v, dict | list) else v for k, v in options.items()})


class ExportedSpeechLLM(SpeechLLM):
    """An export in evaluation mode: it answers as :class:`nemo_mtbi.models.MTBISALM` does, and does nothing else.

    Args:
        folder: exported directory for which :func:`needs_no_nemo` holds.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        cfg = local_config(folder)
        self.config = config = model_config(cfg)
        self.audio_locator_tag = config.audio_locator_tag
        # ``.tokenizer``, as in NeMo's AutoTokenizer
        own = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        self.tokenizer = SimpleNamespace(tokenizer=own)
        self.tokenizer.tokenizer.add_special_tokens({"additional_special_tokens": [self.audio_locator_tag]})
        with without_initialization():
            llm = AutoConfig.from_pretrained(str(config.llm_config_path), trust_remote_code=False)
            self.llm = AutoModelForCausalLM.from_config(llm, dtype=getattr(torch, config.llm_dtype))
            read_generation_config(self.llm, str(config.llm_config_path))
            self.embed_tokens = self.llm.model.embed_tokens
            del self.llm.model.embed_tokens
            self.perception = Perception(OmegaConf.create(cfg["perception"]))
        self.perception.encoder.to(getattr(torch, config.encoder_dtype))
        self.frame_seconds = encoder_frame_seconds(self.perception)
        fill(self, weight_files(folder))  # as checked when the folder was opened
        self.requires_grad_(False)
        connector = connector_of(self.perception)
        assert connector is not None
        connector.bind_language_model(self.tokenizer.tokenizer, self.embed_tokens)
        self.eval()

    def prompt_formatter(self) -> type:
        return ChatTemplateFormat
