"""Behavior-imitation scores of a system against the text LLM on the same targets.

- token agreement: share of response tokens that are the system's most likely token under teacher forcing;
- KL per token: KL(text LLM || system) over the full vocabulary at temperature 1, in nats per response token;
- transcribe WER: of what the recognizer (a connector that writes text, a cascade's ASR) writes, against the transcript;
- nothing heard: share of the recordings of which that recognizer writes nothing;
- repeat WER: of generated "repeat" answers against the text LLM's own answer, and against the transcript.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import jiwer
import torch
from lhotse import CutSet

from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.example import Example
from nemo_mtbi.evaluation.silence import empty_share, own_transcripts
from nemo_mtbi.evaluation.statistics import Sums
from nemo_mtbi.evaluation.systems import (
    EvaluationSet,
    SpeechSystem,
    System,
    TextLLM,
    TextSystem,
    against_the_text_llm,
    system_batches,
)
from nemo_mtbi.io.text import normalized, words_of
from nemo_mtbi.models.mtbi_salm import MTBISALM

REPEAT = "repeat"


@dataclass
class Scores:
    """Sums of one system on one manifest, by task and (agreed, KL, tokens) by utterance; and its repeat answers."""

    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    agreed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kl: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    utterances: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    repeats: list[tuple[str, str, str]] = field(default_factory=list)  # answer, text LLM's answer, transcript
    heard: list[tuple[str, str]] = field(default_factory=list)  # what the recognizer wrote, transcript
    answers: int = 0
    missing: int = 0  # of recordings that cannot be read

    def sums(self, measure: str = "token_agreement") -> Sums:
        """By utterance, for tests between systems; ``measure`` is ``token_agreement`` or ``kl_per_token``."""
        place = ("token_agreement", "kl_per_token").index(measure)
        return Sums.of({name: (own[place], own[2]) for name, own in self.utterances.items()})

    def summary(self) -> dict[str, Any]:
        total = max(1, sum(self.tokens.values()))
        result: dict[str, Any] = {
            "answers": self.answers,
            "missing": self.missing,
            "response_tokens": sum(self.tokens.values()),
            "token_agreement": sum(self.agreed.values()) / total,
            "kl_per_token": sum(self.kl.values()) / total,
            "by_task": {
                t: {"token_agreement": self.agreed[t] / n, "kl_per_token": self.kl[t] / n}
                for t, n in self.tokens.items()
            },
        }
        if self.repeats:
            answers, own, spoken = (([compared(r[i]) for r in self.repeats]) for i in range(3))
            result["repeat_wer"] = word_error_rate(own, answers)
            result["repeat_wer_to_transcript"] = word_error_rate(spoken, answers)
        if self.heard:
            written, said = ([compared(h[i]) for h in self.heard] for i in range(2))
            result["transcribe_wer"] = word_error_rate(said, written)
            result["nothing_heard"] = empty_share(written)
        return result


def compared(text: str) -> str:
    """A text as error rates are counted of it: words, of scripts without spaces characters, with spaces between."""
    return " ".join(words_of(normalized(text)))


def word_error_rate(references: list[str], hypotheses: list[str]) -> float:
    """Corpus WER; pairs whose reference is empty after normalization are left out."""
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    return float(jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])) if pairs else 0.0


class Evaluation:
    """Scores systems on one manifest of cuts with targets.

    Args:
        model: provides tokenizer, LLM and (for speech systems) encoder and connector.
        cuts: with targets.
        cached_features: read encoder features instead of audio.
        batch_size: targets scored together.
    """

    def __init__(self, model: MTBISALM, cuts: CutSet, cached_features: bool, batch_size: int = 32) -> None:
        self.model, self.batch_size = model, batch_size
        self.questions = EvaluationSet(model, cuts, cached_features)
        self.text_llm = TextLLM()

    @torch.no_grad()
    def score(self, name: str, system: System, generate: bool = True) -> Scores:
        """Sums of one system; ``generate`` asks for repeat answers too."""
        scores = Scores()
        decode = self.model.tokenizer.tokenizer.decode
        everything = self.questions.conversations
        for reading in system_batches(system, self.questions, everything, self.batch_size, name):
            for example, forced in zip(
                reading.examples, against_the_text_llm(self.model, system, reading, self.text_llm), strict=True
            ):
                scores.answers += 1
                scores.tokens[example.task] += forced.tokens
                scores.agreed[example.task] += forced.agreed
                scores.kl[example.task] += forced.kl
                own = scores.utterances[example.id.rsplit("/", 2)[0]]
                own[:] = own[0] + forced.agreed, own[1] + forced.kl, own[2] + forced.tokens
        scores.missing = len(everything) - scores.answers
        repeat = [c for c in everything if c.target and c.target.task == REPEAT] if generate else []
        for reading in system_batches(system, self.questions, repeat, self.batch_size, f"{name}: repeat"):
            answers = system.answers(reading, [budget(reading.examples)] * len(reading.examples))
            for example, answer in zip(reading.examples, answers, strict=True):
                wanted = decode(example.response_ids, skip_special_tokens=True)
                scores.repeats.append((answer, wanted, example.transcript))
        scores.heard = self._heard(name, system)
        return scores

    def _heard(self, name: str, system: System) -> list[tuple[str, str]]:
        if isinstance(system, SpeechSystem):
            return own_transcripts(system, self.questions, self.batch_size, name)
        own = (system.transcripts or {}) if isinstance(system, TextSystem) else {}
        return [(own[c.id], transcript(c)) for c in self.questions.cuts if c.id in own]


def budget(examples: list[Example]) -> int:
    """Tokens that a repeat answer may take: the longest of the text LLM's, and some."""
    return max(len(e.response_ids) for e in examples) + 8
