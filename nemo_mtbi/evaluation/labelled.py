"""Corpora with human labels as questions about speech: cuts whose targets are the labels.

A reader gives :class:`Question`; :func:`labelled_cuts` turns them into cuts with targets, which the systems of the benchmark read
like any other. Without transcripts there is no text topline, so only the label is scored.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut

from nemo_mtbi.data.conversation import MTBIConversation
from nemo_mtbi.data.sources import utterance_cut
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.evaluation.metrics import Measure, text_measures, word_errors
from nemo_mtbi.evaluation.systems import EMPTY_TRANSCRIPT
from nemo_mtbi.targets.record import TARGETS_FIELD, Target
from nemo_mtbi.tasks.forms import choose

LABELS_FIELD = "labels"
METRICS = ("accuracy", "wer", "text")


@dataclass(frozen=True)
class Question:
    """One question about one recording with its label.

    Attributes:
        audio: the recording.
        task: name of the question's kind; figures are given for each.
        prompt: what is asked.
        label: the right answer.
        metric: ``accuracy`` (one of ``choices``), ``wer``, or ``text`` (ROUGE-L and chrF).
        choices: possible answers.
        transcript: of the audio, if known; it gives the text topline.
        language: of the speech.
    """

    audio: Path
    task: str
    prompt: str
    label: str
    metric: str = "text"
    choices: tuple[str, ...] = ()
    transcript: str | None = None
    language: str = "en"


@dataclass
class LabelledConfig:
    """One labelled corpus in ``benchmark.yaml``.

    Attributes:
        kind: ``slots`` or ``jsonl``.
        path: of its table.
        prompts: question of each slot, with ``{slot}`` in the default one.
        utterances: upper limit, the first ones of the table (0: all).
    """

    kind: str
    path: str
    prompts: dict[str, str] = field(default_factory=dict)
    utterances: int = 0


SLOT_PROMPT = "Which {slot} was ordered? Answer with one of these and nothing else: {choices}."


def read_slots(config: LabelledConfig) -> Iterator[Question]:
    """Tab-separated table of ``path`` (relative to the table) and ``slots`` (JSON object): a question for each filled slot.

    The choices of a question are all values that its slot has in the table, so they do not depend on ``utterances``.
    """
    path = Path(config.path)
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    if not rows or not {"path", "slots"} <= set(rows[0]):
        raise DataError(f"{path} needs the columns path and slots.")
    slots = [json.loads(r["slots"]) for r in rows]
    choices: dict[str, set[str]] = {}
    for filled in slots:
        for name, value in filled.items():
            choices.setdefault(name, set()).add(value)
    for row, filled in list(zip(rows, slots, strict=True))[: config.utterances or None]:
        for name, value in filled.items():
            options = tuple(sorted(choices[name]))
            template = config.prompts.get(name, SLOT_PROMPT)
            prompt = template.replace("{slot}", _spaced(name)).replace("{choices}", ", ".join(options))
            yield Question(path.parent / row["path"], name, prompt, value, "accuracy", options)


def read_jsonl(config: LabelledConfig) -> Iterator[Question]:
    """JSON lines with the fields of :class:`Question`; ``audio`` is relative to the file."""
    path = Path(config.path)
    audios: set[str] = set()
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                row["audio"], row["choices"] = path.parent / row["audio"], tuple(row.get("choices", ()))
                question = Question(**row)
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}.") from error
            if question.metric not in METRICS or (question.metric == "accuracy") != bool(question.choices):
                raise DataError(
                    f"{path}, line {number}: metric={question.metric!r} with {len(question.choices)} choices; metrics are "
                    f"{', '.join(METRICS)}, and accuracy needs choices (the others none)."
                )
            audios.add(str(question.audio))
            if config.utterances and len(audios) > config.utterances:
                return
            yield question


READERS: dict[str, Callable[[LabelledConfig], Iterator[Question]]] = {"slots": read_slots, "jsonl": read_jsonl}


def labelled_cuts(name: str, options: dict[str, Any], tokenizer: Any, end: int) -> tuple[CutSet, bool]:
    """Cuts with the labels as targets, and whether every one has a transcript.

    Args:
        name: of the corpus, for ids and messages.
        options: fields of :class:`LabelledConfig`.
        tokenizer: of the LLM (Transformers).
        end: its end-of-turn token.

    Raises:
        ConfigError: unknown kind or field.
        DataError: the table or a recording is missing, or it asks nothing.
    """
    try:
        config = LabelledConfig(**options)
        reader = READERS[config.kind]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"labelled.{name}: {error}. Kinds: {', '.join(READERS)}.") from error
    if not Path(config.path).is_file():
        raise DataError(f"labelled.{name}: there is no file {config.path}.")
    questions: dict[Path, list[Question]] = {}
    for question in reader(config):
        questions.setdefault(question.audio, []).append(question)
    if not questions:
        raise DataError(f"labelled.{name}: {config.path} asks nothing.")
    cuts = [_cut(f"{name}-{i:05d}", audio, asked, tokenizer, end) for i, (audio, asked) in enumerate(questions.items())]
    return CutSet.from_cuts(cuts), all(q.transcript for asked in questions.values() for q in asked)


def _cut(cut_id: str, audio: Path, asked: list[Question], tokenizer: Any, end: int) -> Cut:
    if not audio.is_file():
        raise DataError(f"There is no audio file {audio}.")
    targets, labels = [], {}
    for index, question in enumerate(asked):
        prompt_id = f"{question.task}-{index}"
        ids = [*tokenizer.encode(question.label, add_special_tokens=False), end]
        targets.append(Target("", question.task, prompt_id, question.prompt, question.label, ids).to_dict())
        labels[prompt_id] = {"metric": question.metric, "choices": list(question.choices)}
    first = asked[0]
    return utterance_cut(
        cut_id, audio, first.transcript or EMPTY_TRANSCRIPT, None, first.language,
        {TARGETS_FIELD: targets, LABELS_FIELD: labels},
    )  # fmt: skip


def label_of(conversation: MTBIConversation) -> dict[str, Any]:
    """``metric`` and ``choices`` of a labelled question; empty for other conversations."""
    assert conversation.target is not None
    labels = (conversation.cut.custom or {}).get(LABELS_FIELD, {})
    return labels.get(conversation.target.prompt_id, {})


def label_measures(record: dict[str, Any]) -> dict[str, Measure]:
    """Measures of one prediction against its label (``reference``)."""
    label, answer = record["reference"], record["answer"]
    choices: list[str] = record["choices"]
    if choices:
        result = {"accuracy_text": (float(choose(answer, choices) == label), 1.0)}
        return result | {"accuracy_likelihood": (float(record["choice"] == label), 1.0)}
    if record["metric"] == "wer":
        return {"wer": word_errors(label, answer, record["language"])}
    return text_measures(label, answer)


def _spaced(name: str) -> str:
    """``coffeeDrink`` -> ``coffee drink``."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).replace("_", " ").strip()
