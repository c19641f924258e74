"""What a reader of a labelled corpus gives, and what it is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = ("accuracy", "wer", "text", "translation", "answer", "contains", "instructions")


@dataclass(frozen=True)
class Question:
    """One question about one recording with its label.

    Attributes:
        audio: the recording.
        task: name of the question's kind; figures are given for each.
        prompt: what is asked.
        label: the right answer; empty if only ``instructions`` are checked.
        metric: ``accuracy`` and macro F1 (one of ``choices``), ``wer``, ``text`` (ROUGE-L and chrF), ``translation``
            (BLEU and chrF), ``answer`` (SQuAD's exact match and F1), ``contains`` (the label within the answer),
            ``instructions``.
        choices: possible answers.
        transcript: of the audio, if known; it gives the text topline.
        language: of the speech.
        answer_language: of the label, where it is another one.
        others: further right answers (metric ``answer``).
        instructions: IFEval's instructions that the answer must follow, each {"id", "kwargs"}; checked beside any
            metric.
        speaker: whose questions are resampled together for intervals; None: each recording by itself.
        group: questions of one group are resampled together instead (recordings of one sentence, say).
    """

    audio: Path
    task: str
    prompt: str
    label: str = ""
    metric: str = "text"
    choices: tuple[str, ...] = ()
    transcript: str | None = None
    language: str = "en"
    answer_language: str | None = None
    others: tuple[str, ...] = ()
    instructions: tuple[dict[str, Any], ...] = ()
    speaker: str | None = None
    group: str | None = None


@dataclass
class LabelledConfig:
    """One labelled corpus in ``benchmark.yaml``.

    Attributes:
        kind: name of a reader; see :data:`nemo_mtbi.evaluation.corpora.READERS`.
        path: of its table, in the published form.
        audio: folder of the recordings, where it is not at the published place.
        encoding: of its table, where that is not UTF-8.
        split: of a table that holds several.
        prompts: wording of the question of each task, with the reader's ``{...}`` in the default ones.
        utterances: upper limit, the first ones of the table (0: all).
        per_label: of ``voice``, questions for each label of an attribute at most, drawn by the cuts' ids (0: all), so
            that rare labels count as much.
        max_new_tokens: of an answer; by default enough for the label, 512 where instructions are checked.
    """

    kind: str
    path: str
    audio: str | None = None
    encoding: str | None = None
    split: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    utterances: int = 0
    per_label: int = 0
    max_new_tokens: int | None = None
