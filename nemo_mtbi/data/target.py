"""What is stored about one answer of the text LLM, in ``cut.custom["targets"]``."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGETS_FIELD = "targets"
NO_SPEECH = "no_speech"  # custom field of cuts in which nothing is said, and the task of their targets
TEACHER_IDS_FIELD, TEACHER_LOG_PROBS_FIELD = "teacher_ids", "teacher_log_probs"
IMPOSSIBLE = -100.0  # log-probability of what fills the teacher's rows


def is_no_speech(cut: Any) -> bool:
    """Whether a cut is marked as one in which nothing is said."""
    return (cut.custom or {}).get(NO_SPEECH) is True  # others keep a probability under that name


@dataclass(frozen=True)
class Target:
    """One (task, prompt) pair with the text LLM's answer to it on the cut's transcript.

    Attributes:
        key: content hash of everything that decides the answer (prompt, transcript, model, decoding).
        task, prompt_id: where the prompt comes from in the task library.
        prompt: the prompt's text with its placeholders filled.
        response: the answer's text.
        response_ids: its tokens as generated, end-of-turn included if the LLM ended its turn.
        finished: the LLM ended its turn within the token budget.
        rendering: prompt format, speech position and LLM (fingerprint) that the answer was given under.
        history: earlier messages of the dialog, each {"role", "content"}.
        teacher_begin: first row of this answer in the cut's arrays of teacher top-k log-probabilities; -1 if none.
        teacher_temperature: temperature of those log-probabilities.
        described: what the LLM read in the transcript's place (:mod:`nemo_mtbi.data.description`); empty: that itself.
        positions: of the prompt with the transcript: its tokens, the transcript's first, and the one after its last. So
            batches are drawn without tokenizing anything. Empty: not known.
    """

    key: str
    task: str
    prompt_id: str
    prompt: str
    response: str
    response_ids: list[int]
    finished: bool = True
    rendering: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    teacher_begin: int = -1
    teacher_temperature: float = 1.0
    described: str = ""
    positions: list[int] = field(default_factory=list)

    @staticmethod
    def rendering_of(prompt_format: str, speech_position: str, llm: str) -> str:
        return f"{prompt_format}/{speech_position}/{llm[:12]}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def said_beside(cuts: str | Path, section: str) -> dict[str, Any]:
    """A section of the ``manifest.json`` that target generation writes beside a manifest; empty where there is none,
    or another file of that name."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(Path(cuts).with_name("manifest.json").read_text())[section]
        return found if isinstance(found, dict) else {}
    return {}


def no_log_probabilities(name: str) -> str:
    """What is said of a target without the teacher's log-probabilities where they are to be read."""
    return (
        f"model.imitation.teacher=cached, but {name} has no teacher log-probabilities. Set top_k in "
        "generate_targets.py and run it again, or use teacher=online."
    )
