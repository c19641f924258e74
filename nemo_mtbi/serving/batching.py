"""One model behind a bounded queue: requests that wait are answered together, each gets its own tokens as they come."""

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from nemo_mtbi.data.audio import collate_waveforms
from nemo_mtbi.errors import MTBIError
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.modules.causal_lm import without_adapters

log = logging.getLogger(__name__)


class QueueFull(MTBIError):
    """As many requests wait as are allowed."""


@dataclass(frozen=True)
class Sampling:
    """Requests with equal settings can share a batch; ``temperature`` 0 is greedy, ``text_llm`` leaves LoRA out."""

    temperature: float = 0.0
    top_p: float = 1.0
    text_llm: bool = False

    def options(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Request:
    """One question.

    Attributes:
        dialog: messages, as :meth:`MTBISALM.generate` takes them.
        waveforms: (S,) float32 at the model's rate, one for each audio tag.
        max_tokens: new tokens at most.
        on_text: called by the worker thread with each new piece of text.
        on_end: called once with ``stop``, ``length`` or ``cancelled``, or the error.
        tokens: of the answer so far, without the end-of-turn token.
        prompt_positions: embeddings of the prompt, speech included.
    """

    dialog: list[dict[str, Any]]
    waveforms: list[np.ndarray]
    max_tokens: int
    on_text: Callable[[str], None]
    on_end: Callable[[str | Exception], None]
    sampling: Sampling = field(default_factory=Sampling)
    tokens: list[int] = field(default_factory=list)
    prompt_positions: int = 0
    finished: str | None = None
    sent: str = ""

    def cancel(self) -> None:
        """The client has gone; the answer stops at the next token."""
        self.finished = self.finished or "cancelled"


class TokenStream(BaseStreamer):
    """Hands each row's tokens of a running ``generate`` to its request."""

    def __init__(self, requests: list[Request], tokenizer: Any, stop: set[int]) -> None:
        self.requests, self.tokenizer, self.stop = requests, tokenizer, stop

    def put(self, value: torch.Tensor) -> None:
        """value: (B,) the newest token of each row; (B, 0) before the first."""
        if value.numel() != len(self.requests):
            return
        for request, token in zip(self.requests, value.flatten().tolist(), strict=True):
            if request.finished:
                continue
            if token in self.stop:
                request.finished = "stop"
            else:
                request.tokens.append(token)
                if len(request.tokens) >= request.max_tokens:
                    request.finished = "length"
            self._send(request)

    def _send(self, request: Request) -> None:
        text = self.tokenizer.decode(request.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and not request.finished:
            return  # in the middle of a character
        if len(text) > len(request.sent):
            request.on_text(text[len(request.sent) :])
            request.sent = text

    def end(self) -> None:
        pass


class Finished(StoppingCriteria):
    """Ends each row with its request."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([r.finished is not None for r in self.requests], device=input_ids.device)


class Batcher:
    """Answers requests on one thread.

    Args:
        model: the speech LLM.
        max_batch: requests answered together.
        max_waiting: requests that may wait; more are refused.
    """

    def __init__(self, model: MTBISALM, max_batch: int = 8, max_waiting: int = 64) -> None:
        self.model, self.max_batch = model.eval(), max_batch
        self.waiting: queue.Queue[Request] = queue.Queue(max_waiting)
        self.held: list[Request] = []  # taken from the queue, but with other settings than the running batch
        self.thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        """
        Raises:
            QueueFull: try again later.
        """
        try:
            self.waiting.put_nowait(request)
        except queue.Full as error:
            raise QueueFull(f"{self.waiting.maxsize} requests are waiting already; try again later.") from error

    def _work(self) -> None:
        while True:
            batch = self._next()
            asked = [r for r in batch if not r.finished]  # others were cancelled while they waited
            try:
                if asked:
                    self._answer(asked)
            except Exception as error:
                log.exception("a batch failed")
                for request in batch:
                    request.on_end(error)
                continue
            for request in batch:
                request.on_end(request.finished or "length")

    def _next(self) -> list[Request]:
        """The oldest request, and those that wait and can go with it."""
        first = self.held.pop(0) if self.held else self.waiting.get()
        batch, others = [first], list[Request]()
        for request in self.held:
            (batch if len(batch) < self.max_batch and request.sampling == first.sampling else others).append(request)
        self.held = others
        while len(batch) < self.max_batch and len(self.held) < self.max_batch:
            try:
                waiting = self.waiting.get_nowait()
            except queue.Empty:
                break
            (batch if waiting.sampling == first.sampling else self.held).append(waiting)
        return batch

    @torch.no_grad()
    def _answer(self, batch: list[Request]) -> None:
        waveforms = [w for r in batch for w in r.waveforms]
        audios, lengths = collate_waveforms(waveforms) if waveforms else (None, None)
        pieces, _ = self.model.prompt_pieces([r.dialog for r in batch])
        inputs, mask = self.model.generation_inputs(pieces, audios, lengths)
        for request, positions in zip(batch, mask.sum(1).tolist(), strict=True):
            request.prompt_positions = positions
        sampling = batch[0].sampling
        with without_adapters(self.model.llm) if sampling.text_llm else nullcontext():
            self.model.generate_from_embeddings(
                inputs,
                mask,
                max_new_tokens=max(r.max_tokens for r in batch),
                **sampling.options(),
                streamer=TokenStream(batch, self.model.tokenizer.tokenizer, set(self.model.stop_ids())),
                stopping_criteria=StoppingCriteriaList([Finished(batch)]),
            )
