"""Files that take their name when they are complete are on the disk before: a machine may die at any time."""

import os
from pathlib import Path

import pytest
import torch

from nemo_mtbi.io import jsonl
from nemo_mtbi.io.tensors import copy_file, save_tensors
from nemo_mtbi.training.resume import AtomicCheckpointIO

pytestmark = pytest.mark.unit


def copied(path):
    source = path.with_name("source")
    source.write_text("weights")
    copy_file(source, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_tensors({"a": torch.ones(2)}, path),
        copied,
        lambda path: jsonl.write_json(path, {"a": 1}),
        lambda path: AtomicCheckpointIO().save_checkpoint({"a": torch.ones(2)}, path),
    ],
    ids=["tensors", "copy", "json", "checkpoint"],
)
def test_what_has_its_name_is_on_the_disk(tmp_path, monkeypatch, write):
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaced(self, target):
        events.append((self.name, Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path / "file")
    (written, (named, target)) = events
    assert written == named != target == "file" and (tmp_path / "file").stat().st_size
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "source"}
