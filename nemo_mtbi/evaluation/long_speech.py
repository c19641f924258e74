"""Long recordings from consecutive utterances, questions about their beginning, middle and end, and errors at seams.

The questions are the text LLM's: it asks one about the utterance at a place, and answers it from the whole transcript.
What a system makes of the recording is compared with that answer, as everywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch
from lhotse import Recording, SupervisionSegment
from lhotse.cut import Cut

from nemo_mtbi.data.alignments import transcript
from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.data.chat_template import dialect
from nemo_mtbi.data.rendering import Message, PromptRenderer
from nemo_mtbi.data.target import TARGETS_FIELD, Target
from nemo_mtbi.io.text import normalized
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.preparation.word_times import Aligner, Unalignable
from nemo_mtbi.tasks.library import Task

PLACES = {"beginning": 0.05, "middle": 0.5, "end": 0.95}  # share of the recording
PAUSE_SECONDS = 0.3  # between utterances
SEAM_SECONDS = 1.0  # a word so near to a cut, or nearer, is at a seam


@dataclass(frozen=True)
class LongRecording:
    """Utterances of one speaker, joined.

    Attributes:
        path: WAV, 16 kHz mono.
        seconds: of it.
        utterances: begin in seconds and text of each.
    """

    path: Path
    seconds: float
    utterances: list[tuple[float, str]]

    @property
    def transcript(self) -> str:
        return " ".join(text for _, text in self.utterances)

    def at(self, share: float) -> str:
        """The utterance that is spoken there."""
        return [text for begin, text in self.utterances if begin <= share * self.seconds][-1]


def long_recordings(cuts: Iterable[Cut], seconds: float, folder: Path, rate: int = 16_000) -> list[LongRecording]:
    """Recordings of at least ``seconds``, as many as each speaker's utterances give, in their order.

    Args:
        cuts: utterances with transcripts and speakers.
        seconds: shortest recording.
        folder: where they are written.
        rate: of the WAV files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    speakers = sorted((c for c in cuts if transcript(c)), key=lambda c: (str(c.supervisions[0].speaker), c.id))
    found: list[LongRecording] = []
    for speaker, own in groupby(speakers, key=lambda c: str(c.supervisions[0].speaker)):
        parts: list[np.ndarray] = []
        utterances: list[tuple[float, str]] = []
        length = 0
        for cut in own:
            samples = mono_samples(cut, rate)
            utterances.append((length / rate, transcript(cut)))
            parts += [samples, np.zeros(round(PAUSE_SECONDS * rate), np.float32)]
            length += len(samples) + len(parts[-1])
            if length >= seconds * rate:
                name = "".join(c if c.isalnum() else "_" for c in speaker)
                path = folder / f"{name}_{seconds:g}s_{len(found)}.wav"
                soundfile.write(path, np.concatenate(parts), rate)
                found.append(LongRecording(path, length / rate, utterances))
                parts, utterances, length = [], [], 0
    return found


@torch.no_grad()
def questions_on(recordings: list[LongRecording], model: MTBISALM, asking: Task, max_new_tokens: int = 48) -> list[Cut]:
    """The recordings as cuts whose targets are the text LLM's answers to its own questions (tasks: ``PLACES``).

    Args:
        recordings: at least one.
        model: gives the text LLM.
        asking: task with which the LLM asks about an utterance; held-out wordings, which training does not have.
        max_new_tokens: of an answer.
    """
    wording = asking.select("held_out")[0]
    places = [(recording, place) for recording in recordings for place in PLACES]
    about = [model.text_turn(wording.text, recording.at(PLACES[place])) for recording, place in places]
    questions = [_text(model, ids) for ids in _answers(model, about, asking.max_new_tokens)]
    turns = [model.text_turn(q, recording.transcript) for q, (recording, _) in zip(questions, places, strict=True)]
    answers = _answers(model, turns, max_new_tokens)
    written = dialect(model.cfg.prompt_format, model.tokenizer.tokenizer)
    rendering = Target.rendering_of(written, model.config.speech_position, model.references["llm"])
    cuts = []
    for recording in recordings:
        own = [
            Target(
                f"{recording.path.stem}/{place}", place, wording.id, q, _text(model, ids), whole, rendering=rendering
            )
            for (other, place), q, ids in zip(places, questions, answers, strict=True)
            if other is recording and ids
            for whole in [ids if len(ids) == max_new_tokens else [*ids, model.end_of_turn()]]
        ]
        cut: Any = Recording.from_file(recording.path, recording_id=recording.path.stem).to_cut()
        segment = SupervisionSegment(cut.id, cut.recording_id, 0.0, cut.duration, text=recording.transcript)
        cut.supervisions = [segment]
        cut.custom = {TARGETS_FIELD: [target.to_dict() for target in own]}
        cuts.append(cut)
    return cuts


def _answers(model: MTBISALM, turns: list[Message], max_new_tokens: int) -> list[list[int]]:
    """The text LLM's greedy answers as token ids, one at a time: the transcripts are long."""
    renderer = PromptRenderer(model.tokenizer, model.prompt_formatter())
    return [model.answer_text([renderer.render([turn]).ids], max_new_tokens)[0] for turn in turns]


def _text(model: MTBISALM, ids: list[int]) -> str:
    return str(model.tokenizer.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def word_times(recording: LongRecording, aligner: Aligner) -> list[tuple[str, float]]:
    """Normalized words of the transcript with the middle of each, by forced alignment of each utterance.

    Words without a time of their own have that of the word before.
    """
    samples, rate = soundfile.read(recording.path, dtype="float32")
    ends = [begin for begin, _ in recording.utterances[1:]] + [recording.seconds]
    timed: list[tuple[str, float]] = []
    for (begin, text), end in zip(recording.utterances, ends, strict=True):
        last = begin
        try:
            words = aligner.align(samples[round(begin * rate) : round(end * rate)], text)
        except Unalignable:
            step = (end - begin) / (len(text.split()) + 1)
            timed += [(normalized(w), begin + (i + 1) * step) for i, w in enumerate(text.split())]
            continue
        for word in words:
            if word.start_seconds is not None and word.end_seconds is not None:
                last = begin + (word.start_seconds + word.end_seconds) / 2
            timed.append((normalized(word.text), last))
    return [(word, time) for word, time in timed if word]


def seam_errors(words: list[tuple[str, float]], hypothesis: str, cuts: list[float]) -> dict[str, int]:
    """Words, word errors and, among them, words lost or doubled (deletions, insertions), at seams and elsewhere.

    An insertion belongs to the word before it.

    Args:
        words: of the transcript, with their times in seconds.
        hypothesis: what was heard.
        cuts: seconds at which the audio was cut.
    """
    reference = " ".join(word for word, _ in words).split()
    times = [time for word, time in words for _ in word.split()]
    errors, lost = [0] * len(reference), [0] * len(reference)
    for chunk in jiwer.process_words(" ".join(reference), normalized(hypothesis)).alignments[0]:
        if chunk.type == "insert":
            place = max(0, chunk.ref_start_idx - 1)
            errors[place] += chunk.hyp_end_idx - chunk.hyp_start_idx
            lost[place] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            for place in range(chunk.ref_start_idx, chunk.ref_end_idx):
                errors[place] += 1
                lost[place] += chunk.type == "delete"
    near = [any(abs(time - cut) <= SEAM_SECONDS for cut in cuts) for time in times]
    found = {}
    for name, values in (("words", [1] * len(near)), ("errors", errors), ("lost_or_doubled", lost)):
        found[f"{name}_at_seams"] = sum(v for v, n in zip(values, near, strict=True) if n)
        found[f"{name}_elsewhere"] = sum(values) - found[f"{name}_at_seams"]
    return found
