"""``/v1/audio/transcriptions``: the speech LLM asked to repeat what was said, with OpenAI's form and answers."""

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from nemo_mtbi.data.audio_stream import seconds_of
from nemo_mtbi.errors import DataError
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.serving.audio import decode_audio
from nemo_mtbi.serving.batching import Batcher
from nemo_mtbi.serving.completion import Answers
from nemo_mtbi.serving.failures import RequestError, error_body
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.protocol import TranscriptionRequest
from nemo_mtbi.serving.request import Listening, Piece, Request
from nemo_mtbi.serving.sampling import Sampling, TokenScore
from nemo_mtbi.serving.written import event, listening, scores
from nemo_mtbi.tasks.library import DEFAULT_FOLDER, Task, load_task

TASK = "repeat"
UNNAMED = "unknown"  # the language of verbose_json, if the client did not name it: the model does not tell


async def read_form(http: HTTPRequest) -> tuple[bytes, TranscriptionRequest]:
    """The audio file and the other fields of a multipart form.

    Raises:
        RequestError: there is no file.
        RequestValidationError: a field is wrong.
    """
    fields: dict[str, Any] = {}
    async with http.form(max_files=1, max_fields=32) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise RequestError("file: send the audio as a file of a multipart form.", "file")
        data = await file.read()
        for name, value in form.multi_items():
            if name.endswith("[]"):
                fields.setdefault(name[:-2], []).append(value)
            elif name != "file":
                fields[name] = value
    try:
        return data, TranscriptionRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


@cache
def _task() -> Task:
    return load_task(DEFAULT_FOLDER / f"{TASK}.yaml")


def transcription_prompt(language: str | None) -> str:
    """The task library's first wording in the language.

    Raises:
        RequestError: there is none.
    """
    prompts = _task().prompts
    wanted = (language or "en").lower()
    found = [p.text for p in prompts if p.language == wanted]
    if not found:
        known = ", ".join(sorted({p.language for p in prompts}))
        text = f"language: {language!r}; the model can be asked to transcribe in {known}."
        raise RequestError(f"{text} Leave language out, and the words come in the language that is spoken.", "language")
    return found[0]


async def transcribe(
    http: HTTPRequest, data: bytes, body: TranscriptionRequest, model: SpeechLLM, batcher: Batcher, limits: Limits
) -> Response:
    """
    Raises:
        RequestError: what is wrong with the request.
        QueueFull: try again later.
    """
    prompt = transcription_prompt(body.language)
    try:
        audio = await asyncio.to_thread(decode_audio, data, model.sampling_rate, limits.max_audio_seconds)
    except DataError as error:
        raise RequestError.of(error, "file") from error
    sampling = Sampling(body.temperature or 0.0, seed=body.seed, top_logprobs=0 if body.include else None)
    answers = Answers(batcher, [model.user_turn(prompt)], [audio], limits.max_tokens, sampling, silence="")
    tokenizer = model.tokenizer.tokenizer
    if body.stream:
        return StreamingResponse(_streamed(answers, tokenizer), media_type="text/event-stream")
    text, found, reason = (await answers.whole(http))[0]
    if body.response_format == "text":
        return PlainTextResponse(text + "\n")
    result = _result(answers.requests[0], tokenizer, text, found, reason)
    if body.response_format == "verbose_json":
        seconds = seconds_of(audio, model.sampling_rate)
        spent = {"type": "duration", "seconds": seconds}
        named = {"task": "transcribe", "language": body.language or UNNAMED, "duration": seconds}
        result = {**result, **named, "usage": spent}
    return JSONResponse(result)


def _result(request: Request, tokenizer: Any, text: str, found: list[TokenScore], reason: str) -> dict[str, Any]:
    """The transcript; ``finish_reason`` beyond OpenAI's fields says ``length`` where it is cut off."""
    prompt, answer = request.prompt_positions, len(request.tokens)
    spent = {"type": "tokens", "input_tokens": prompt, "output_tokens": answer, "total_tokens": prompt + answer}
    logprobs = {} if request.sampling.top_logprobs is None else {"logprobs": _scores(tokenizer, found)}
    return {"text": text, **logprobs, "usage": spent, "finish_reason": reason, **request.audio_gaps()}


def _scores(tokenizer: Any, found: Any) -> list[dict[str, Any]]:
    return [{k: s[k] for k in ("token", "logprob", "bytes")} for s in scores(tokenizer, found)]


async def _streamed(answers: Answers, tokenizer: Any) -> AsyncIterator[str]:
    text, found = "", list[TokenScore]()
    asked = answers.requests[0].sampling.top_logprobs is not None
    async for _, told in answers.told():
        if isinstance(told, Exception):
            yield event(error_body(told)[1])
        elif isinstance(told, Listening):
            yield listening(told)
        elif isinstance(told, Piece):
            delta = told.text if text else told.text.lstrip()
            text += delta
            found += told.scores
            logprobs = {"logprobs": _scores(tokenizer, told.scores)} if asked else {}
            yield event({"type": "transcript.text.delta", "delta": delta, **logprobs})
        else:
            result = _result(answers.requests[0], tokenizer, text.strip(), found, told)
            yield event({"type": "transcript.text.done", **result})
    yield "data: [DONE]\n\n"
