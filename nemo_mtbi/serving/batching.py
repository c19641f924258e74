"""One model behind a bounded queue: requests that wait are answered together, each gets its own tokens as they come.

Letters: B requests, L positions, V vocabulary, H LLM width.
"""

import logging
import queue
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from nemo_mtbi.data.audio_stream import bytes_of, gaps_of, seconds_of
from nemo_mtbi.errors import DataError, MTBIError
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.models.hearing import PASS_SECONDS, Heard
from nemo_mtbi.modules.causal_lm import without_adapters
from nemo_mtbi.serving.request import Request

log = logging.getLogger(__name__)


class QueueFull(MTBIError):
    """As many requests wait as are allowed."""


class Abandoned(MTBIError):
    """Nobody waits for the answers of a batch."""


class Draws(LogitsProcessor):
    """Chooses each row's token as its request asks; ``generate`` then takes the only one that is left."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) -> (B, V), all but the chosen token of each row -inf."""
        chosen = scores.argmax(1)
        for row, request in enumerate(self.requests):
            if request.finished or (request.draw.is_greedy and request.sampling.top_logprobs is None):
                continue
            chosen[row] = token = request.draw.token(scores[row])
            request.newest = request.draw.score(scores[row], token)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


class TokenStream(BaseStreamer):
    """Hands each row's tokens of a running ``generate`` to its request."""

    def __init__(self, requests: list[Request], tokenizer: Any, ends: set[int]) -> None:
        self.requests, self.tokenizer, self.ends = requests, tokenizer, ends

    def put(self, value: Tensor) -> None:
        """value: (B,) the newest token of each row; (B, 0) before the first."""
        if value.numel() == len(self.requests):
            for request, token in zip(self.requests, value.flatten().tolist(), strict=True):
                request.add(token, self.tokenizer, self.ends)

    def end(self) -> None:
        pass


class Finished(StoppingCriteria):
    """Ends each row with its request."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([r.finished is not None for r in self.requests], device=input_ids.device)


class Batcher:
    """Answers requests on one thread.

    Long audio is heard once for all answers to its question, and short questions are answered meanwhile.

    Args:
        model: the speech LLM.
        max_batch: requests answered together.
        max_waiting: requests that may wait; more are refused. 0: any number.
        max_waiting_bytes: of their audio in sum, likewise; one request is always taken.
    """

    def __init__(
        self, model: SpeechLLM, max_batch: int = 8, max_waiting: int = 64, max_waiting_bytes: int = 2**30
    ) -> None:
        self.model, self.max_batch, self.max_waiting_bytes = model.eval(), max_batch, max_waiting_bytes
        self.max_waiting = max_waiting
        self.waiting: queue.Queue[Request] = queue.Queue()
        self.held: list[Request] = []  # taken from the queue, in order, but not answered yet
        self.kept: dict[int, Request] = {}  # unfinished requests by id, whose audio counts
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, *requests: Request) -> None:
        """All of them or none.

        Raises:
            QueueFull: try again later.
        """
        rate = self.model.sampling_rate
        for request in requests:
            request.long = sum(seconds_of(audio, rate) for audio in request.audios) > PASS_SECONDS
        with self.lock:
            kept = [r for r in self.kept.values() if not r.finished]  # a client may have left
            audios = {id(audio): audio for r in [*kept, *requests] for audio in r.audios}
            size = sum(bytes_of(audio) for audio in audios.values())
            if kept and size > self.max_waiting_bytes:
                raise QueueFull(f"The audio of waiting requests takes {self.max_waiting_bytes} bytes; try again later.")
            if self.max_waiting and self.waits + len(requests) > self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests are waiting already; try again later.")
            self.kept |= {id(request): request for request in requests}
            for request in requests:
                self.waiting.put_nowait(request)

    @property
    def waits(self) -> int:
        """Requests that wait: in the queue, and taken from it but not begun; without those whose client has left."""
        with self.waiting.mutex:
            waiting = list(self.waiting.queue)
        return sum(not request.finished for request in [*waiting, *self.held])

    def _work(self) -> None:
        while True:
            self.held += [self.waiting.get()] if not self.held else []
            self._serve(self._next())

    def _serve(self, batch: list[Request]) -> None:
        self._answer_or_fail([r for r in batch if not r.finished])
        for request in batch:  # those that were cancelled
            request.end(request.finished or "length")
        self._forget(batch)

    def _forget(self, requests: Iterable[Request]) -> None:
        with self.lock:
            for request in requests:
                self.kept.pop(id(request), None)

    def _answer_or_fail(self, batch: list[Request]) -> None:
        """What fails together is tried alone, so that one request does not take the others with it."""
        try:
            if batch:
                self._answer(batch)
        except Abandoned:
            return
        except Exception as error:
            log.error("A batch failed.", exc_info=True)
            for request in batch:
                if len(batch) > 1 and not request.tokens and not request.finished:
                    self._answer_or_fail([request])
                else:
                    request.end(error)

    def _next(self, short: bool = False) -> list[Request]:
        """The oldest request (``short``: of short audio), and those that can go with it; empty if there is none."""
        while len(self.held) < 2 * self.max_batch or (short and all(r.long for r in self.held)):
            try:
                self.held.append(self.waiting.get_nowait())
            except queue.Empty:
                break
        first = next((r for r in self.held if not (short and r.long)), None)
        if first is None:
            return []
        batch = [r for r in self.held if _together(first, r)]
        batch = batch if first.long else batch[: self.max_batch]  # all answers to one question hear its audio once
        self.held = [r for r in self.held if r not in batch]
        return batch

    @torch.no_grad()
    def _answer(self, batch: list[Request]) -> None:
        heard = self._listen(batch)
        pieces, _ = self.model.prompt_pieces([r.dialog for r in batch])
        inputs, mask, silent = self.model.dialog_inputs([r.dialog for r in batch], pieces, heard)
        tokenizer, ends = self.model.tokenizer.tokenizer, set(self.model.stop_ids())
        for request, nothing, positions in zip(batch, silent, mask.sum(1).tolist(), strict=True):
            request.prompt_positions = positions
            if nothing:
                request.hear_nothing(self.model.nothing_heard_ids(), tokenizer, ends)
        batch, inputs, mask = self._fitting(batch, inputs, mask)
        if not batch:
            return
        with without_adapters(self.model.llm) if batch[0].sampling.text_llm else nullcontext():
            self.model.generate_from_embeddings(
                inputs,
                mask,
                max_new_tokens=max(r.max_tokens for r in batch),
                do_sample=False,
                logits_processor=LogitsProcessorList([Draws(batch)]),
                streamer=TokenStream(batch, tokenizer, ends),
                stopping_criteria=StoppingCriteriaList([Finished(batch)]),
            )

    def _listen(self, batch: list[Request]) -> Heard | None:
        """What the LLM reads of the requests' audios; None without audio.

        Raises:
            Abandoned: all clients have gone.
        """
        audios = [audio for request in batch for audio in request.audios]
        if not audios:
            return None
        once = list({id(audio): audio for audio in audios}.values())  # the same for all answers to a question
        total = sum(seconds_of(audio, self.model.sampling_rate) for audio in once)

        def on_heard(seconds: float) -> None:
            if all(request.finished for request in batch):
                raise Abandoned
            if batch[0].long:
                for request in batch:
                    request.listened(min(1.0, seconds / total))
                if short := self._next(short=True):  # one batch a pass: the long one has its turn
                    self._serve(short)

        heard = self.model.listen(once, on_heard=on_heard)
        for request in batch:
            request.gaps = [(index, gap) for index, audio in enumerate(request.audios) for gap in gaps_of(audio)]
        places = {id(audio): row for row, audio in enumerate(once)}
        return heard if len(once) == len(audios) else heard.rows([places[id(audio)] for audio in audios])

    def _fitting(self, batch: list[Request], inputs: Tensor, mask: Tensor) -> tuple[list[Request], Tensor, Tensor]:
        """inputs (B, L, H), mask (B, L) without the requests that are longer than the LLM's context."""
        context = getattr(self.model.llm.config, "max_position_embeddings", None)
        kept = []
        for row, request in enumerate(batch):
            positions = request.prompt_positions
            if request.finished:  # nothing was heard
                continue
            if context is None or positions < context:
                kept.append(row)
                request.max_tokens = min(request.max_tokens, context - positions if context else request.max_tokens)
            else:
                text = f"The messages take {positions} positions of the LLM, whose context has {context}."
                request.end(DataError(f"{text} Send less text or shorter audio, or serve with max_positions."))
        if len(kept) < len(batch):
            inputs, mask = inputs[kept], mask[kept]
            begin = int(inputs.shape[1] - mask.sum(1).max()) if kept else 0
            inputs, mask = inputs[:, begin:], mask[:, begin:]
        return [batch[row] for row in kept], inputs, mask


def _together(first: Request, other: Request) -> bool:
    """Whether both can be one batch: the same LLM, and long audio only with itself."""
    alike = first.sampling.text_llm == other.sampling.text_llm and first.long == other.long
    return alike and (not first.long or other.audios is first.audios)
