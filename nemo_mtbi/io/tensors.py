"""Tensors in files: complete or absent, and as readable as other files."""

import shutil
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nemo_mtbi.io.jsonl import keep


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
