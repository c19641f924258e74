"""What the readers of labelled corpora share: tables, folders, wordings."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_mtbi.errors import DataError
from nemo_mtbi.evaluation.questions import LabelledConfig
from nemo_mtbi.io.text import numbered_lines, read_text

CHOICE_PROMPT = "{question} Answer with one of these and nothing else: {choices}."


def fill(template: str, **values: str) -> str:
    for name, value in values.items():  # not str.format: a question may hold braces
        template = template.replace("{" + name + "}", value)
    return template


def folder_of(config: LabelledConfig, published: Path) -> Path:
    """The folder of the recordings."""
    folder = Path(config.audio) if config.audio else published
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} with the recordings of {config.path}; set audio.")
    return folder


def tsv(path: Path, encoding: str | None, columns: set[str], **dialect: Any) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(read_text(path, encoding), newline=""), delimiter="\t", **dialect))
    for row in rows:
        if torn := [value for value in row.values() if isinstance(value, str) and "\n" in value and "\t" in value]:
            raise DataError(
                f"{path}: a cell begins with a quotation mark that does not end in its line: {torn[0][:60]!r}. Close "
                "it, or take it away."
            )
    if not rows or not columns <= set(rows[0]):
        raise DataError(f"{path} needs the columns {', '.join(sorted(columns))}.")
    return rows


def json_lines(path: Path, encoding: str | None = None) -> Iterator[dict[str, Any]]:
    for number, line in numbered_lines(path, encoding):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}, not an object.")
        yield row


def words(name: str) -> str:
    """``coffeeDrink`` and ``alarm_set`` -> ``coffee drink``, ``alarm set``."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).replace("_", " ").strip()
