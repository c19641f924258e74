"""Corpora with human labels as questions about speech: cuts whose targets are the labels.

A reader (:mod:`nemo_mtbi.evaluation.corpora`) gives :class:`nemo_mtbi.evaluation.questions.Question`;
:func:`labelled_cuts` turns them into cuts with targets, which the systems of the benchmark read like any other.
Without transcripts there is no text topline, so only the label is scored.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut

from nemo_mtbi import console
from nemo_mtbi.data.conversation import MTBIConversation
from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.data.messages import NOTHING_HEARD
from nemo_mtbi.data.target import TARGETS_FIELD, Target
from nemo_mtbi.errors import ConfigError, DataError, MTBIError
from nemo_mtbi.evaluation.corpora import READERS
from nemo_mtbi.evaluation.metrics import (
    Measure,
    bleu_counts,
    class_counts,
    contains,
    instruction_measures,
    squad_measures,
    text_measures,
    word_errors,
)
from nemo_mtbi.evaluation.questions import LabelledConfig, Question
from nemo_mtbi.preparation.sources import utterance_cut
from nemo_mtbi.tasks.forms import choose

LETTER = re.compile("[A-Za-z]")
GROUP = "group"  # of a label: what its question is resampled with
LABELS_FIELD = "labels"


def labelled_cuts(
    name: str, options: dict[str, Any], tokenizer: Any, end: int, folder: Path, rendering: str = ""
) -> tuple[CutSet, bool]:
    """Cuts with the labels as targets, and whether every one has a transcript.

    Args:
        name: of the corpus, for ids and messages.
        options: fields of :class:`LabelledConfig`.
        tokenizer: of the LLM (Transformers).
        end: its end-of-turn token.
        folder: where recordings go that the corpus keeps in pieces or inside tables (in a folder of this state of it).
        rendering: of the targets, see :class:`~nemo_mtbi.data.target.Target`: systems with another one are refused.

    Raises:
        ConfigError: unknown kind or field.
        DataError: the table is missing, it asks nothing, or none of its recordings can be read (single ones are left
            out, and counted).
    """
    try:
        config = LabelledConfig(**options)
    except TypeError as error:
        raise ConfigError(f"labelled.{name}: {error}. Kinds: {', '.join(READERS)}.") from error
    if config.kind not in READERS:
        raise ConfigError(f"labelled.{name}: there is no kind {config.kind!r}. Kinds: {', '.join(READERS)}.")
    if not Path(config.path).exists():
        raise DataError(f"labelled.{name}: there is no {config.path}.")
    stat = Path(config.path).stat()
    identity = f"{Path(config.path).resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    folder = folder / f"{name}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}"
    questions: dict[Path, list[Question]] = {}
    for question in _asked(name, config, folder):
        if config.utterances and question.audio not in questions and len(questions) >= config.utterances:
            break
        questions.setdefault(question.audio, []).append(question)
    if not questions:
        raise DataError(f"labelled.{name}: {config.path} asks nothing.")
    cuts, unread = [], []
    for i, (audio, asked) in enumerate(questions.items()):
        try:
            cuts.append(_cut(f"{name}-{i:05d}", audio, asked, tokenizer, end, config.max_new_tokens, rendering))
        except (OSError, AudioLoadingError) as error:
            unread.append(f"{audio} ({(str(error).splitlines() or [type(error).__name__])[0][:200]})")
    if not cuts:
        raise DataError(f"labelled.{name}: none of {len(unread)} recordings can be read, the first one: {unread[0]}.")
    if unread:
        console.say(
            f"labelled.{name}: {len(unread)} recordings cannot be read and are left out, the first: {unread[0]}."
        )
    return CutSet.from_cuts(cuts), all(q.transcript for asked in questions.values() for q in asked)


def _asked(name: str, config: LabelledConfig, folder: Path) -> Iterator[Question]:
    """What a reader gives; what it finds otherwise than published is said with the corpus."""
    try:
        yield from READERS[config.kind](config, folder)
    except MTBIError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AudioLoadingError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"labelled.{name}: {config.path} has not the form of {config.kind} ({type(error).__name__}: {said})."
        ) from error


def _cut(
    cut_id: str, audio: Path, asked: list[Question], tokenizer: Any, end: int, limit: int | None, rendering: str
) -> Cut:
    if not audio.is_file():
        raise FileNotFoundError("there is no such file")
    targets, labels = [], {}
    for index, question in enumerate(asked):
        if not question.label and not question.instructions:
            raise DataError(
                f"{question.audio}: the question {question.prompt[:60]!r} has neither a label nor instructions."
            )
        if question.choices and question.label not in question.choices:
            raise DataError(
                f"{question.audio}: the label {question.label!r} of {question.prompt[:60]!r} is none of the choices "
                f"{', '.join(map(repr, question.choices))[:200]}, so no answer could be right."
            )
        task = question.task.replace("/", "-")  # ids are put together with slashes
        prompt_id = f"{task}-{index}"
        ids = [*literal_encoding(tokenizer, question.label)[0], end]
        budget = limit or (512 if question.instructions else max(48, 2 * len(ids)))
        target = Target("", task, prompt_id, question.prompt, question.label, ids, rendering=rendering)
        targets.append(target.to_dict())
        labels[prompt_id] = {
            "metric": question.metric,
            "choices": list(question.choices),
            "others": list(question.others),
            "instructions": list(question.instructions),
            "answer_language": question.answer_language or question.language,
            "max_new_tokens": budget,
        } | ({} if question.group is None else {GROUP: question.group})
    first = asked[0]
    return utterance_cut(
        cut_id,
        audio,
        first.transcript or NOTHING_HEARD,
        first.speaker,
        first.language,
        {TARGETS_FIELD: targets, LABELS_FIELD: labels},
    )


def label_of(conversation: MTBIConversation) -> dict[str, Any]:
    """What :func:`label_measures` needs of a labelled question; empty for other conversations."""
    assert conversation.target is not None
    labels = (conversation.cut.custom or {}).get(LABELS_FIELD, {})
    return labels.get(conversation.target.prompt_id, {})


def letter_of(answer: str, letters: list[str]) -> str | None:
    """The letter that an answer chooses: at its beginning with punctuation, after "answer is", or the only one that
    stands alone. ("A" and "I" before a word are words; small ones count in an answer that is a letter alone.)"""
    patterns = (
        r"^\W*([A-Z])(?:[.,:;)]|\s*$)",
        r"\b(?:[Aa]nswer|[Cc]hoice|[Oo]ption)\b\W*(?:is\b\W*)?([A-Z])\b",
        r"(?<![0-9A-Za-z_])([AI](?!\s+[a-z])|[B-HJ-Z])(?![0-9A-Za-z_'])",
    )
    by_letter = {letter.upper(): letter for letter in letters}
    alone = answer.strip().strip("().:*\"' ")
    for pattern in patterns:
        found = set(re.findall(pattern, alone.upper() if len(alone) == 1 else answer)) & set(by_letter)
        if found:
            return by_letter[found.pop()] if len(found) == 1 else None
    return None


def label_measures(record: dict[str, Any]) -> dict[str, Measure]:
    """Measures of one prediction against its label (``reference``).

    Without an answer, that of the most likely choice alone.
    """
    label, answer = record["reference"], record["answer"]
    choices: list[str] = record["choices"]
    language = record.get("answer_language", record["language"])
    result: dict[str, Measure] = {}
    if choices:
        likely = record["choice"]
        if answer is not None:
            text = letter_of(answer, choices) if all(map(LETTER.fullmatch, choices)) else choose(answer, choices)
            result = {
                "accuracy_text": (float(text == label), 1.0),
                "f1_text": class_counts(label, text, record.get("task", "")),
            }
        if likely is not None:
            result |= {
                "accuracy_likelihood": (float(likely == label), 1.0),
                "f1_likelihood": class_counts(label, likely, record.get("task", "")),
            }
    elif answer is None:
        return result
    elif record["metric"] == "wer":
        result = {"wer": word_errors(label, answer, record["language"])}
    elif record["metric"] == "translation":
        result = {"bleu": bleu_counts(label, answer, language), "chrf": text_measures(label, answer)["chrf"]}
    elif record["metric"] == "answer":
        result = squad_measures([label, *record["others"]], answer)
    elif record["metric"] == "contains":
        result = {"contains_label": contains(label, answer, language)}
    elif record["metric"] == "text":
        result |= text_measures(label, answer)
    if record.get("instructions") and answer is not None:
        result |= instruction_measures(record["instructions"], record["prompt"], answer)
    return result
