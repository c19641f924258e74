"""Scores of the benchmark's predictions: intervals, by task, and paired tests against a baseline."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from nemo_mtbi.evaluation.columns import TOPLINE
from nemo_mtbi.evaluation.labelled import label_measures
from nemo_mtbi.evaluation.metrics import Measure, measures, sums_of
from nemo_mtbi.evaluation.statistics import Bootstrap, Sums
from nemo_mtbi.tasks.library import Task

Scored = dict[str, tuple[dict[str, Any], dict[str, Measure]]]  # id of a record -> the record and its measures


def summarize(
    records: dict[str, dict[str, dict[str, dict[str, Any]]]],
    tasks: dict[str, Task],
    baseline: str,
    resamples: int,
    others: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of one set of cuts with intervals, by task, and paired tests.

    Args:
        records: ``[system][column][id]``; the topline's among them.
        tasks: the task library.
        baseline: system that the others are compared with.
        resamples: of the bootstrap.
        others: further systems to compare with.

    Returns:
        ``[column][system]`` -> :func:`entries`.
    """
    columns = list(dict.fromkeys(c for system in records.values() for c in system))
    result: dict[str, Any] = {}
    for column in columns:
        own = {name: system[column] for name, system in records.items() if column in system}
        topline = own[TOPLINE]
        scored = {
            name: {i: (r, measures(r, topline[i], tasks[r["task"]])) for i, r in rows.items()}
            for name, rows in own.items()
        }
        result[column] = entries(scored, baseline, resamples, others)
    return result


def summarize_labels(
    records: dict[str, dict[str, dict[str, Any]]], baseline: str, resamples: int, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Scores against labels: ``[system][id]`` -> :func:`entries`, and for each system

    ``tasks``: of each kind of question its ``scores`` and ``against``, and ``confusion``: how often each label was
    answered by each choice. Macro F1 is of kinds of question whose choices are always the same. Intervals resample
    speakers where they are known, with all of their questions, and sentences where several recordings say the same.
    """
    told = {n: {i: {**r, "utterance": unit_of(r)} for i, r in o.items()} for n, o in records.items()}
    scored = {name: {i: (r, label_measures(r)) for i, r in rows.items()} for name, rows in told.items()}
    choices = defaultdict(set)
    for record in (r for rows in told.values() for r in rows.values()):
        choices[record["task"]].add(tuple(sorted(record["choices"])))
    for record, found in (pair for rows in scored.values() for pair in rows.values()):
        if len(choices[record["task"]]) > 1:  # no classes that answers have in common
            for measure in ("f1_text", "f1_likelihood"):
                found.pop(measure, None)
    result = entries(scored, baseline, resamples, others)
    for task in sorted({r["task"] for rows in told.values() for r in rows.values()}):
        own = {name: {i: o for i, o in rows.items() if o[0]["task"] == task} for name, rows in scored.items()}
        asked = {name: rows for name, rows in own.items() if rows}
        for name, entry in entries(asked, baseline, resamples, others).items():
            about = {key: entry[key] for key in ("answers", "units", "scores", "against", "compared") if key in entry}
            result[name].setdefault("tasks", {})[task] = about | confusion([r for r, _ in own[name].values()])
    return result


def unit_of(record: dict[str, Any]) -> str:
    """What an answer is resampled with: a speaker's recordings have one voice, and copies of a sentence one meaning."""
    return str(record.get("group") or record.get("speaker") or record["utterance"])


def confusion(records: list[dict[str, Any]]) -> dict[str, Any]:
    """``confusion``: ``[label][choice]`` -> count, of the most likely choices; empty where there are none."""
    chosen = [r for r in records if r["choices"] and r["choice"] is not None]
    if not chosen:
        return {}
    counts = {label: dict.fromkeys(chosen[0]["choices"], 0) for label in chosen[0]["choices"]}
    for record in chosen:
        row = counts.setdefault(record["reference"], {})
        row[record["choice"]] = row.get(record["choice"], 0) + 1
    return {"confusion": {label: row for label, row in counts.items() if any(row.values())}}


def entries(scored: dict[str, Scored], baseline: str, resamples: int, others: Sequence[str] = ()) -> dict[str, Any]:
    """Scores of every system.

    Returns:
        ``[system]`` -> ``answers``, ``units`` (utterances, or what is resampled in their place), ``missing`` (the
        audio could not be read), ``scores`` (value, low, high; None where there are too few units), ``by_task``, and
        ``against`` the baseline, over the answers that both have.
    """
    asked = {i for rows in scored.values() for i in rows}
    utterances = {r["utterance"] for rows in scored.values() for r, _ in rows.values()}
    bootstrap = Bootstrap(sorted(utterances), resamples)
    result: dict[str, Any] = {}
    for name, rows in scored.items():
        by_task: dict[str, Scored] = defaultdict(dict)
        for key, (record, values) in rows.items():
            by_task[record["task"]][key] = (record, values)
        result[name] = {
            "answers": len(rows),
            "units": len({record["utterance"] for record, _ in rows.values()}),
            "missing": len(asked) - len(rows),
            "scores": {
                m: known(dict(zip(("value", "low", "high"), (s.value, *bootstrap.interval(s)), strict=True)))
                for m, s in totals(rows).items()
            },
            "by_task": {t: {m: s.value for m, s in totals(own).items()} for t, own in sorted(by_task.items())},
        }
        if name != baseline and baseline in scored:
            result[name]["against"] = paired(rows, scored[baseline], bootstrap)
        pairs = [other for other in others if other != name and other in scored]
        if pairs:
            result[name]["compared"] = {other: paired(rows, scored[other], bootstrap) for other in pairs}
    return result


def paired(rows: Scored, reference: Scored, bootstrap: Bootstrap) -> dict[str, dict[str, float | None]]:
    """Paired difference of each measure, over the answers that both systems have."""
    both = rows.keys() & reference.keys()
    ours, theirs = (totals({i: r for i, r in side.items() if i in both}) for side in (rows, reference))
    return {m: known(bootstrap.compare(ours[m], theirs[m])) for m in ours if m in theirs}


def known(values: dict[str, float]) -> dict[str, float | None]:
    """NaN, which JSON does not have, as None."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def totals(rows: Scored) -> dict[str, Sums]:
    """Sums of each measure by utterance."""
    values: dict[str, dict[str, list[Measure]]] = defaultdict(lambda: defaultdict(list))
    for record, own in rows.values():
        for measure, value in own.items():
            values[measure][record["utterance"]].append(value)
    return {m: sums_of(m, by_utterance) for m, by_utterance in values.items()}
