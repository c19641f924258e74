"""What the variants of an ablation reached: means over seeds, and curves over the examples seen."""

import statistics
from pathlib import Path
from typing import Any

from nemo_mtbi.evaluation.run_report import scalars
from nemo_mtbi.evaluation.statistics import interval_text
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.html import save_picture, subplots

TESTED = {"token_agreement": "agreement", "kl_per_token": "KL"}
ENDS = ("value", "low", "high")
MEASURES = ("token_agreement", "kl_per_token", "rouge_l", "form")


def write_report(folder: Path, benchmark: dict[str, Any], runs: dict[str, dict[int, Path]]) -> dict[str, Path]:
    """Write ablation.json, .md and .png.

    Args:
        folder: where to.
        benchmark: content of ``benchmark.json``; its systems are named ``<variant>.<seed>``. Corpora with labels have
            their tables there alone.
        runs: ``[variant][seed]`` -> training run.
    """
    paths = {name: folder / f"ablation.{name}" for name in ("json", "md", "png")}
    results = {name: columns for name, columns in benchmark["results"].items() if "labels" not in columns}
    table = {manifest: _by_variant(columns, runs) for manifest, columns in results.items()}
    record = {k: benchmark[k] for k in ("command", "versions", "trained_tasks", "unseen_tasks", "resamples")}
    tests = comparisons(results)
    jsonl.write_json(paths["json"], record | {"results": table, "comparisons": tests})
    jsonl.write_text(paths["md"], markdown(table, benchmark["command"]) + comparison_table(tests))
    plot(runs, paths["png"])
    return paths


def _by_variant(columns: dict[str, Any], runs: dict[str, dict[int, Path]]) -> dict[str, Any]:
    others = {s: [s] for systems in columns.values() for s in systems if s.rpartition(".")[0] not in runs}
    members = others | {name: [f"{name}.{seed}" for seed in seeds] for name, seeds in runs.items()}
    result: dict[str, Any] = {}
    for name, systems in members.items():
        result[name] = {"seeds": len(systems) if name in runs else None}
        for column, scores in columns.items():
            result[name][column] = {
                m: _spread([scores[s]["scores"][m] for s in systems])
                for m in MEASURES
                if all(m in scores[s]["scores"] for s in systems)
            }
    return result


def _spread(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of value and interval, and the standard deviation of the values over seeds."""
    means = {k: None if any(s[k] is None for s in scores) else statistics.fmean(s[k] for s in scores) for k in ENDS}
    return means | {"seed_deviation": statistics.stdev([s["value"] for s in scores]) if len(scores) > 1 else 0.0}


def markdown(table: dict[str, Any], command: str) -> str:
    """Token agreement of every variant in the three columns."""
    lines = [
        f"Benchmark: `{command}`",
        "",
        "Token agreement with the text LLM: mean over seeds, the mean bootstrap interval over utterances, and ± "
        "the standard "
        "deviation over seeds.",
        "",
    ]
    for manifest, variants in table.items():
        columns = [c for c in next(iter(variants.values())) if c != "seeds"]
        lines += [f"## {manifest}", "", f"| variant | seeds | {' | '.join(c.replace('_', ' ') for c in columns)} |"]
        lines.append("| --- | ---: |" + " ---: |" * len(columns))
        for name, entry in variants.items():
            cells = [_cell(entry[c].get("token_agreement"), entry["seeds"]) for c in columns]
            lines.append(f"| {name} | {entry['seeds'] or '-'} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def comparisons(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Paired tests of token agreement and KL: a row for each set, column, system, reference and measure."""
    return [
        {"set": manifest, "column": column, "system": system, "reference": reference, "measure": name, **tests[name]}
        for manifest, columns in results.items()
        for column, systems in columns.items()
        for system, entry in systems.items()
        for reference, tests in entry.get("compared", {}).items()
        for name in TESTED
        if name in tests
    ]


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The paired tests as Markdown."""
    if not rows:
        return ""
    lines = [
        "",
        "## Paired differences of token agreement and KL",
        "",
        "| set | column | system | reference | measure | difference | p |",
    ]
    lines.append("| --- | --- | --- | --- | --- | ---: | ---: |")
    lines += [
        f"| {r['set']} | {r['column'].replace('_', ' ')} | {r['system']} | {r['reference']} | {TESTED[r['measure']]} "
        f"| {r['difference']:+.3f}{interval_text(r, '+')} | {'-' if r['p'] is None else format(r['p'], '.3f')} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _cell(score: dict[str, Any] | None, seeds: int | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    deviation = f" ± {score['seed_deviation']:.3f}" if (seeds or 1) > 1 else ""
    return f"{score['value']:.3f}{interval_text(score)}{deviation}"


def plot(runs: dict[str, dict[int, Path]], path: Path) -> None:
    """Validation agreement against the examples seen, a curve for each variant (mean over seeds)."""
    figure, axis = subplots(figsize=(8, 5))
    for name, seeds in runs.items():
        curves = [_agreement_by_examples(run) for run in seeds.values()]
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        examples, agreement = ([statistics.fmean(c[s][k] for c in curves) for s in steps] for k in (0, 1))
        axis.plot(examples, agreement, marker=".", label=name)
    axis.set_xlabel("examples seen")
    axis.set_ylabel("token agreement on the validation set, all tasks")
    axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    save_picture(figure, path)


def _agreement_by_examples(run: Path) -> dict[int, tuple[float, float]]:
    """Step of a validation -> (examples seen, agreement)."""
    curves = scalars(run / "imitation")
    agreement = curves.get("val_agreement", [])
    steps = max((step + 1 for step, _ in [*curves.get("loss", []), *agreement]), default=1)
    per_step = jsonl.read_json(run / "seen.json")["examples"] / steps
    return {s: ((s + 1) * per_step, a) for s, a in agreement}  # logged under the step before the validation
