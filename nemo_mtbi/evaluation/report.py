"""Evaluation results as JSON, Markdown and a picture."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_mtbi.io import jsonl
from nemo_mtbi.io.html import save_picture, subplots

LIBRARIES = ("nemo_toolkit", "transformers", "torch", "lhotse", "jiwer")
COLUMNS = (
    ("token_agreement", "token agreement"),
    ("kl_per_token", "KL / token"),
    ("repeat_wer", "repeat WER"),
    ("repeat_wer_to_transcript", "repeat WER to transcript"),
    ("transcribe_wer", "transcribe WER"),
    ("nothing_heard", "nothing heard"),
)


def write_report(
    folder: Path, results: dict[str, dict[str, Any]], no_speech: dict[str, Any], command: str
) -> dict[str, Path]:
    """``results[manifest][system]``, and ``no_speech[system]`` of recordings in which nothing is said, -> results.json,
    results.md and results.png under ``folder``.
    """
    paths = {name: folder / f"results.{name}" for name in ("json", "md", "png")}
    record = {"command": command, "versions": {n: version(n) for n in LIBRARIES}, "results": results}
    record |= {"no_speech": no_speech} if no_speech else {}
    jsonl.write_json(paths["json"], record)
    silent = {"no speech": no_speech} if no_speech else {}
    jsonl.write_text(paths["md"], markdown(results | silent, command))
    if results:
        plot(results, paths["png"])
    return paths


def markdown(results: dict[str, dict[str, Any]], command: str) -> str:
    """One table for each manifest."""
    lines = [f"Command: `{command}`", ""]
    for manifest, systems in results.items():
        lines += [f"## {manifest}", "", "| system | " + " | ".join(title for _, title in COLUMNS) + " | answers |"]
        lines.append("|---|" + "---:|" * (len(COLUMNS) + 1))
        for system, scores in systems.items():
            cells = ["-" if scores.get(key) is None else f"{scores[key]:.3f}" for key, _ in COLUMNS]
            missing = f" ({scores['missing']} missing)" if scores.get("missing") else ""
            lines.append(f"| {system} | " + " | ".join(cells) + f" | {scores.get('answers', '-')}{missing} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Token agreement by task and system, one panel for each manifest."""
    figure, axes = subplots(1, len(results), figsize=(1 + 5 * len(results), 4), squeeze=False, sharey=True)
    for axis, (manifest, systems) in zip(axes[0], results.items(), strict=True):
        tasks = sorted({t for s in systems.values() for t in s["by_task"]})
        width = 0.8 / len(systems)
        for index, (system, scores) in enumerate(systems.items()):
            heights = [scores["by_task"].get(t, {}).get("token_agreement", 0.0) for t in tasks]
            axis.bar([i + index * width for i in range(len(tasks))], heights, width, label=system)
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(tasks))], tasks)
        axis.set_title(manifest)
        axis.set_ylim(0, 1)
    axes[0][0].set_ylabel("token agreement with the text LLM")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    save_picture(figure, path)
