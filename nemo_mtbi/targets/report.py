"""One self-contained HTML page about a run of target generation: counts, lengths, examples, rejected answers."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_mtbi.io import jsonl
from nemo_mtbi.io.html import picture, subplots, write_page

EXAMPLES, REJECTED_EXAMPLES = 4, 20

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(path: Path, manifest: dict[str, Any], written: dict[str, Path], rejected: list[Path]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        manifest: what ``manifest.json`` holds.
        written: manifests with targets.
        rejected: side files of rejected answers.
    """
    lengths: defaultdict[str, Counter[int]] = defaultdict(Counter)
    shown: dict[str, list[dict[str, str]]] = {}
    for transcript, target in _targets(written):
        lengths[target["task"]][len(target["response_ids"])] += 1
        examples = shown.setdefault(target["task"], [])
        if len(examples) < EXAMPLES:
            examples.append({k: target[k] for k in ("task", "prompt", "response")} | {"transcript": transcript})
    side = list(islice((record for path in rejected for record in jsonl.read(path)), REJECTED_EXAMPLES))
    write_page(
        path,
        _TEMPLATE,
        m=manifest,
        rejected_total=sum(manifest["rejected"].values()),
        picture=_histogram(lengths),
        rejected=side,
        examples=[e for task in sorted(shown) for e in shown[task]],
    )


def _targets(written: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in written.values():
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                cut = json.loads(line)
                transcript = " ".join(s.get("text", "") for s in cut["supervisions"])
                for target in cut["custom"].get("targets", []):
                    yield transcript, target


def _histogram(lengths: dict[str, Counter[int]]) -> str:
    figure, axis = subplots(figsize=(8, 3))
    names = sorted(lengths)
    values, weights = [list(lengths[n]) for n in names], [list(lengths[n].values()) for n in names]
    axis.hist(values, weights=weights, bins=24, stacked=True, label=names)
    axis.set_xlabel("response tokens")
    axis.set_ylabel("answers")
    axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    return picture(figure)
