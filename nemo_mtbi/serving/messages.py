"""OpenAI's messages -> the model's conversation. What clients write is data: none of it becomes a control token."""

import base64
import binascii
import json
from typing import Any

from nemo_mtbi.data.audio_stream import seconds_of
from nemo_mtbi.data.rendering import AudioTag, Message
from nemo_mtbi.errors import DataError
from nemo_mtbi.models.generation import SpeechLLM
from nemo_mtbi.serving.audio import decode_audio
from nemo_mtbi.serving.limits import Limits
from nemo_mtbi.serving.protocol import AudioURLPart, ChatMessage, InputAudioPart, RefusalPart, TextPart

ROLES = {"developer": "system"}  # the name that newer clients give it


def read_messages(model: SpeechLLM, messages: list[ChatMessage], limits: Limits) -> tuple[list[Message], list[Any]]:
    """Messages as clients send them -> a dialog of literal texts and audio tags, and the audios of the tags in blocks.

    A user's message of one audio and text is laid out as in training, whatever the order of its parts. Calls of tools
    and their results, for which the prompt formats have no place, are written out in the turns around them.

    Raises:
        DataError: what is wrong with the request.
    """
    dialog: list[Message] = []
    heard: list[Any] = []
    seconds, characters, audio_number, previous = 0.0, 0, 0, ""
    for message in messages:
        parts = _parts(message)
        audios = [p for p in parts if isinstance(p, InputAudioPart | AudioURLPart)]
        texts = [p for p in parts if isinstance(p, str)]
        characters += sum(map(len, texts))
        audio_number += len(audios)
        if characters > limits.max_text_characters:
            raise DataError(f"The messages have more than {limits.max_text_characters} characters.")
        if audio_number > limits.max_audios:
            raise DataError(f"The messages have more than {limits.max_audios} audios.")
        if audios and message.role != "user":
            raise DataError(f"Only a user's message can hold audio, not one of role {message.role}.")
        for audio in audios:
            heard.append(
                decode_audio(audio_bytes(audio), model.sampling_rate, limits.max_audio_seconds, before=seconds)
            )
            seconds += seconds_of(heard[-1], model.sampling_rate)
        if message.role == previous == "tool":  # several results are one turn
            dialog[-1]["content"] += ["\n", *_turn(model, "tool", parts)["content"]]
        else:
            dialog.append(_turn(model, message.role, parts))
        previous = message.role
    if messages[-1].role == "assistant":
        raise DataError("The last message is the assistant's; the last one has to be what is to be answered.")
    _require_format(model, dialog)
    return dialog, heard


def _parts(message: ChatMessage) -> list[Any]:
    """Texts as strings, audios as they came; without content, one empty text."""
    parts: list[Any] = [message.content] if isinstance(message.content, str) else []
    for part in message.content if isinstance(message.content, list) else []:
        if isinstance(part, TextPart | RefusalPart):
            parts.append(part.text if isinstance(part, TextPart) else part.refusal)
        else:
            parts.append(part)
    for call in message.tool_calls or []:
        try:
            own = {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")}
            written = json.dumps(own, ensure_ascii=False)
        except (ValueError, RecursionError):  # no JSON, or nested beyond reason: as text
            own = {"name": call.function.name, "arguments": call.function.arguments}
            written = json.dumps(own, ensure_ascii=False)
        parts.append(f"<tool_call>\n{written}\n</tool_call>")
    if message.role == "tool":
        return ["<tool_response>", *parts, "</tool_response>"]
    return parts or [""]


def _turn(model: SpeechLLM, role: str, parts: list[Any]) -> Message:
    texts = [p for p in parts if isinstance(p, str)]
    if len(parts) - len(texts) == 1:
        return model.user_turn("\n".join(texts))
    content: list[Any] = []
    for part in parts:
        content += ["\n", part if isinstance(part, str) else AudioTag(model.audio_locator_tag)]
    return {"role": "user" if role == "tool" else ROLES.get(role, role), "content": content[1:]}


def _require_format(model: SpeechLLM, dialog: list[Message]) -> None:
    try:
        pieces, _ = model.prompt_pieces([dialog])
    except Exception as error:  # templates raise what they like
        raise DataError(f"This dialog does not fit the prompt format of the model ({error}).") from error
    context = getattr(model.llm.config, "max_position_embeddings", None)
    tokens = sum(len(p) for p in pieces[0] if isinstance(p, list))
    if context is not None and tokens >= context:
        raise DataError(f"The messages have {tokens} tokens of text; the LLM's context has {context}. Send less.")


def audio_bytes(part: InputAudioPart | AudioURLPart) -> bytes:
    """The file that a part carries: base64, or a ``data:`` URL.

    Raises:
        DataError: neither; addresses elsewhere are not fetched.
    """
    if isinstance(part, InputAudioPart):
        place, text = "input_audio.data", part.input_audio.data
    else:
        place = "audio_url.url"
        text = part.audio_url if isinstance(part.audio_url, str) else part.audio_url.url
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise DataError(f"{place} is a data: URL without base64; send data:audio/wav;base64,...")
    elif "://" in text[:32]:
        scheme = text.split("://")[0]
        raise DataError(f"{place} is an address ({scheme}://); this server fetches none. Send a data: URL.")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{place} is not base64 ({error}).") from error
