"""Benchmark results as JSON, Markdown, HTML and a picture."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_mtbi.evaluation.metrics import LIBRARIES
from nemo_mtbi.evaluation.statistics import LEAST_UNITS, interval_text
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.html import picture, save_picture, subplots, write_page

_TEMPLATE = Path(__file__).with_name("benchmark.html.j2")
TITLES = {
    "token_agreement": "token agreement",
    "kl_per_token": "KL / token",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF (mean)",
    "form": "form kept",
    "accuracy_text": "choice, by text",
    "accuracy_likelihood": "choice, by likelihood",
    "f1_text": "F1, by text",
    "f1_likelihood": "F1, by likelihood",
    "wer": "WER to transcript",
    "wer_to_text_llm": "WER to the text LLM",
    "bleu": "BLEU",
    "exact_match": "exact match",
    "answer_f1": "answer F1",
    "contains_label": "contains the label",
    "instructions": "instructions followed",
    "prompts": "prompts followed",
}
BY_TASK = ("token_agreement", "accuracy_likelihood")  # shown for each task: the first one that there is
TESTED = ("token_agreement", "kl_per_token", "rouge_l")


def write_report(folder: Path, results: dict[str, Any], about: dict[str, Any], command: str) -> dict[str, Path]:
    """Write benchmark.json, .md, .html and .png, and ``confusions.CORPUS.png`` of labelled choices.

    Args:
        folder: where to.
        results: ``[set][column][system]``, see :func:`nemo_mtbi.evaluation.benchmark.summarize`.
        about: what was run.
        command: exactly as it was.
    """
    paths = {name: folder / f"benchmark.{name}" for name in ("json", "md", "html", "png")}
    versions = {name: version(name) for name in LIBRARIES}
    jsonl.write_json(paths["json"], {"command": command, "versions": versions, **about, "results": results})
    sections = [section for name, columns in results.items() for section in _sections(name, columns, about["baseline"])]
    if silence := about.get("nothing_heard"):
        sets = list(next(iter(silence.values())))
        rows = [["system", *sets], *([name, *map(_plain, shares.values())] for name, shares in silence.items())]
        sections.append(("share of recordings in which nothing is heard", rows))
    jsonl.write_text(paths["md"], markdown(sections, about, command, versions))
    figures = {name: plot(columns) for name, columns in results.items() if "labels" not in columns}
    save_picture(next(iter(figures.values())), paths["png"])
    for name, columns in results.items():
        if "labels" in columns and (figure := plot_confusions(columns["labels"])) is not None:
            figures[f"{name}: what was answered for each label"] = figure
            paths[f"confusions.{name}"] = folder / f"confusions.{name}.png"
            save_picture(figure, paths[f"confusions.{name}"])
    write_page(
        paths["html"],
        _TEMPLATE,
        sections=sections,
        command=command,
        versions=versions,
        about=about,
        pictures={name: picture(figure) for name, figure in figures.items()},
    )
    return paths


def _sections(name: str, columns: dict[str, Any], baseline: str) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of the tables about one set; the first row is the head."""
    sections = []
    for column, systems in columns.items():
        title = f"{name}: {column.replace('_', ' ')}"
        kinds = [m for m in TITLES if any(m in s["scores"] for s in systems.values())]
        if not kinds:  # without answers (generate=false) a label may leave nothing to score
            continue
        rows = [["system", *(TITLES[m] for m in kinds), "answers"]]
        for system, entry in systems.items():
            cells = [_with_interval(entry["scores"].get(m)) for m in kinds]
            missing = f" ({entry['missing']} missing)" if entry["missing"] else ""
            rows.append([system, *cells, f"{entry['answers']}{missing}"])
        sections.append((title, rows))
        tested = [s for s in systems if "against" in systems[s]]
        if tested:
            shown = [m for m in TESTED if m in kinds] or kinds
            rows = [["system", *(f"{TITLES[m]}: difference" for m in shown)]]
            rows += [[s, *(_difference(systems[s]["against"].get(m)) for m in shown)] for s in tested]
            sections.append((f"{title}, paired difference to {baseline}", rows))
        if any("tasks" in entry for entry in systems.values()):
            sections += _by_attribute(title, kinds, systems)
            continue
        measure = next(m for m in (*BY_TASK, *kinds) if m in kinds)
        tasks = sorted({t for s in systems.values() for t in s["by_task"]})
        rows = [["system", *tasks]]
        rows += [[s, *(_plain(e["by_task"].get(t, {}).get(measure)) for t in tasks)] for s, e in systems.items()]
        sections.append((f"{title}, {TITLES[measure]} by task", rows))
    return sections


def _by_attribute(title: str, kinds: list[str], systems: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """A table of each measure by the kind of question, with intervals."""
    tasks = sorted({task for entry in systems.values() for task in entry["tasks"]})
    sections = []
    for measure in kinds:
        rows = [["system", *tasks]]
        for system, entry in systems.items():
            scores = [entry["tasks"].get(task, {}).get("scores", {}).get(measure) for task in tasks]
            rows.append([system, *map(_with_interval, scores)])
        sections.append((f"{title}, {TITLES[measure]} by task", rows))
    return sections


def markdown(sections: list[tuple[str, list[list[str]]]], about: dict[str, Any], command: str, versions: dict) -> str:
    """The tables with their command."""
    lines = [
        f"Command: `{command}`",
        "",
        f"Trained tasks: {', '.join(about['trained_tasks'])}. Unseen tasks: {', '.join(about['unseen_tasks'])}. "
        "Brackets: 95 % bootstrap intervals over utterances, of labelled corpora over speakers or sentences where they "
        f"are known ({about['resamples']} resamples); none for fewer than {LEAST_UNITS}. Token agreement is the "
        "recovery of the text topline's behavior; its own is 1 but for near ties, which bfloat16 breaks at random. "
        "chrF is a mean over answers, BLEU that of the corpus.",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
    ]
    if about.get("seen_wordings"):
        lines += [f"Trained on all the same, of the column of unseen prompts: {', '.join(about['seen_wordings'])}.", ""]
    if about["seconds_to_first_token"]:
        times = ", ".join(f"{k} {v:.3f} s" for k, v in about["seconds_to_first_token"].items())
        lines += [f"Median time to first token, one utterance at a time: {times}", ""]
    for title, rows in sections:
        head, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines += [f"## {title}", "", head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *rest, ""]
    return "\n".join(lines)


def plot(columns: dict[str, Any]) -> Any:
    """Token agreement with intervals: a group of bars for each column, a bar for each system."""
    systems = list(next(iter(columns.values())))
    figure, axis = subplots(figsize=(max(6, 1.2 * len(systems) + 3), 4))
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        scores = [columns[c][system]["scores"].get("token_agreement") for c in columns]
        places = [i + index * width for i, s in enumerate(scores) if s]
        values = [s["value"] for s in scores if s]
        ends = [[s["value"] if s[k] is None else s[k] for s in scores if s] for k in ("low", "high")]
        below, above = ([abs(e - v) for e, v in zip(own, values, strict=True)] for own in ends)
        axis.bar(places, values, width, label=as_label(system), yerr=[below, above], error_kw={"lw": 1})
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(columns))], [c.replace("_", " ") for c in columns])
    axis.set_ylabel("token agreement with the text LLM")
    axis.set_ylim(0, 1)
    axis.legend(fontsize=7, ncols=2, loc="lower right")
    figure.tight_layout()
    return figure


def plot_confusions(systems: dict[str, Any], most: int = 12) -> Any:
    """For each system and kind of question, the shares of the choices among the answers to each label.

    None where nothing of up to ``most`` choices was asked.
    """
    found = {
        (system, task): entry["confusion"]
        for system, own in systems.items()
        for task, entry in own.get("tasks", {}).items()
        if 0 < len(entry.get("confusion", {})) <= most
    }
    if not found:
        return None
    rows, tasks = list(dict.fromkeys(s for s, _ in found)), sorted({t for _, t in found})
    figure, axes = subplots(len(rows), len(tasks), figsize=(2.6 * len(tasks) + 1, 2.4 * len(rows)), squeeze=False)
    for i, system in enumerate(rows):
        for j, task in enumerate(tasks):
            axis, counts = axes[i][j], found.get((system, task))
            if counts is None:
                axis.axis("off")
                continue
            choices = list(dict.fromkeys(choice for row in counts.values() for choice in row))
            matrix = [[row.get(choice, 0) for choice in choices] for row in counts.values()]
            axis.imshow([[n / max(1, sum(row)) for n in row] for row in matrix], vmin=0, vmax=1, cmap="Blues")
            for y, row in enumerate(matrix):
                for x, count in enumerate(row):
                    dark = count > 0.6 * sum(row)
                    axis.text(x, y, str(count), ha="center", va="center", fontsize=8, color="w" if dark else "k")
            axis.set_xticks(range(len(choices)), list(map(as_label, choices)), fontsize=7, rotation=30, ha="right")
            axis.set_yticks(range(len(counts)), list(map(as_label, counts)), fontsize=7)
            axis.set_title(as_label(task) if i == 0 else "", fontsize=9)
            if j == 0:
                axis.set_ylabel(as_label(system), fontsize=9)
    figure.tight_layout()
    return figure


def as_label(name: str) -> str:
    """A name as Matplotlib shows it: no formula, and not left out of legends."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _with_interval(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    return f"{score['value']:.3f}{interval_text(score)}"


def _difference(test: dict[str, Any] | None) -> str:
    if test is None or test["difference"] is None:
        return "-"
    p = "" if test["p"] is None else f", p {test['p']:.3f}"
    return f"{test['difference']:+.3f}{interval_text(test, '+')}{p}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
