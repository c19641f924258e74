"""How the tokens of an answer are chosen: its own temperature, nucleus, seed and scores, whatever else is in the batch.

Letters: V vocabulary.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What a request asks of its answer.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this probability is drawn from.
        seed: equal requests with equal seeds draw alike; None: a new one each time.
        stop: texts that end the answer; they are not part of it.
        top_logprobs: alternatives whose log-probabilities are wanted beside the token's own; None: none at all.
        text_llm: leave LoRA out.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    text_llm: bool = False


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer, its log-probability before temperature and nucleus, and the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Draw:
    """Chooses the tokens of one answer.

    Args:
        sampling: what was asked.
        ordinal: which of the ``n`` answers to the request; each has a random sequence of its own.
    """

    def __init__(self, sampling: Sampling, ordinal: int = 0) -> None:
        self.sampling = sampling
        self.random = random.Random(None if sampling.seed is None else f"{sampling.seed}.{ordinal}")

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    def token(self, scores: Tensor) -> int:
        """scores (V,) -> the next token."""
        if self.is_greedy:
            return int(scores.argmax())
        logits = scores.double()
        probabilities = torch.softmax((logits - logits.max()) / self.sampling.temperature, 0)
        tokens, reached = None, probabilities.cumsum(0)
        if self.sampling.top_p < 1:
            ordered, tokens = probabilities.sort(descending=True, stable=True)
            reached = ordered.cumsum(0)
            reached = reached[: int((reached - ordered < self.sampling.top_p).sum())]  # one at least
        place = torch.searchsorted(reached, self.random.random() * float(reached[-1]), right=True)
        place = place.clamp_max(len(reached) - 1)
        return int(place if tokens is None else tokens[place])

    def score(self, scores: Tensor, token: int) -> TokenScore | None:
        """scores (V,) -> the token's log-probability and the alternatives', if they are wanted."""
        if self.sampling.top_logprobs is None:
            return None
        logprobs = torch.log_softmax(scores.float(), 0)
        values, tokens = logprobs.topk(self.sampling.top_logprobs)
        return TokenScore(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
