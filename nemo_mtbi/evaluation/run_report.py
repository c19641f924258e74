"""One self-contained HTML page about a training run: curves, tasks, results, answers, configuration."""

import json
from pathlib import Path
from typing import Any

from nemo_mtbi.checkpoints.run_directory import ALIGNMENT, IMITATION
from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.evaluation.report import COLUMNS
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.html import picture, subplots, write_page
from nemo_mtbi.training.monitor import SAMPLES_FILE

_TEMPLATE = Path(__file__).with_name("run_report.html.j2")
SHOWN_SAMPLES = 24
# (title, tags of one picture); a tag that ends with a slash stands for all that begin with it
CURVES = (
    ("Loss", ("loss", "ce", "kl", "alignment", "val_loss")),
    ("Agreement with the text LLM", ("agreement", "val_agreement")),
    ("Validation loss by task", ("val_loss_by_task/",)),
    ("Agreement by task", ("val_agreement_by_task/",)),
    ("Tokens per second", ("tokens_per_second",)),
    ("Padding", ("padding_fraction",)),
    ("Gradient norm", ("gradient_norm",)),
)


def write_report(run: Path, path: Path) -> Path:
    """Write the page about the training run under ``run``.

    Raises:
        CheckpointError: ``run`` is not a training run.
    """
    if not (run / "model.json").is_file():
        raise CheckpointError(f"{run} is not a training run: there is no model.json. Name the output_dir of train.py.")
    stages = [s for s in (ALIGNMENT, IMITATION) if (run / s).is_dir()]
    record = jsonl.read_json(run / "model.json")
    write_page(
        path,
        _TEMPLATE,
        run=run,
        record=record,
        config=json.dumps(record.get("model", {}), indent=2),
        columns=COLUMNS,
        data=jsonl.read_json(run / "data.json"),
        seen=jsonl.read_json(run / "seen.json"),
        results=jsonl.read_json(run / "evaluation" / "results.json"),
        curves={stage: _curves(scalars(run / stage)) for stage in stages},
        samples=_last_samples(run / IMITATION),
        export=jsonl.read_json(run / "export.json"),
    )
    return path


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every TensorBoard scalar under a stage's folder, over all its event files; later files win."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curves.setdefault(tag, {}).update((e.step, e.value) for e in events.Scalars(tag))
    return {tag: sorted(values.items()) for tag, values in curves.items()}


def _curves(values: dict[str, list[tuple[int, float]]]) -> list[tuple[str, str]]:
    pictures = []
    for title, wanted in CURVES:
        tags = [t for t in values if t in wanted or any(w.endswith("/") and t.startswith(w) for w in wanted)]
        if not tags:
            continue
        figure, axis = subplots(figsize=(7, 3))
        for tag in tags:
            steps, heights = zip(*values[tag], strict=True)
            axis.plot(steps, heights, label=tag.rpartition("/")[2], marker="." if len(steps) < 20 else None)
        axis.set_xlabel("step")
        axis.legend(fontsize=7, ncols=2)
        figure.tight_layout()
        pictures.append((title, picture(figure)))
    return pictures


def _last_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of the last validation of a stage; runs of November 2026 have them in its own folder."""
    files = (folder / "kept" / SAMPLES_FILE, folder / SAMPLES_FILE)
    found = next((jsonl.read(f) for f in files if f.is_file()), ())
    rows = {(r["step"], r["set"], r["id"], r["prompt"]): r for r in found}
    last = max((step for step, *_ in rows), default=0)
    return [r for r in rows.values() if r["step"] == last][:SHOWN_SAMPLES]
