"""Answers as OpenAI's clients read them."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nemo_mtbi.serving.request import Listening, Request
from nemo_mtbi.serving.sampling import TokenScore

BYTE = re.compile("<0x([0-9A-F]{2})>")
LEAST_LOGPROB = -9999.0  # JSON has no -inf


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def listening(told: Listening) -> str:
    """A comment of the event stream, which clients pass over: it holds the connection and shows who looks."""
    return f": {told.share:.0%} heard\n\n"


def usage(requests: Sequence[Request]) -> dict[str, int]:
    """Positions of the prompt, speech included, and tokens of all answers to it."""
    prompt, answers = requests[0].prompt_positions, sum(len(r.tokens) for r in requests)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def scores(tokenizer: Any, tokens: Iterable[TokenScore]) -> list[dict[str, Any]]:
    """Log-probabilities of tokens, each with its alternatives."""
    texts = _TEXTS.setdefault(tokenizer, TokenTexts())
    return [
        {
            **_token(texts.of(tokenizer, score.token), score.logprob),
            "top_logprobs": [_token(texts.of(tokenizer, token), logprob) for token, logprob in score.top],
        }
        for score in tokens
    ]


class TokenTexts(dict[int, tuple[str, list[int] | None]]):
    """What a tokenizer's tokens are within a text, and their bytes."""

    def of(self, tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
        if token not in self:
            lead = tokenizer("a", add_special_tokens=False)["input_ids"]  # SentencePiece drops the first word's space
            text = tokenizer.decode([*lead, token])[len(tokenizer.decode(lead)) :]
            self[token] = text, bytes_within(tokenizer, token) if "\ufffd" in text else list(text.encode())
        return self[token]


def bytes_within(tokenizer: Any, token: int) -> list[int] | None:
    """Bytes of a token that is a part of a character, by its name: ``<0xE2>``, or as byte-level BPE writes them; None
    where the name says nothing."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # start-up

    name = tokenizer.convert_ids_to_tokens(token)
    if found := BYTE.fullmatch(name):
        return [int(found[1], 16)]
    names = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return [names[letter] for letter in name] if set(name) <= set(names) else None


_TEXTS: WeakKeyDictionary[Any, TokenTexts] = WeakKeyDictionary()


def _token(written: tuple[str, list[int] | None], logprob: float) -> dict[str, Any]:
    text, data = written
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}
