"""One page about the voices of a corpus: histograms with the cut points, labels, recordings to listen to."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_mtbi.data.description import DESCRIPTION_FIELD
from nemo_mtbi.io.html import picture, subplots, write_page
from nemo_mtbi.preparation.describe import VOICE_FIELD

EXAMPLES = 3  # recordings of each label
_TEMPLATE = Path(__file__).with_name("voice_report.html.j2")


def write_voice_report(path: Path, report: dict[str, Any], cuts: Iterable[dict[str, Any]]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        report: with ``described``, as :meth:`nemo_mtbi.preparation.describe.Describer.report` gives it.
        cuts: described, as a manifest holds them.
    """
    utterances = 0
    values: Any = defaultdict(lambda: array("f"))
    shown: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for cut, supervision in ((own, s) for own in cuts for s in own["supervisions"]):
        utterances += 1
        custom = supervision.get("custom") or {}
        for name, value in custom.get(VOICE_FIELD, {}).items():
            values[name].append(value)
        for name, label in custom.get(DESCRIPTION_FIELD, {}).items():
            if len(shown[name, label]) < EXAMPLES:
                shown[name, label].append(_example(cut, supervision, path.parent))
    rules = report["described"]["rules"]
    write_page(
        path,
        _TEMPLATE,
        d=report["described"],
        utterances=utterances,
        picture=_histograms(values, rules),
        examples=[{"name": n, "label": label, "rows": rows} for (n, label), rows in sorted(shown.items())],
    )


def _example(cut: dict[str, Any], supervision: dict[str, Any], folder: Path) -> dict[str, str]:
    sources = (cut.get("recording") or {}).get("sources", [])
    path = next((Path(s["source"]).resolve() for s in sources if s.get("type") == "file"), None)
    begin = cut.get("start", 0.0) + supervision.get("start", 0.0)
    place = "" if path is None else f"{path.as_uri()}#t={begin:.2f},{begin + supervision['duration']:.2f}"
    return {"audio": place, "text": supervision.get("text") or "", "id": cut["id"]}


def _histograms(values: Mapping[str, Sequence[float]], rules: dict[str, dict[str, Any]]) -> str:
    figure, axes = subplots(
        (len(values) + 2) // 3 or 1, 3, figsize=(11, 2.4 * ((len(values) + 2) // 3 or 1)), squeeze=False
    )
    for axis in axes.flat[len(values) :]:
        axis.set_visible(False)
    for axis, (name, own) in zip(axes.flat, sorted(values.items()), strict=False):
        axis.hist(own, bins=40, color="#76b900")
        for rule in (r for r in rules.values() if r["from"] == name):
            groups = rule["cuts"] if isinstance(rule["cuts"], dict) else {"": rule["cuts"] or []}
            for style, (group, points) in zip(("-", "--", ":", "-."), groups.items(), strict=False):
                for number, point in enumerate(points):
                    label = group if group and number == 0 else None
                    axis.axvline(point, color="black", linewidth=1, linestyle=style, label=label)
            if len(groups) > 1:
                axis.legend(fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    return picture(figure)
