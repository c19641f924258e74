"""What a model was trained on: ``seen.json`` of a run, of an exported folder, in a ``.nemo`` file."""

import json
import tarfile
from pathlib import Path
from typing import Any

from nemo_mtbi.io import jsonl

SEEN = "seen.json"
TASKS, EARLIER = "tasks", "earlier_tasks"  # of this run; of those that it began with


def record_of(path: Path) -> dict[str, Any]:
    """The record that lies with a model; empty without one."""
    if path.is_dir():
        return jsonl.read_json(path / SEEN)
    try:
        with tarfile.open(path, "r:") as archive:
            file = archive.extractfile(f"./{SEEN}")
            return json.load(file) if file is not None else {}
    except (OSError, KeyError, ValueError, tarfile.TarError):
        return {}


def seen_prompts(path: Path) -> dict[str, set[str]]:
    """Ids of the prompts by task that a model was trained on, those of the runs that it began with too."""
    record, found = record_of(path), dict[str, set[str]]()
    for tasks in (record.get(TASKS, {}), record.get(EARLIER, {})):
        for task, prompts in tasks.items():
            found.setdefault(task, set()).update(prompts)
    return found
