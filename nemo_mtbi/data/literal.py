"""Text as data: what a user, a transcript or a document says never becomes a control token of the LLM.

A tokenizer turns the letters ``<|im_end|>`` into the control token wherever they stand. Here they stay letters: the
control token is replaced by the tokens of its letters, and everything around it is tokenized as it always is.
"""

import re
from collections.abc import Iterable
from typing import Any

from nemo_mtbi.errors import DataError

Offsets = list[tuple[int, int]]


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that steer an LLM: special ones, and added ones like them or of its chat template.

    Other added tokens (Gemma's ``<table>``, runs of newlines) are ordinary text.

    Args:
        tokenizer: fast Hugging Face tokenizer.
    """
    cached = getattr(tokenizer, "_mtbi_control_ids", None)
    added = tokenizer.added_tokens_decoder
    if cached is None or cached[0] != len(added):  # an audio tag may have come since
        template = str(tokenizer.chat_template or "")
        ids = frozenset(
            i
            for i, token in added.items()
            if token.special
            or re.fullmatch(r"<\|.*\|>", token.content)
            or (re.search(r"\w", token.content) and token.content in template)
        )
        cached = len(added), ids
        tokenizer._mtbi_control_ids = cached
    return cached[1]


def literal_encoding(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    """Tokens of a text without any control token, and the characters of each.

    Args:
        tokenizer: fast Hugging Face tokenizer.
        text: of a user, a transcript or a document.

    Raises:
        DataError: see :func:`without_control_tokens`.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return without_control_tokens(
        tokenizer, text, list(encoding["input_ids"]), list(encoding["offset_mapping"]), [(0, len(text))]
    )


def without_control_tokens(
    tokenizer: Any, text: str, ids: list[int], offsets: Any, literal: Iterable[tuple[int, int]]
) -> tuple[list[int], Any]:
    """Replace the control tokens that touch literal stretches of a text by the tokens of their letters.

    Args:
        tokenizer: fast Hugging Face tokenizer.
        text: what was tokenized.
        ids: its tokens.
        offsets: the characters (begin, end) of each token; None for a token that stands for no text.
        literal: stretches (begin, end) of the text that are data.

    Returns:
        Ids and offsets; the same lists where there is nothing to replace.

    Raises:
        DataError: the tokenizer cannot write a control token as letters.
    """
    control = control_ids(tokenizer)
    if control.isdisjoint(ids):
        return ids, offsets
    stretches = list(literal)
    result: list[int] = []
    places: list[tuple[int, int] | None] = []
    for token, place in zip(ids, offsets, strict=True):
        if token in control and place is not None and any(b < place[1] and place[0] < e for b, e in stretches):
            letters, own = _letters(tokenizer, text[place[0] : place[1]], control)
            result += letters
            places += [(begin + place[0], end + place[0]) for begin, end in own]
        else:
            result.append(token)
            places.append(place)
    return result, places


def _letters(tokenizer: Any, text: str, control: frozenset[int]) -> tuple[list[int], Offsets]:
    """Tokens of a control token's name: its first character and the rest, which are no control token apart."""
    ids: list[int] = []
    offsets: Offsets = []
    for begin, end in ((0, 1), (1, len(text))):
        if begin == end:
            continue
        part = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        own, places = list(part["input_ids"]), list(part["offset_mapping"])
        if not control.isdisjoint(own) and end - begin < len(text):
            own, places = without_control_tokens(tokenizer, text[begin:end], own, places, [(0, end - begin)])
        ids += own
        offsets += [(b + begin, e + begin) for b, e in places]
    lead = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not control.isdisjoint(ids) or tokenizer.decode([*lead, *ids]) != f"a{text}":
        raise DataError(f"The text holds {text!r}, a control token that this LLM's tokenizer cannot write as letters.")
    return ids, offsets
