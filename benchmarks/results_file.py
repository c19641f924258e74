"""How every benchmark ends: the result on stdout, and in a file if one was named."""

import json
from pathlib import Path
from typing import Any


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Print a result, and write it to ``path``."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")
