"""A text with choices, ``The gender is {female|male}.``, as tokens of an LLM."""

import re
from typing import Any

from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.errors import ConfigError, DataError

CHOICES = re.compile(r"\{([^{}]*)\}")
WORDS = "{words}"
Wordings = list[list[list[int]]]  # pieces of a text; each as its alternatives, all of one length


def around_words(tokenizer: Any, text: str) -> tuple[list[int], Wordings]:
    """Tokens before the place of the words, ``{words}``, and the text with choices after it. Without that place all of
    the text is after it.

    Raises:
        ConfigError: see :func:`wordings`; or choices before the words, more than one such place, or an opening that
            does not end with its line, whose last token the words could be part of.
    """
    opening, _, described = text.rpartition(WORDS)
    if opening and (any(brace in opening for brace in "{}") or not opening.endswith("\n")):
        raise ConfigError(
            f"acoustic_prompt={text!r}: before {WORDS} there are whole lines, without choices, each with the line end "
            f"after it ('\\n' within YAML's double quotes, in a shell $'...'), and {WORDS} stands there once."
        )
    return literal_ids(tokenizer, opening) if opening else [], wordings(tokenizer, described)


def literal_ids(tokenizer: Any, text: str) -> list[int]:
    """
    Raises:
        ConfigError: the tokenizer cannot write the text.
    """
    try:
        return literal_encoding(tokenizer, text)[0]
    except DataError as error:
        raise ConfigError(f"acoustic_prompt: {error}") from error


def wordings(tokenizer: Any, text: str) -> Wordings:
    """Pieces of a text one after the other: what always stands there (one alternative), and choices.

    A choice is what its alternatives do not share, as the LLM's tokenizer cuts the whole text with each of them;
    shorter ones begin with spaces.

    Args:
        tokenizer: of the LLM, fast (Transformers).
        text: with choices ``{one|other|...}``.

    Raises:
        ConfigError: no choice, a brace that stands alone, fewer than two alternatives, an empty or repeated one, two
            choices that share a token, or what this tokenizer cannot write or tell apart.
    """
    pieces = CHOICES.split(text)
    fixed, choices = pieces[::2], [[a.strip() for a in piece.split("|")] for piece in pieces[1::2]]
    if not choices or any(brace in piece for brace in "{}" for piece in fixed):
        raise ConfigError(
            f"acoustic_prompt={text!r}: write what the voice decides as choices in braces, such as 'The gender is "
            "{female|male}.'"
        )
    for choice in choices:
        if len(choice) < 2 or not all(choice) or len(set(choice)) < len(choice):
            raise ConfigError(
                f"acoustic_prompt: the choice {{{'|'.join(choice)}}} needs two or more alternatives, none of them "
                "empty or written twice."
            )

    def tokens(chosen: list[str]) -> list[int]:
        return literal_ids(tokenizer, "".join(a + b for a, b in zip(fixed, [*chosen, ""], strict=True)))

    first = [choice[0] for choice in choices]
    base = tokens(first)
    result: Wordings = []
    done = 0
    for place, choice in enumerate(choices):
        read = [tokens([*first[:place], alternative, *first[place + 1 :]]) for alternative in choice]
        shortest = min(map(len, read))
        begin = next((i for i in range(shortest) if len({ids[i] for ids in read}) > 1), shortest)
        after = next((i for i in range(shortest - begin) if len({ids[-1 - i] for ids in read}) > 1), shortest - begin)
        if begin < done:
            raise ConfigError(f"acoustic_prompt={text!r}: two choices share a token; write something between them.")
        own = [ids[begin : len(ids) - after] for ids in read]
        if len(set(map(tuple, own))) < len(own):
            raise ConfigError(
                f"acoustic_prompt: the LLM's tokenizer cannot tell the alternatives {{{'|'.join(choice)}}} apart."
            )
        longest = max(map(len, own))
        if begin > done:
            result.append([base[done:begin]])
        result.append([_space(tokenizer, longest - len(ids)) + ids for ids in own])
        done = len(base) - after
    return [*result, [base[done:]]] if done < len(base) else result


def _space(tokenizer: Any, count: int) -> list[int]:
    """So many positions that say nothing."""
    signs = (literal_encoding(tokenizer, sign)[0][:1] for sign in (" ", "\n", ".")) if count else ()
    return next(filter(None, signs), []) * count
