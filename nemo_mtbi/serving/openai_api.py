"""The OpenAI-compatible endpoint over one model: which address does what."""

import asyncio
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from nemo_mtbi.errors import DataError
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.serving.batching import Batcher
from nemo_mtbi.serving.completion import Answers, answers_asked, sampling_of, streamed_chat, whole_chat
from nemo_mtbi.serving.failures import RequestError, explain_errors
from nemo_mtbi.serving.limits import BodyLimit, Limits
from nemo_mtbi.serving.messages import read_messages
from nemo_mtbi.serving.protocol import ChatRequest
from nemo_mtbi.serving.transcription import read_form, transcribe
from nemo_mtbi.version import __version__


def create_app(model: SpeechLLM, name: str, batcher: Batcher, limits: Limits | None = None) -> FastAPI:
    """The endpoint.

    Args:
        model: the speech LLM (for its sampling rate, audio tag and message layout).
        name: under which clients see it.
        batcher: answers the requests.
        limits: of one request.
    """
    bounds, tokenizer = limits or Limits(), model.tokenizer.tokenizer
    app = FastAPI(title="nemo_mtbi", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=bounds.max_body_bytes)
    explain_errors(app)
    card = {"id": name, "object": "model", "created": 0, "owned_by": "nemo_mtbi"}

    def require_model(asked: str | None) -> None:
        if asked and asked != name:
            raise HTTPException(404, f"There is no model {asked!r}; here is {name!r}.")

    def require_type(http: Request, wanted: str) -> None:
        if http.headers.get("content-type", "").split(";")[0].strip().lower() != wanted:
            raise HTTPException(415, f"Send content-type: {wanted}.")

    @app.get("/health")
    async def health(answer: Response) -> dict[str, Any]:
        alive = batcher.thread.is_alive()
        answer.status_code = 200 if alive else 503
        return {"status": "ok" if alive else "stopped", "waiting": batcher.waits}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        require_model(asked)
        return card

    async def require_json(http: Request) -> None:
        require_type(http, "application/json")

    @app.post("/v1/chat/completions", response_model=None, dependencies=[Depends(require_json)])  # before the body
    async def chat(body: ChatRequest, http: Request) -> Response:
        require_model(body.model)
        number = answers_asked(body, bounds, batcher)
        try:
            dialog, audios = await asyncio.to_thread(read_messages, model, body.messages, bounds)
        except DataError as error:
            raise RequestError.of(error, "messages") from error
        most = min(body.max_completion_tokens or body.max_tokens or bounds.max_tokens, bounds.max_tokens)
        answers = Answers(batcher, dialog, audios, most, sampling_of(body), number)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(streamed_chat(answers, tokenizer, name, usage), media_type="text/event-stream")
        return await whole_chat(answers, tokenizer, name, http)

    @app.post("/v1/audio/transcriptions", response_model=None)
    async def transcription(http: Request) -> Response:
        require_type(http, "multipart/form-data")
        data, body = await read_form(http)
        require_model(body.model)
        return await transcribe(http, data, body, model, batcher, bounds)

    return app
