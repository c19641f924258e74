"""Reasons to reject an answer of the text LLM, each by name. A filter returns why it rejects, or None."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nemo_mtbi.data.description import Description
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.languages import identified, known_languages
from nemo_mtbi.io.text import UNSPACED, normalized, word_count, words_of
from nemo_mtbi.tasks.forms import form_error, named_choices
from nemo_mtbi.tasks.library import Task

APOLOGY = re.compile(r"\bi(?: am|'m) (?:very |so |really )?sorry|\bi apologi[sz]e", re.IGNORECASE)
APOLOGIES = re.compile(r"\b(?:sorry|apolog)", re.IGNORECASE)
REFUSAL = re.compile(
    r"\b(as an ai|i am an ai|i'?m an ai|language model"
    r"|i can(?:no|')t (?:assist|help|provide|see|hear|listen)|unable to (?:assist|help|provide|access)"
    r"|please provide (?:the|me|a|more)|no (?:text|transcript|audio) (?:was|is|has been) provided)\b",
    re.IGNORECASE,
)
OF_VOICES = frozenset("voice speaker speaking speaks spoken talking talks sounds sounding recording audio".split())
OF_PERSONS = frozenset({"gender"})
TIME = re.compile(r"\d\d:\d\d")
LOOP_NGRAM, LOOP_CHARACTERS, LOOP_REPEATS = 4, 8, 3
MIN_LANGUAGE_WORDS, MIN_LANGUAGE_PROBABILITY = 6, 0.95


@dataclass(frozen=True)
class Candidate:
    """What filters may look at.

    Attributes:
        values: those that filled the prompt's placeholders.
        prompt_tokens: length of the rendered prompt, transcript included.
        languages: ISO 639-1 codes that an answer may be in: the prompt's and the speech's.
        max_total_tokens: budget of prompt and response.
        described: what the LLM read in the transcript's place; None: the transcript.
    """

    task: Task
    transcript: str
    response: str
    response_ids: list[int]
    finished: bool
    values: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    languages: tuple[str, ...] = ()
    max_total_tokens: int | None = None
    described: Description | None = None


Filter = Callable[[Candidate], str | None]


def empty(c: Candidate) -> str | None:
    return "no text" if not c.response.strip() else None


def refusal(c: Candidate) -> str | None:
    """Refusals and talk about being an assistant, unless the speaker said it; apologies, unless the speaker did."""
    response, said = (text.replace("\u2019", "'").lower() for text in (c.response, c.transcript))
    found = [match.group() for match in REFUSAL.finditer(response) if match.group() not in said]
    if not APOLOGIES.search(said):
        found += [match.group() for match in APOLOGY.finditer(response)]
    return f"says {found[0]!r}" if found else None


def unasked(c: Candidate) -> str | None:
    """What a described transcript has beside the words, in an answer to a prompt that is not about the voice: times,
    or the name of an attribute."""
    if c.described is None or c.task.about_the_voice:
        return None
    answer, words = set(_words(c.response)), set(_words(c.transcript))
    pairs = set(pairwise(_words(c.response)))  # "some", "fast" or "high" may be said of anything but a voice
    beside = {word for pair in pairs for word, other in (pair, pair[::-1]) if other in OF_VOICES}
    for name, label in c.described.labels:
        for what, telling in ((name, answer), (label, answer if name in OF_PERSONS else beside)):
            if set(_words(what)) <= telling and not set(_words(what)) <= words:
                return f"speaks of {what}"
    times = [t for t in TIME.findall(c.described.text) if t in c.response and t not in c.transcript]
    return f"says {times[0]!r}" if times else None


def misread(c: Candidate) -> str | None:
    """An answer to a question about attributes of the voice that is not what the text LLM has read of them.

    With several attributes, each label must be said; with one, no other choice may be.
    """
    if c.described is None or not c.task.needs:
        return None
    if len(c.task.needs) > 1:
        words = f" {' '.join(_words(c.response))} "
        unsaid = [
            f"{name} {label}"
            for name, label in c.described.labels
            if name in c.task.needs and f" {' '.join(_words(label))} " not in words
        ]
        return f"does not say {', '.join(unsaid)}" if unsaid else None
    if not c.task.choices:
        return None
    labels = [label.casefold() for name, label in c.described.labels if name in c.task.needs]
    if not set(labels) <= {choice.casefold() for choice in c.task.choices}:  # a task with words of its own
        return None
    named = [choice.casefold() for choice in named_choices(c.response, c.task.choices)]
    if named and set(named) <= set(labels):
        return None
    return f"says {', '.join(named) or 'none of the choices'}, not {' or '.join(labels)}"


def _words(text: str) -> list[str]:
    return normalized(text).replace("'", " ").split()


def truncated(c: Candidate) -> str | None:
    return None if c.finished else f"did not end within {len(c.response_ids)} tokens"


def repetition(c: Candidate) -> str | None:
    """The same 4 words (of scripts without spaces, 8 characters) three times or more, unless the transcript repeats
    itself too."""
    said = _grams(c.transcript)
    for gram, count in _grams(c.response).items():
        if count >= LOOP_REPEATS > said[gram]:
            return f"repeats {' '.join(gram)!r}"
    return None


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = words_of(normalized(text))
    size = LOOP_CHARACTERS if UNSPACED.search(text) else LOOP_NGRAM
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def form(c: Candidate) -> str | None:
    """The answer has the form that its task asks for (one word, a list, a language, ...)."""
    return form_error(c.response, c.task, c.values)


def language(c: Candidate) -> str | None:
    """Another language than the prompt's, the speech's and the one asked for; answers too short to tell pass."""
    if word_count(c.response) < MIN_LANGUAGE_WORDS:
        return None
    allowed = set(c.languages)
    if not allowed <= known_languages():  # Kurdish, say, reads like one of its neighbours
        return None
    if c.task.form["kind"] == "language":
        return None  # judged by the form of the task
    found, probability = identified(c.response)
    if found in allowed or probability < MIN_LANGUAGE_PROBABILITY:
        return None
    return f"reads like {found} (probability {probability:.2f}), not {' or '.join(sorted(allowed))}"


def too_long(c: Candidate) -> str | None:
    """Prompt and response together exceed the training budget (``max_total_tokens``)."""
    total = c.prompt_tokens + len(c.response_ids)
    if c.max_total_tokens is None or total <= c.max_total_tokens:
        return None
    return f"{total} tokens with the prompt, more than {c.max_total_tokens}"


FILTERS: dict[str, Filter] = {
    "empty": empty,
    "refusal": refusal,
    "unasked": unasked,
    "misread": misread,
    "truncated": truncated,
    "repetition": repetition,
    "form": form,
    "language": language,
    "too_long": too_long,
}
NEAR_DUPLICATE, ONE_SIDED = "near_duplicate", "one_sided"
# They look at all answers to a wording, so they run when shards are merged.
OF_ALL_ANSWERS = (ONE_SIDED, NEAR_DUPLICATE)
Readings = dict[str, dict[str, list[int]]]  # of each wording and label: questions, and how many were answered rightly


class OneSided:
    """Finds wordings whose answers do not follow the voice: small LLMs say "clean" to some whatever they read.

    The filter ``misread`` would leave the answers that are right by chance, all of one label, which teach nothing about
    voices. A wording is judged by its informedness (Youden 1950), ``(r - 1/k) / (1 - 1/k)`` with r the mean over k
    labels of the share that is answered rightly; labels of fewer than ``FEWEST`` questions do not count.

    Args:
        readings: of all answers to questions about one attribute, in one manifest.
    """

    FEWEST, LEAST = 5, 0.5

    def __init__(self, readings: Readings) -> None:
        self.reasons: dict[str, str] = {}
        for wording, by_label in readings.items():
            shares = {label: right / asked for label, (asked, right) in by_label.items() if asked >= self.FEWEST}
            if len(shares) < 2:
                continue
            chance, mean = 1 / len(shares), sum(shares.values()) / len(shares)
            if (mean - chance) / (1 - chance) < self.LEAST - 1e-9:
                said = ", ".join(f"{label} {share:.2f}" for label, share in sorted(shares.items()))
                self.reasons[wording] = f"the label is read too seldom in this wording (right: {said})"

    def check(self, task: Task, prompt_id: str, response: str) -> str | None:
        """Reason to reject an answer; None if its wording passes."""
        return self.reasons.get(f"{task.name}/{prompt_id}")


def asked_label(task: Task, described: Description | None) -> str | None:
    """The label (in small letters) that a question about one attribute of the voice has as its answer; None for other
    questions."""
    if described is None or len(task.needs) != 1 or not task.choices:
        return None
    labels = {label.casefold() for name, label in described.labels if name in task.needs}
    return labels.pop() if len(labels) == 1 and labels <= {choice.casefold() for choice in task.choices} else None


class NearDuplicates:
    """Finds answers to the same wording that say the same: equal words whatever their order, case, digits and
    punctuation.

    Answers that are meant to be equal (a choice, yes or no, one word) are not judged.

    Args:
        allowed: answers of the same words that pass.
    """

    FREE_FORMS = frozenset({"choice", "yes_no", "one_word"})

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.counts: Counter[int] = Counter()

    def check(self, task: Task, prompt_id: str, response: str) -> str | None:
        """Reason to reject the next answer, in order of the manifest; None if it passes."""
        if task.form["kind"] in self.FREE_FORMS:
            return None
        letters = set(re.sub(r"[\d']+", " ", normalized(response)).split())
        words = " ".join(sorted(letters)) or response.strip()  # of numbers alone: themselves
        key = int.from_bytes(hashlib.blake2b(f"{prompt_id}/{words}".encode(), digest_size=8).digest())
        self.counts[key] += 1
        return f"the same words as {self.allowed} others" if self.counts[key] > self.allowed else None


def choose_filters(names: list[str]) -> list[tuple[str, Filter]]:
    """Filters of single answers by name, in the given order (without those of ``OF_ALL_ANSWERS``).

    Raises:
        ConfigError: an unknown name.
    """
    unknown = [n for n in names if n not in FILTERS and n not in OF_ALL_ANSWERS]
    if unknown:
        known = ", ".join([*FILTERS, *OF_ALL_ANSWERS])
        raise ConfigError(f"Unknown filter {', '.join(unknown)}. Known filters: {known}.")
    return [(n, FILTERS[n]) for n in names if n in FILTERS]
