"""Answers as OpenAI's clients read them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nemo_mtbi.serving.request import Listening, Request
from nemo_mtbi.serving.sampling import TokenScore

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


class TokenTexts(dict[int, str]):
    """What a tokenizer's tokens are within a text."""

    def of(self, tokenizer: Any, token: int) -> str:
        if token not in self:
            lead = tokenizer("a", add_special_tokens=False)["input_ids"]  # SentencePiece drops the first word's space
            self[token] = tokenizer.decode([*lead, token])[len(tokenizer.decode(lead)) :]
        return self[token]


_TEXTS: WeakKeyDictionary[Any, TokenTexts] = WeakKeyDictionary()


def _token(text: str, logprob: float) -> dict[str, Any]:
    data = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}
