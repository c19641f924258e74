"""Pictures, and self-contained HTML pages: a Jinja2 template with escaping, pictures inside."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from nemo_mtbi.io import jsonl

STYLE = Path(__file__).with_name("style.css")


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Render ``template`` to ``path``; every value is escaped, and ``style`` holds the pages' common style sheet."""
    environment = Environment(autoescape=True, loader=FileSystemLoader(template.parent))
    page = environment.get_template(template.name).render(style=STYLE.read_text(encoding="utf-8"), **values)
    jsonl.write_text(path, page)


def subplots(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """matplotlib's ``subplots`` without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def save_picture(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, which is closed, as PNG under a temporary name and rename it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(path)


def picture(figure: Any) -> str:
    """A matplotlib figure, which is closed, as a ``data:`` address for an ``img`` element."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
