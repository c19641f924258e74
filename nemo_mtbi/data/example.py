"""One training example as plain Python values, and its prompt as pieces of text and speech."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_mtbi.data.interleaving import InterleavingPolicy, SpeechSpan, Unit, merge

Piece = list[int] | SpeechSpan  # tokens of the prompt, or a stretch of speech in their place


@dataclass(frozen=True)
class Example:
    """One conversation of a batch; it stays on the CPU, where interleaving is planned.

    Attributes:
        id, visit: key of everything random about the example.
        task, prompt_id: for weights and the record of what was seen.
        prompt_ids: the text LLM's input, transcript in place of speech.
        units: pieces of the utterance that may be speech or text (see :mod:`nemo_mtbi.data.interleaving`).
        response_ids: the teacher's answer, end-of-turn included.
        duration_seconds: of the audio.
        transcript: of the audio.
        teacher_ids: the text LLM's input where it is not ``prompt_ids``: a described transcript in the speech's place.
    """

    id: str
    visit: int
    task: str
    prompt_id: str
    prompt_ids: list[int]
    units: list[Unit]
    response_ids: list[int]
    duration_seconds: float
    transcript: str
    teacher_ids: list[int] | None = None

    @property
    def teacher_prompt(self) -> list[int]:
        """What the text LLM reads."""
        return self.prompt_ids if self.teacher_ids is None else self.teacher_ids


def plan_batch(
    examples: list[Example], policy: InterleavingPolicy | None, step: int, opening: Sequence[int] = ()
) -> list[list[Piece]]:
    """Pieces of every example; ``policy=None`` is pure speech. Example i speaks audio i, after ``opening``."""
    pieces = []
    for index, example in enumerate(examples):
        plan = [False] * len(example.units)
        if policy is not None:
            plan = policy.plan(example.units, example.id, example.visit, step)
        pieces.append(prompt_pieces(example, index, plan, opening))
    return pieces


def prompt_pieces(example: Example, audio: int, plan: list[bool], opening: Sequence[int] = ()) -> list[Piece]:
    """The prompt with its utterance as planned, ``opening`` before it: token lists and speech spans in order."""
    units, ids = example.units, example.prompt_ids
    pieces: list[Piece] = [[*ids[: units[0].token_begin], *opening]]
    for piece in merge(units, plan, audio):
        pieces.append(piece if isinstance(piece, SpeechSpan) else ids[piece[0] : piece[1]])
    pieces.append(ids[units[-1].token_end :])
    return pieces
