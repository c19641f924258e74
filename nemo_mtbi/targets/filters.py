"""Reasons to reject an answer of the text LLM, each by name. A filter returns why it rejects, or None."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.tasks.forms import form_error
from nemo_mtbi.tasks.library import Task

REFUSAL = re.compile(
    r"\b(as an ai|i am an ai|i'?m an ai|language model|i(?: am|'m) sorry|i apologi[sz]e"
    r"|i can(?:no|')t (?:assist|help|provide|see|hear|listen)|unable to (?:assist|help|provide|access)"
    r"|please provide (?:the|me|a|more)|no (?:text|transcript|audio) (?:was|is|has been) provided)\b",
    re.IGNORECASE,
)
LOOP_NGRAM, LOOP_REPEATS = 4, 3


@dataclass(frozen=True)
class Candidate:
    """What filters may look at. ``values`` are those that filled the prompt's placeholders."""

    task: Task
    transcript: str
    response: str
    response_ids: list[int]
    finished: bool
    values: dict[str, Any] = field(default_factory=dict)


def empty(c: Candidate) -> str | None:
    return "no text" if not c.response.strip() else None


def refusal(c: Candidate) -> str | None:
    """Refusals and talk about being an assistant, unless the speaker said it."""
    match = REFUSAL.search(c.response)
    return f"says {match.group()!r}" if match and match.group().lower() not in c.transcript.lower() else None


def truncated(c: Candidate) -> str | None:
    return None if c.finished else f"did not end within {len(c.response_ids)} tokens"


def repetition(c: Candidate) -> str | None:
    """The same 4 words three times or more, unless the transcript repeats itself too."""
    words = c.response.lower().split()
    counts: dict[tuple[str, ...], int] = {}
    for i in range(len(words) - LOOP_NGRAM + 1):
        gram = tuple(words[i : i + LOOP_NGRAM])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= LOOP_REPEATS and c.transcript.lower().count(" ".join(gram)) < LOOP_REPEATS:
            return f"repeats {' '.join(gram)!r}"
    return None


def form(c: Candidate) -> str | None:
    """The answer has the form that its task asks for (one word, a list, a language, ...)."""
    return form_error(c.response, c.task, c.values)


FILTERS: dict[str, Callable[[Candidate], str | None]] = {
    "empty": empty,
    "refusal": refusal,
    "truncated": truncated,
    "repetition": repetition,
    "form": form,
}


def choose_filters(names: list[str]) -> list[tuple[str, Callable[[Candidate], str | None]]]:
    """Filters by name, in the given order.

    Raises:
        ConfigError: an unknown name.
    """
    unknown = [n for n in names if n not in FILTERS]
    if unknown:
        raise ConfigError(f"Unknown filter {', '.join(unknown)}. Known filters: {', '.join(FILTERS)}.")
    return [(n, FILTERS[n]) for n in names]
