"""What one request may ask for, and bodies that are cut off."""

from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_mtbi.serving.failures import failure


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 512
    max_audio_seconds: float = 3600.0
    max_body_bytes: int = 64 * 2**20
    max_text_characters: int = 20_000
    max_audios: int = 16
    max_answers: int = 8


FORM_BYTES = 2**20  # of an upload, around its file


class BodyLimit:
    """ASGI middleware: bodies over ``limit`` bytes are answered with 413 before they are kept.

    All of the server's, the page's too (whose own limit is that of a file, in a form).
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limit if scope["path"].startswith("/v1/") else self.limit + FORM_BYTES
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:
                raise HTTPException(413, f"The body is larger than {limit} bytes, which is the limit here.")
            return message

        if announced.isdigit() and int(announced) > limit:
            response = failure(413, f"The body has {int(announced)} bytes; {limit} is the limit here.")
            await response(scope, receive, send)
            return
        await self.app(scope, counted, send)
