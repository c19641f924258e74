"""Writes exports that need nothing else: a Hugging Face directory, and the same directory as one ``.nemo`` file.

Contents: ``config.json`` (SALM's configuration format, encoder and connector described completely),
``model.safetensors`` (every weight; above :data:`SHARD` several files and Transformers' index), the tokenizer's files,
``llm_backbone/config.json`` and ``generation_config.json``, and ``README.md``.
No pickle, no code: classes come from the configuration through NeMo's list of allowed targets.
"""

import json
import logging
import os
import re
import tarfile
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_model, split_torch_state_dict_into_shards
from nemo.collections.common.prompts import PromptFormatter
from omegaconf import OmegaConf

from nemo_mtbi.checkpoints.card import model_card
from nemo_mtbi.checkpoints.exported import CONFIG, LLM_BACKBONE_DIR, NEMO_CONFIG
from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.checkpoints.seen_record import SEEN
from nemo_mtbi.data.chat_template import chat_template
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.tensors import INDEX, as_readable_as_others
from nemo_mtbi.modules.causal_lm import causal_lm

log = logging.getLogger(__name__)

SHARD = "50GB"  # as Transformers has it
# By which vLLM and Transformers know NeMo's speech LLMs (nemo/collections/speechlm2/parts/hf_hub.py).
IDENTITY = {"model_type": "nemo_speechlm", "architectures": ["NeMoSpeechLMForConditionalGeneration"]}
# Settings of training that mean nothing to a user of the model, and where an export that was opened lies.
NOT_EXPORTED = (
    "optimizer",
    "lr_scheduler",
    "alignment_stage",
    "ctc_vocabulary",
    "max_bad_steps",
    "prefix_cache_tokens",
    "packing",
    "llm_config_path",
    "tokenizer_path",
)


def exported_config(model: Any) -> dict[str, Any]:
    """The configuration with which the exported weights load without their pretrained sources."""
    cfg: dict[str, Any] = OmegaConf.to_container(model.cfg, resolve=True)  # type: ignore[assignment]
    cfg = {k: v for k, v in cfg.items() if k not in NOT_EXPORTED}
    own = {"pretrained_weights": False, "references": model.references, "trust_remote_code": False}
    return IDENTITY | cfg | own


def require_size(size: Any) -> None:
    """
    Raises:
        ConfigError: no size such as ``"50GB"``, or number of bytes.
    """
    number = re.fullmatch(r"\s*(\d+)\s*[KMGT]B\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    found = int(number[1]) if number else size if type(size) is int else 0
    if found < 1:
        raise ConfigError(f"max_shard_size={size!r}: a size with its unit, as 50GB, or a number of bytes.")


def save_directory(
    model: Any,
    folder: Path,
    card: str | None = None,
    seen: dict[str, Any] | None = None,
    max_shard_size: int | str = SHARD,
) -> Path:
    """Write the Hugging Face directory; it is complete or absent.

    Args:
        model: a :class:`nemo_mtbi.models.MTBISALM`.
        folder: where to; must not exist or be empty.
        card: text of README.md; by default one without the run's records.
        seen: what it was trained on (``seen.json``).
        max_shard_size: bytes of a file of weights, as ``"50GB"``. NeMo's own ``SALM.from_pretrained`` opens one file
            alone.

    Raises:
        ConfigError: a size that is none.
        CheckpointError: the folder is in use, or the model is one rank's part of it.
    """
    if model.vocabulary_shard.group is not None:
        raise CheckpointError(
            "The model is spread over tensor-parallel ranks, and none has all of its weights: export it with "
            "`mtbi export`, or open it with tensor_model_parallel_size=1 first."
        )
    require_size(max_shard_size)
    with _new_folder(folder) as temporary:
        # torch_dtype etc. of SALM are left alone: weights are stored in the type that each part computes in.
        save_weights(model, temporary, max_shard_size)
        jsonl.write_text(temporary / CONFIG, json.dumps(exported_config(model), sort_keys=True, indent=2))
        save_tokenizer(model, temporary)
        backbone = causal_lm(model.llm)
        backbone.config.save_pretrained(temporary / LLM_BACKBONE_DIR)
        backbone.generation_config.save_pretrained(temporary / LLM_BACKBONE_DIR)
        jsonl.write_text(temporary / "README.md", card or model_card(model))
        if seen:
            jsonl.write_json(temporary / SEEN, seen)
    return folder


def save_weights(model: Any, folder: Path, max_shard_size: int | str) -> None:
    """In one file, or in several, whose names no other export has: half a copy over an older export is noticed."""
    if not split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=max_shard_size).is_sharded:
        save_torch_model(model, folder, max_shard_size=max_shard_size)
        return
    name = f"model-{uuid.uuid4().hex[:12]}{{suffix}}.safetensors"
    save_torch_model(model, folder, max_shard_size=max_shard_size, filename_pattern=name)
    (folder / f"{name.format(suffix='')}.index.json").rename(folder / INDEX)


def save_tokenizer(model: Any, folder: Path) -> None:
    """The tokenizer with the chat template of the model's prompt format, so that every client prompts as in training.

    Without any, and a warning, where no template equals the format.
    """
    hf = model.tokenizer.tokenizer
    own = hf.chat_template
    try:
        try:
            hf.chat_template = chat_template(model.tokenizer, PromptFormatter.resolve(model.cfg.prompt_format))
        except ConfigError as error:
            log.warning(f"The export has no chat template: {error}")
            hf.chat_template = None
        hf.save_pretrained(folder)
    finally:
        hf.chat_template = own


def save_trainable(
    model: Any, folder: Path, stage: str, card: str | None = None, seen: dict[str, Any] | None = None
) -> Path:
    """Write what was trained alone, with references to what is frozen: a few MB, laid out as a training run.

    ``MTBISALM.restore_from`` opens it where the same LLM and encoder can be found under the names in ``model.json``.

    Args:
        model: what to export.
        folder: where to; must not exist or be empty.
        stage: name of the training stage that the weights come from.
        card, seen: as in :func:`save_directory`.

    Raises:
        CheckpointError: the folder is in use.
    """
    with _new_folder(folder) as temporary:
        run = RunDirectory(temporary)
        run.save_config(model, {k: v for k, v in model.hparams["cfg"].items() if k not in NOT_EXPORTED})
        run.save_weights(model, stage)
        jsonl.write_text(temporary / "README.md", card or model_card(model, whole=False))
        if seen:
            jsonl.write_json(temporary / SEEN, seen)
    return folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that takes its name when it is complete."""
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name another folder or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        temporary = Path(name) / folder.name
        temporary.mkdir()
        yield temporary
        as_readable_as_others(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)


def save_nemo(
    model: Any,
    path: Path,
    card: str | None = None,
    seen: dict[str, Any] | None = None,
    max_shard_size: int | str = SHARD,
) -> Path:
    """Write one ``.nemo`` archive (uncompressed tar of the directory, and ``model_config.yaml`` as NeMo's archives
    have).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        folder = save_directory(model, Path(name) / "model", card, seen, max_shard_size)
        OmegaConf.save(
            OmegaConf.create({"target": "nemo_mtbi.models.MTBISALM", **exported_config(model)}), folder / NEMO_CONFIG
        )
        temporary = Path(name) / "archive"
        with tarfile.open(temporary, "w:") as tar:
            for file in sorted(folder.rglob("*")):
                tar.add(file, arcname=f"./{file.relative_to(folder)}", recursive=False)
        jsonl.keep(temporary)
        os.replace(temporary, path)
    return path
