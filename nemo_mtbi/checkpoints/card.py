"""The model card of an export.

Parts, data, tasks, teacher, licences and results, as far as the run has them on record.
"""

from pathlib import Path
from typing import Any

from nemo_mtbi.checkpoints.trained_state import MERGED_LORA
from nemo_mtbi.data.target import said_beside
from nemo_mtbi.io import jsonl
from nemo_mtbi.modules.causal_lm import is_frozen
from nemo_mtbi.pretrained.offline import LICENCES
from nemo_mtbi.version import __version__

UNKNOWN = "not recorded"


def model_card(
    model: Any, run: Path | None = None, data: str | None = None, licence: str | None = None, whole: bool = True
) -> str:
    """README.md of an export.

    Args:
        model: the exported model.
        run: its training run; without one the card says what it cannot know.
        data: the training data in words (default: the paths of its manifests).
        licence: SPDX identifier of the exported weights, for the card's header.
        whole: whether the export holds the frozen weights too.
    """
    cfg = model.config
    header = ["library_name: nemo", "pipeline_tag: audio-text-to-text", "tags: [speech, speech-llm, nemo_mtbi]"]
    header += [f"license: {licence}"] if licence else []
    contained = "this model contains them" if whole else "they are needed beside it"
    parts = [
        (f"LLM ({_llm_state(model)})", cfg.pretrained_llm, model.references["llm"]),
        (
            f"speech encoder ({'frozen' if is_frozen(model.perception.encoder) else 'trained further'})",
            cfg.pretrained_asr,
            model.references["encoder"],
        ),
    ]
    lines = [
        "---",
        *header,
        "---",
        "",
        "# Speech LLM trained by multi-task behavior imitation",
        "",
        f"Made with nemo_mtbi {__version__} (method: arXiv 2505.18644). A connector between a speech encoder and "
        f"a text LLM was "
        "trained to give the answers to speech that the text LLM gives to its transcript.",
        "",
        "| part | name | fingerprint | licence |",
        "| --- | --- | --- | --- |",
        *(f"| {part} | `{name}` | {key} | {LICENCES.get(name, 'see its source')} |" for part, name, key in parts),
        "",
        f"The licences of the frozen parts apply to their weights; {contained}.",
        "",
        "## Training",
        "",
        *_training(run, data),
        "",
        "## Results",
        "",
        *_results(run),
        "",
        "## Use",
        "",
        "```python",
        "from nemo_mtbi.models import MTBISALM",
        "",
        'model = MTBISALM.restore_from("model.nemo")  # or the directory',
        'print(model.chat("question.wav", "What is this about?"))',
        "```",
        "",
    ]
    return "\n".join(lines)


def _llm_state(model: Any) -> str:
    own = [p for n, p in model.named_parameters() if n.startswith(("llm.", "embed_tokens.")) and "lora_" not in n]
    if any(p.requires_grad for p in own):
        return "trained further"
    if model.config.lora:
        return "frozen, with LoRA adapters"
    return "with merged LoRA adapters" if model.references["llm"].endswith(MERGED_LORA) else "frozen"


def _training(run: Path | None, data: str | None) -> list[str]:
    seen, record = _read(run, "seen.json"), _read(run, "data.json")
    manifests: list[str] = record.get("train", [])
    teachers = {}
    for path in manifests:
        teacher = said_beside(path, "teacher")
        if {"name", "fingerprint"} <= teacher.keys():
            teachers[teacher["name"]] = teacher["fingerprint"]
    lines = [
        f"- Data: {data or ', '.join(f'`{p}`' for p in manifests) or UNKNOWN}",
        f"- Teacher: {', '.join(f'`{name}` ({key})' for name, key in teachers.items()) or UNKNOWN}",
        f"- Examples seen: {seen.get('examples', UNKNOWN)} (imitation), {seen.get('alignment_examples', UNKNOWN)} "
        f"(alignment)",
    ]
    if seen.get("tasks"):
        lines += ["", "| task | examples | response tokens | prompts |", "| --- | ---: | ---: | ---: |"]
        for task, prompts in sorted(seen["tasks"].items()):
            sums = [sum(p.get(key, 0) for p in prompts.values()) for key in ("examples", "response_tokens")]
            lines.append(f"| {task} | {sums[0]} | {sums[1]} | {len(prompts)} |")
    return lines


def _results(run: Path | None) -> list[str]:
    """The tables that evaluate.py wrote."""
    table = run / "evaluation" / "results.md" if run else None
    return [table.read_text(encoding="utf-8")] if table is not None and table.is_file() else ["Not evaluated."]


def _read(run: Path | None, name: str) -> dict[str, Any]:
    return jsonl.read_json(run / name) if run else {}
