"""Tensors in files: complete or absent, and as readable as other files."""

import json
import shutil
import stat
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_mtbi.io.jsonl import keep

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # of Transformers


def weight_map(index: Path) -> dict[str, str]:
    """Name of each weight -> its file, of ``model.safetensors.index.json``.

    Raises:
        ValueError: it is damaged, or names a file elsewhere.
    """
    try:
        read = json.loads(index.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its brackets are too deep") from error
    named = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(named, dict) or not named:
        raise ValueError("it has no weight_map")
    for file in named.values():
        beside = isinstance(file, str) and Path(file).name == file and not (index.parent / file).is_dir()
        if not beside or not file.endswith(".safetensors"):
            raise ValueError(f"{file!r} is no safetensors file beside it")
    return named


def weight_files(folder: Path) -> dict[str, Path]:
    """Name of each weight of a folder -> the safetensors file that holds it; empty where there is none.

    Raises:
        ValueError: see :func:`weight_map`.
        SafetensorError: a file that is none.
    """
    if (folder / SINGLE).is_file():  # first, as for Transformers and NeMo
        with safe_open(folder / SINGLE, "pt") as weights:
            return dict.fromkeys(weights.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        return {}
    return {name: folder / file for name, file in weight_map(folder / INDEX).items()}


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, of safetensors files that are opened once each; they lie in the mapped files."""
    held: dict[Path, list[str]] = defaultdict(list)
    for name, file in files.items():
        held[file].append(name)
    for file, names in held.items():
        with safe_open(file, "pt") as weights:
            for name in names:
                yield name, weights.get_tensor(name)


def save_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, with the permissions that the umask gives (safetensors' own: the owner's alone)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(state, temporary, metadata=metadata)
        _change(temporary, mode)
        keep(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """A copy, complete or absent."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        shutil.copyfile(source, temporary)
        keep(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def as_readable_as_others(folder: Path) -> None:
    """Give all files under a folder the permissions that the umask gives to new ones."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            _change(file, mode)


def _change(file: Path, mode: int) -> None:
    with suppress(PermissionError):  # some file systems have permissions of their own
        file.chmod(mode)
