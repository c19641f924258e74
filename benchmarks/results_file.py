"""How every benchmark ends: the result on stdout, and in a file if one was named; and what memory it took."""

import json
import re
from pathlib import Path
from typing import Any


def peak_gb(process: int | str = "self") -> float:
    """Peak resident memory of a process (getrusage also counts what it was before exec)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6  # type: ignore[index]


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Print a result, and write it to ``path``."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")
