"""``/v1/chat/completions`` with ``input_audio`` parts, as OpenAI's clients send them, over one model."""

import asyncio
import base64
import binascii
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_mtbi.errors import DataError
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.serving import batching
from nemo_mtbi.serving.audio import decode_audio
from nemo_mtbi.version import __version__


class InputAudio(BaseModel):
    data: str
    format: str = "wav"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class AudioPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(BaseModel):
    """The fields that have a meaning here; others that clients send are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str = ""
    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stream: bool = False
    n: Literal[1] = 1


class Limits(BaseModel):
    """What one request may ask for."""

    max_tokens: int = 512
    max_audio_seconds: float = 300.0
    max_body_bytes: int = 32 * 2**20
    max_text_characters: int = 20_000


class BodyLimit:
    """ASGI middleware: bodies over ``limit`` bytes are answered with 413 before they are kept."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.limit:
                raise HTTPException(413, f"The body is larger than {self.limit} bytes, which is the limit here.")
            return message

        if announced.isdigit() and int(announced) > self.limit:
            response = failure(413, f"The body has {int(announced)} bytes; {self.limit} is the limit here.")
            await response(scope, receive, send)
            return
        await self.app(scope, counted, send)


def failure(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    """An error as OpenAI's clients read it."""
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status, headers)


def explain_errors(app: FastAPI) -> None:
    """Errors as OpenAI's clients read them."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        deepest = max(error.errors(), key=lambda e: len(e["loc"]))  # of the alternatives that content can be
        place = ".".join(str(p) for p in deepest["loc"] if p != "body")
        return failure(400, f"{place or 'body'}: {deepest['msg']}")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail))


def create_app(model: MTBISALM, name: str, batcher: batching.Batcher, limits: Limits | None = None) -> FastAPI:
    """The endpoint.

    Args:
        model: the speech LLM (for its sampling rate, audio tag and message layout).
        name: under which clients see it.
        batcher: answers the requests.
        limits: of one request.
    """
    bounds = limits or Limits()
    app = FastAPI(title="nemo_mtbi", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=bounds.max_body_bytes)

    explain_errors(app)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok" if batcher.thread.is_alive() else "stopped", "waiting": batcher.waiting.qsize()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "nemo_mtbi"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: Request) -> JSONResponse | StreamingResponse:
        if http.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return failure(415, "Send content-type: application/json.")
        if body.model and body.model != name:
            return failure(404, f"There is no model {body.model!r}; here is {name!r}.")
        try:
            dialog, waveforms = await asyncio.to_thread(read_messages, model, body.messages, bounds)
        except DataError as error:
            return failure(400, str(error))
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(event: Any) -> None:  # from the batcher's thread
            loop.call_soon_threadsafe(events.put_nowait, event)

        limit = min(body.max_completion_tokens or body.max_tokens or bounds.max_tokens, bounds.max_tokens)
        request = batching.Request(
            dialog,
            waveforms,
            limit,
            tell,
            lambda reason: tell((reason,)),
            batching.Sampling(body.temperature, body.top_p),
        )
        try:
            batcher.submit(request)
        except batching.QueueFull as error:
            return failure(429, str(error), "rate_limit_error")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            return StreamingResponse(server_sent(request, events, head), media_type="text/event-stream")
        return await complete(request, events, head, http)

    return app


async def complete(
    request: batching.Request, events: "asyncio.Queue[Any]", head: dict[str, Any], http: Request
) -> JSONResponse:
    """The whole answer; given up when the client goes away."""
    text = ""
    while True:
        try:
            event = await asyncio.wait_for(events.get(), 1.0)
        except TimeoutError:
            if await http.is_disconnected():
                request.cancel()
            continue
        if isinstance(event, str):
            text += event
            continue
        if isinstance(event[0], Exception):
            return failure(500, f"The model failed: {type(event[0]).__name__}.", "server_error")
        usage = {
            "prompt_tokens": request.prompt_positions,
            "completion_tokens": len(request.tokens),
            "total_tokens": request.prompt_positions + len(request.tokens),
        }
        choice = {"index": 0, "message": {"role": "assistant", "content": text.strip()}, "finish_reason": event[0]}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


async def server_sent(
    request: batching.Request, events: "asyncio.Queue[Any]", head: dict[str, Any]
) -> AsyncIterator[str]:
    """The answer in pieces, as server-sent events."""

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return "data: " + json.dumps({**head, "object": "chat.completion.chunk", "choices": [choice]}) + "\n\n"

    try:
        yield chunk({"role": "assistant", "content": ""})
        while isinstance(event := await events.get(), str):
            yield chunk({"content": event})
        if isinstance(event[0], Exception):
            error = {"message": f"The model failed: {type(event[0]).__name__}.", "type": "server_error"}
            yield "data: " + json.dumps({"error": error}) + "\n\n"
        else:
            yield chunk({}, event[0])
        yield "data: [DONE]\n\n"
    finally:
        request.cancel()  # no effect on one that has ended


def read_messages(
    model: MTBISALM, messages: list[ChatMessage], limits: Limits
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with parts -> a dialog with audio tags, and the waveforms.

    A user's message of one audio and text is laid out as in training, whatever the order of its parts.

    Raises:
        DataError: what is wrong with the request.
    """
    dialog: list[dict[str, Any]] = []
    waveforms: list[Any] = []
    tag, seconds, characters = model.audio_locator_tag, 0.0, 0
    for message in messages:
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        texts = [p.text for p in parts if isinstance(p, TextPart)]
        audios = [p for p in parts if isinstance(p, AudioPart)]
        characters += sum(map(len, texts))
        if characters > limits.max_text_characters:
            raise DataError(f"The messages have more than {limits.max_text_characters} characters.")
        if any(tag in text for text in texts):
            raise DataError(f"The text holds {tag}; send audio as an input_audio part.")
        if audios and message.role != "user":
            raise DataError(f"Only a user's message can hold audio, not one of role {message.role}.")
        for audio in audios:
            try:
                data = base64.b64decode(audio.input_audio.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise DataError(f"input_audio.data is not base64 ({error}).") from error
            waveforms.append(decode_audio(data, model.sampling_rate, limits.max_audio_seconds - seconds))
            seconds += len(waveforms[-1]) / model.sampling_rate
        if len(audios) == 1 and texts:
            dialog.append(model.user_turn("\n".join(texts)))
        else:
            pieces = [p.text if isinstance(p, TextPart) else tag for p in parts]
            dialog.append({"role": message.role, "content": "\n".join(pieces)})
    try:
        model.prompt_pieces([dialog])
    except Exception as error:
        raise DataError(f"This dialog does not fit the prompt format of the model ({error}).") from error
    return dialog, waveforms
