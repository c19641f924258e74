"""Answer forms checked by rule: does an answer have the form that its prompt asked for?"""

import re
from collections.abc import Callable
from typing import Any

from nemo_mtbi.io.languages import identified, known_languages
from nemo_mtbi.io.text import UNSPACED, language_code, word_count
from nemo_mtbi.tasks.library import Task, render_template

_AROUND = " \t\n.,;:!?\"'"
QUESTION_MARKS = ("?", "\uff1f", "\u061f", "\u037e")
LIKELY_LANGUAGES, SURE = ("de", "en", "es", "fr"), 0.6  # a word or a name tells nothing
AFTER_A_QUESTION = " \t\n\"'\u201d\u2019\u00bb*)_`"
CHARACTERS = 2  # of a word of scripts without spaces
_EDGE = " \t\n.,;:!?\"'()[]*-"


def words(text: str) -> int:
    """Number of words of an answer; signs alone are none, and of scripts without spaces two characters are one."""
    return sum(word_count(part, CHARACTERS) for part in text.split() if any(map(str.isalnum, part)))


def items(text: str) -> list[str]:
    """Items of a list answer: lines (but for a first one that announces them), or parts between commas or semicolons;
    numbers and bullets are dropped."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].rstrip(" *").endswith((":", "\uff1a")):
        lines = lines[1:]
    parts = lines if len(lines) > 1 else re.split(r"[,;\u3001\uff0c\u060c]", lines[0] if lines else "")
    parts = [re.sub(r"^\s*(?:(?:\d+[.)]|[-*•])\s*|(?:and|or)\s+(?=\w))", "", part).strip(_EDGE) for part in parts]
    return [part for part in parts if part]


def _one_word(text: str, task: Task, values: dict[str, Any]) -> str | None:
    return None if words(text) == 1 else f"{words(text)} words instead of one"


def _choice(text: str, task: Task, values: dict[str, Any]) -> str | None:
    found = choose(text, task.choices)
    return None if found is not None else f"none of {', '.join(task.choices)}, or more than one"


def _yes_no(text: str, task: Task, values: dict[str, Any]) -> str | None:
    return None if choose(text, ["yes", "no"]) is not None else "neither yes nor no, or both"


def _list(text: str, task: Task, values: dict[str, Any]) -> str | None:
    found, least, most = items(text), int(task.form.get("min_items", 2)), task.form.get("max_items")
    whole = [*found[:-1], *re.split(r"\s+(?:and|&)\s+", found[-1])] if found else []  # "a, b and c"
    longest = max(map(words, found), default=0)
    if longest > (allowed := int(task.form.get("item_words", longest))):
        return f"an item of {longest} words instead of at most {allowed}"
    if len(whole) < least or len(found) > int(most or len(found)):
        return f"{len(found)} items instead of {f'{least} to {most}' if most else f'at least {least}'}"
    return None


def _max_words(text: str, task: Task, values: dict[str, Any]) -> str | None:
    most = int(task.form["value"])
    return None if words(text) <= most else f"{words(text)} words instead of at most {most}"


def _min_words(text: str, task: Task, values: dict[str, Any]) -> str | None:
    least = int(task.form["value"])
    return None if words(text) >= least else f"{words(text)} words instead of at least {least}"


def _question(text: str, task: Task, values: dict[str, Any]) -> str | None:
    return None if text.rstrip(AFTER_A_QUESTION).endswith(QUESTION_MARKS) else "no question mark at the end"


def _wanted_language(task: Task, values: dict[str, Any]) -> str:
    return language_code(render_template(str(task.form["value"]), values))


def _language(text: str, task: Task, values: dict[str, Any]) -> str | None:
    """By the code of the language that is asked for, among those that an answer is likely to be in instead."""
    wanted = _wanted_language(task, values)
    if wanted not in known_languages():
        return None  # not judged
    found, probability = identified(text, tuple(sorted({wanted, *LIKELY_LANGUAGES})))
    other = found != wanted and probability >= SURE
    return f"reads like {found}, not {wanted}" if other else None


CHECKS: dict[str, Callable[[str, Task, dict[str, Any]], str | None]] = {
    "any": lambda text, task, values: None,
    "one_word": _one_word,
    "choice": _choice,
    "yes_no": _yes_no,
    "list": _list,
    "max_words": _max_words,
    "min_words": _min_words,
    "question": _question,
    "language": _language,
}


def form_error(text: str, task: Task, values: dict[str, Any] | None = None) -> str | None:
    """Why an answer lacks the form of its task; None if it has it, or it is not judged. ``values`` fill placeholders of
    the form."""
    kind = task.form["kind"]
    return "no word" if kind != "any" and not words(text) else CHECKS[kind](text, task, values or {})


def form_kept(text: str, task: Task, values: dict[str, Any] | None = None) -> bool | None:
    """Whether an answer has the form of its task; None where nothing is asked for, or it cannot be judged."""
    kind = task.form["kind"]
    if kind == "any" or (kind == "language" and _wanted_language(task, values or {}) not in known_languages()):
        return None
    return form_error(text, task, values) is None


def choose(text: str, choices: list[str]) -> str | None:
    """The one choice that an answer names; None if it names none or several."""
    found = named_choices(text, choices)
    return found[0] if len(found) == 1 else None


def named_choices(text: str, choices: list[str]) -> list[str]:
    """The choices that an answer names (as a word, whatever the case, without punctuation at the ends).

    A choice inside a longer one ("coffee" in "iced coffee") counts only where it stands alone.
    """
    found, different = [], list(dict.fromkeys(choices))
    cores = {choice: choice.strip(_AROUND) or choice for choice in different}
    if len({core.casefold() for core in cores.values()}) < len(cores):  # only their marks tell them apart
        cores = {choice: choice for choice in different}
    unspaced = any(map(UNSPACED.search, [text, *different]))
    letters = "[0-9A-Za-z]" if unspaced else r"\w"  # other signs stand beside each other there
    for choice in sorted(different, key=len, reverse=True):
        core = cores[choice]
        before = f"(?<!{letters})" if re.match(letters, core[0]) else ""
        after = f"(?!{letters})" if re.match(letters, core[-1]) else ""
        text, count = re.subn(f"{before}{re.escape(core)}{after}", " ", text, flags=re.IGNORECASE)
        if count:
            found.append(choice)
    return [choice for choice in different if choice in found]
