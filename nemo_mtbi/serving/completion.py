"""``/v1/chat/completions``: sampling options, several answers, log-probabilities, whole or in pieces."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse

from nemo_mtbi.data.rendering import Message
from nemo_mtbi.serving.batching import Batcher
from nemo_mtbi.serving.failures import RequestError, error_body
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.protocol import ChatRequest
from nemo_mtbi.serving.request import Listening, Piece, Request
from nemo_mtbi.serving.sampling import Sampling, TokenScore
from nemo_mtbi.serving.written import event, listening, scores, usage


def sampling_of(body: ChatRequest) -> Sampling:
    """What a chat request asks of its answers; greedy unless it says otherwise."""
    return Sampling(
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def answers_asked(body: ChatRequest, limits: Limits, batcher: Batcher) -> int:
    """
    Raises:
        RequestError: more than one request may ask for.
    """
    most = min(limits.max_answers, batcher.max_waiting or limits.max_answers)
    if (body.n or 1) > most:
        raise RequestError(f"n: {body.n} answers; at most {most} can be asked for at once.", "n")
    return body.n or 1


class Answers:
    """The answers to one question, and what the batcher's thread tells about them.

    Args:
        batcher: answers.
        dialog, audios: the question.
        max_tokens: of each answer.
        sampling: how they are chosen.
        number: how many.
        silence: the answer to audio without speech, if it is not the model's own.

    Raises:
        QueueFull: try again later.
    """

    def __init__(
        self,
        batcher: Batcher,
        dialog: list[Message],
        audios: list[Any],
        max_tokens: int,
        sampling: Sampling,
        number: int = 1,
        silence: str | None = None,
    ) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()
        self.requests = [
            Request(dialog, audios, max_tokens, self._teller(i), self._teller(i), sampling, i, silence)
            for i in range(number)
        ]
        batcher.submit(*self.requests)

    def _teller(self, index: int) -> Any:
        return lambda told: self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, told))

    async def told(self, http: HTTPRequest | None = None) -> AsyncIterator[tuple[int, Any]]:
        """Which answer, and how much is heard, its next piece, its end (why) or its error, until all have ended.

        They are given up when the client of ``http`` goes away, or when the iterator is left.
        """
        running, looked = len(self.requests), time.monotonic()
        try:
            while running:
                if http is not None and time.monotonic() - looked > 1.0:
                    looked = time.monotonic()
                    if await http.is_disconnected():
                        self.cancel()
                try:
                    index, told = await asyncio.wait_for(self.queue.get(), 1.0)
                except TimeoutError:
                    continue
                running -= not isinstance(told, Piece | Listening)
                yield index, told
        finally:
            self.cancel()  # no effect on those that have ended

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    async def whole(self, http: HTTPRequest) -> list[tuple[str, list[TokenScore], str]]:
        """Text, scores and reason of the end, of each answer.

        Raises:
            Exception: what the model raised.
        """
        texts, found, reasons = {}, {}, {}
        for index in range(len(self.requests)):
            texts[index], found[index], reasons[index] = "", list[TokenScore](), ""
        async for index, told in self.told(http):
            if isinstance(told, Exception):
                raise told
            if isinstance(told, Listening):
                continue
            if isinstance(told, Piece):
                texts[index] += told.text
                found[index] += told.scores
            else:
                reasons[index] = told
        return [(texts[i].strip(), found[i], reasons[i]) for i in texts]


def head(name: str) -> dict[str, Any]:
    """What every part of a chat answer begins with."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


async def whole_chat(answers: Answers, tokenizer: Any, name: str, http: HTTPRequest) -> JSONResponse:
    """All answers in one body."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": await asyncio.to_thread(_logprobs, answers, tokenizer, found),  # long of many alternatives
            "finish_reason": reason,
        }
        for index, (text, found, reason) in enumerate(await answers.whole(http))
    ]
    body = {**head(name), "object": "chat.completion", "choices": choices, "usage": usage(answers.requests)}
    return JSONResponse(body | answers.requests[0].audio_gaps())


async def streamed_chat(answers: Answers, tokenizer: Any, name: str, include_usage: bool) -> AsyncIterator[str]:
    """The answers in pieces, as server-sent events."""
    start = {**head(name), "object": "chat.completion.chunk"}
    extra = {"usage": None} if include_usage else {}

    def chunk(index: int, delta: dict[str, str], told: Piece | None = None, reason: str | None = None) -> str:
        found = _logprobs(answers, tokenizer, told.scores) if told is not None else None
        choice = {"index": index, "delta": delta, "logprobs": found, "finish_reason": reason}
        gaps = answers.requests[index].audio_gaps() if reason else {}
        return event({**start, "choices": [choice], **extra, **gaps})

    for index in range(len(answers.requests)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, told in answers.told():
        if isinstance(told, Exception):
            yield event(error_body(told)[1])
            break
        if isinstance(told, Listening):
            yield listening(told)
            continue
        yield chunk(index, {"content": told.text}, told) if isinstance(told, Piece) else chunk(index, {}, None, told)
    else:
        if include_usage:
            yield event({**start, "choices": [], "usage": usage(answers.requests)})
    yield "data: [DONE]\n\n"


def _logprobs(answers: Answers, tokenizer: Any, found: Any) -> dict[str, Any] | None:
    if answers.requests[0].sampling.top_logprobs is None:
        return None
    return {"content": scores(tokenizer, found), "refusal": None}
