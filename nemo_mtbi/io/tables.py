"""Tables of text, tab-separated or comma-separated, row by row with the line that each stands in."""

import csv
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_mtbi.errors import DataError
from nemo_mtbi.io.text import opened

MAX_CELL_CHARACTERS = 1 << 24


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        line: of the file, from 1 (the last one of a row whose quoted cells hold line ends).
        cells: by column, without the spaces around them; empty where the row is short.
        problem: why the row cannot be used, or None.
    """

    line: int
    cells: dict[str, str]
    problem: str | None = None


def read_table(path: Path, columns: set[str], encoding: str | None = None, quoted: bool | None = None) -> Iterator[Row]:
    """Rows of a table with a header. A ``.csv`` is separated by the character that separates its header and may quote
    cells; any other table is separated by tabs, and quotation marks are text.

    Args:
        path: of the table.
        columns: that it must have.
        encoding: see :func:`nemo_mtbi.io.text.read_text`.
        quoted: whether it is as a ``.csv``; None: by the name.

    Raises:
        DataError: no header, or without these columns; bytes that cannot be decoded; a quoted cell without an end.
    """
    with ExitStack() as stack:
        lines = stack.enter_context(opened(path, encoding, newline=""))
        beginning = list(_to_the_header(lines))
        quoted = path.name.lower().removesuffix(".gz").endswith(".csv") if quoted is None else quoted
        yield from _table(path, columns, beginning, lines, stack, quoted)


def _to_the_header(lines: Iterator[str]) -> Iterator[str]:
    """Blank lines, and the first other one."""
    for line in lines:
        yield line
        if line.strip():
            return


def _table(
    path: Path, columns: set[str], beginning: list[str], lines: Iterator[str], stack: ExitStack, quoted: bool
) -> Iterator[Row]:
    header_line = beginning[-1] if beginning else ""
    if quoted:
        dialect: dict[str, Any] = {"delimiter": max(",;\t", key=header_line.count), "strict": True}
    else:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    limit = csv.field_size_limit(MAX_CELL_CHARACTERS)  # of the process
    stack.callback(csv.field_size_limit, limit)
    reader = csv.reader(itertools.chain(beginning, lines), **dialect)
    header = [name.strip() for name in next((cells for cells in reader if any(cells)), [])]
    missing = columns - set(header)
    if missing:
        found = ", ".join(header) or "no header"
        raise DataError(
            f"{path}, line {reader.line_num}: there is no column {', '.join(sorted(missing))}; it has {found}."
        )
    twice = sorted(name for name in columns if header.count(name) > 1)
    if twice:
        raise DataError(f"{path}, line {reader.line_num}: column {twice[0]} is there twice.")
    yield from _rows(path, reader, header)


def _rows(path: Path, reader: Any, header: list[str]) -> Iterator[Row]:
    while True:
        begin = reader.line_num + 1
        try:
            values = [value.strip() for value in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):  # all rows from here on would be one cell
                raise DataError(
                    f"{path}, line {begin}: a cell begins with a quotation mark and does not end with one. Write marks "
                    'that are text twice, in quoted cells ("""hello"" there"), or save the table separated by tabs.'
                ) from error
            yield Row(reader.line_num, {}, f"no row of a table ({error})")
            continue
        if not any(values):
            continue
        problem = None
        if any(values[len(header) :]):
            problem = f"{len(values)} cells, but the header has {len(header)}"
        cells = dict.fromkeys(header, "") | dict(zip(header, values, strict=False))
        yield Row(reader.line_num, cells, problem)
