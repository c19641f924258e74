"""Answers and teacher-forced sums of one system, kept in files that survive an interruption."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.conversation import MTBIConversation
from nemo_mtbi.data.feature_cache import features_key
from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.evaluation.labelled import GROUP, label_of
from nemo_mtbi.evaluation.systems import (
    EvaluationSet,
    System,
    SystemBatch,
    TextLLM,
    against_the_text_llm,
    log_likelihoods,
    system_batches,
)
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.tensors import weight_files
from nemo_mtbi.models.mtbi_salm import MTBISALM


class Predictions:
    """Answers and teacher-forced sums of one system, kept as JSONL and continued after an interruption.

    Args:
        folder: of the system's files.
        key: of everything that decides its answers; records with another key are made anew.
        choices: possible answers to a conversation's prompt; none for free text.
        budget: tokens that an answer may take.
        batch_size: conversations read together.
        text_llm: that the stored responses are compared with; one for all systems saves its forward passes.
        generate: let the system answer too; without answers only what teacher forcing gives is scored.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        choices: Callable[[MTBIConversation], list[str]],
        budget: Callable[[MTBIConversation], int],
        batch_size: int,
        text_llm: TextLLM | None = None,
        generate: bool = True,
    ) -> None:
        self.folder, self.key, self.choices = folder, key, choices
        self.budget, self.batch_size, self.generate = budget, batch_size, generate
        self.text_llm = text_llm or TextLLM()

    @torch.no_grad()
    def predict(
        self, name: str, model: MTBISALM, system: System, questions: EvaluationSet, imitation: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Records by conversation id.

        Args:
            name: of the file.
            model: gives LLM and tokenizer.
            system: that answers.
            questions: conversations.
            imitation: score the stored responses against the text LLM on the transcript, too.
        """
        file = self.folder / f"{name}.jsonl"
        jsonl.repair(file)
        wanted = {record_id(c): c for c in questions.conversations}
        keys = {i: self._key(c) for i, c in wanted.items()}
        done = {r["id"]: r for r in jsonl.read(file) if keys.get(r["id"]) == r["key"]}
        missing = [c for i, c in wanted.items() if i not in done]
        title = f"{self.folder.name}: {name}"
        with jsonl.Appender(file) as out:
            for reading in system_batches(system, questions, missing, self.batch_size, title):
                for record in self._records(model, system, reading, imitation):
                    out.write(record)
                    done[record["id"]] = record
        if missing:
            newest_alone(file)
        return {i: done[i] | about(c) for i, c in wanted.items() if i in done}

    def _key(self, conversation: MTBIConversation) -> str:
        """Of everything that decides a record.

        The system, the question with its reference answer and label, and the audio.
        """
        target = conversation.target
        assert target is not None
        label = {name: value for name, value in label_of(conversation).items() if name != GROUP}
        said: list[Any] = [transcript(conversation.cut), label, self.budget(conversation) if self.generate else 0]
        said += [] if label else [self.choices(conversation)]  # a label has its own
        said += ["ways of writing"] if self.choices(conversation) else []  # how choices are scored
        return key_of(
            self.key, target.rendering, target.prompt, target.response, *said, features_key(conversation.cut, "")
        )

    def _records(
        self, model: MTBISALM, system: System, reading: SystemBatch, imitation: bool
    ) -> Iterable[dict[str, Any]]:
        forced = None
        if imitation and system.teacher_forced:
            forced = against_the_text_llm(model, system, reading, self.text_llm)
        answers: list[str] = []
        if self.generate:
            answers = system.answers(reading, [self.budget(c) for c in reading.conversations])
        chosen = self._choices(model, system, reading)
        for i, (conversation, example) in enumerate(zip(reading.conversations, reading.examples, strict=True)):
            target = conversation.target
            assert target is not None
            record = {
                "id": record_id(conversation),
                "key": self._key(conversation),
                "utterance": conversation.source_id,
                "task": target.task,
                "prompt_id": target.prompt_id,
                "prompt": target.prompt,
                "transcript": example.transcript,
                "reference": target.response,
                "ended": target.finished,
                "answer": answers[i] if answers else None,
                "choice": chosen[i],
            }
            yield record | about(conversation) | label_of(conversation) | (asdict(forced[i]) if forced else {})

    def _choices(self, model: MTBISALM, system: System, reading: SystemBatch) -> list[str | None]:
        """The most likely choice of each example whose task has choices, by the probability of its tokens and the end
        of turn, summed over its ways of writing (:func:`ways_of_writing`).
        """
        tokenizer, end = model.tokenizer.tokenizer, [model.end_of_turn()]
        scores: list[dict[str, float]] = [{} for _ in reading.examples]
        options = [self.choices(c) if system.teacher_forced else [] for c in reading.conversations]
        written = [[(c, form) for c, forms in ways_of_writing(own).items() for form in forms] for own in options]
        for place in range(max(map(len, written))):
            rows = [own[place % len(own)] if own else ("", "") for own in written]
            if not any(form for _, form in rows):
                continue
            ids = [literal_encoding(tokenizer, form)[0] + end for _, form in rows]
            values = log_likelihoods(model, system, reading, ids)
            for row, own, (choice, _), value in zip(scores, written, rows, values, strict=True):
                if place < len(own):
                    row[choice] = float(np.logaddexp(row.get(choice, -np.inf), value))
        return [max(s, key=lambda c: s[c]) if o else None for s, o in zip(scores, options, strict=True)]


def ways_of_writing(choices: list[str]) -> dict[str, list[str]]:
    """Each choice as it is, with a capital and with a small letter, without those that are another choice: an LLM
    answers "Male" to a question for male or female (surface forms, Holtzman et al. 2021)."""
    return {
        choice: [
            form
            for form in dict.fromkeys((choice, choice[:1].upper() + choice[1:], choice[:1].lower() + choice[1:]))
            if form == choice or form not in choices
        ]
        for choice in choices
    }


def about(conversation: MTBIConversation) -> dict[str, Any]:
    """Of a record, also of one that is read, what does not decide the answer: the language, and whose answers are
    resampled together with this one."""
    spoken = conversation.cut.supervisions
    speakers, languages = {s.speaker for s in spoken if s.speaker}, [s.language for s in spoken if s.language]
    return {
        "speaker": speakers.pop() if len(speakers) == 1 else None,
        "language": languages[0] if languages else "en",
        GROUP: label_of(conversation).get(GROUP),
    }


def newest_alone(file: Path) -> None:
    """Leave the last line of each id and key in a file of records, and of other keys none that answered it before."""
    last = {record["id"]: record["key"] for record in jsonl.read(file)}
    records = list(jsonl.read(file))
    kept = [r for r in records if last[r["id"]] == r["key"]]
    if len(kept) < len(records):  # of other weights, say
        with jsonl.replacing(file, "part") as out:
            out.writelines(f"{jsonl.dumps(r)}\n" for r in kept)


def record_id(conversation: MTBIConversation) -> str:
    """Identity of a conversation across systems."""
    assert conversation.target is not None
    return f"{conversation.source_id}/{conversation.target.task}/{conversation.target.prompt_id}"


def key_of(*parts: Any) -> str:
    """Short hash of what decides a system's answers."""
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def digest(path: Path) -> str:
    """Content hash of a file, or of the weights of an exported directory.

    All of it, since a connector is a small part.
    """
    value = hashlib.blake2b(digest_size=16)
    files = sorted(set(weight_files(path).values())) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"There are no safetensors weights in {path}.")
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                value.update(block)
    return value.hexdigest()
