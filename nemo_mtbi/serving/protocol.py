"""What clients send: the fields of OpenAI's requests that have a meaning here, and what becomes of the others.

``null`` is a field that was not sent. A field that would change the answer and has no effect here is refused.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]


class Strict(BaseModel):
    """Refuses further fields, unless their value is the one that has no effect.

    Attributes:
        UNUSED: fields that say nothing about the answer.
        NEUTRAL: of fields that do, the values that ask for nothing.
    """

    model_config = ConfigDict(extra="allow")
    UNUSED: ClassVar[frozenset[str]] = frozenset()
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "Strict":
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in self.UNUSED and value not in self.NEUTRAL.get(name, ()):
                neutral = self.NEUTRAL.get(name)
                hint = f" (except {' or '.join(map(repr, neutral))})" if neutral else ""
                message = f"is not supported by this server{hint}; leave it out."
                raise PydanticCustomError("unsupported", "{reason}", {"name": name, "reason": message})
        return self


class InputAudio(BaseModel):
    data: str


class Address(BaseModel):
    url: str


class TextPart(BaseModel):
    type: Literal["text"] = "text"
    text: str


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: str


class InputAudioPart(BaseModel):
    """OpenAI's way to send audio."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioURLPart(BaseModel):
    """The way of vLLM's clients."""

    type: Literal["audio_url"]
    audio_url: Address | str


Part = Annotated[TextPart | RefusalPart | InputAudioPart | AudioURLPart, Field(discriminator="type")]


class CalledFunction(BaseModel):
    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One message. Clients send earlier answers as they got them, with further fields that are null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=64)] | None = None
    audio: None = None
    function_call: None = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    NEUTRAL = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}


def _useful_stops(stop: str | list[str] | None) -> str | list[str] | None:
    texts = [stop] if isinstance(stop, str) else stop or []
    if len(texts) > MAX_STOPS or any(not 0 < len(t) <= MAX_STOP_CHARACTERS for t in texts):
        reason = f"give up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters."
        raise PydanticCustomError("stop", "{reason}", {"reason": reason})
    return stop


class ChatRequest(Strict):
    """``/v1/chat/completions``."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Annotated[str | list[str] | None, AfterValidator(_useful_stops)] = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    UNUSED = frozenset(
        "user metadata safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options "
        "parallel_tool_calls priority request_id".split()
    )
    NEUTRAL = {
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "audio": (),
        "best_of": (1,),
        "continue_final_message": (False,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "min_p": (0,),
        "min_tokens": (0,),
        "modalities": (["text"],),
        "presence_penalty": (0,),
        "reasoning_effort": ("none",),
        "repetition_penalty": (1,),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stop_token_ids": ([],),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_k": (0, -1),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
    }

    @model_validator(mode="after")
    def _fields_that_need_others(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            reason = "needs logprobs=true."
            raise PydanticCustomError("top_logprobs", "{reason}", {"name": "top_logprobs", "reason": reason})
        if self.stream_options is not None and not self.stream:
            reason = "needs stream=true."
            raise PydanticCustomError("stream_options", "{reason}", {"name": "stream_options", "reason": reason})
        return self


class TranscriptionRequest(Strict):
    """The fields of ``/v1/audio/transcriptions`` beside the file."""

    model: str | None = None
    language: str | None = None
    response_format: Literal["json", "text", "verbose_json"] | None = None
    temperature: Temperature | None = None
    seed: Seed | None = None
    stream: bool | None = None
    include: Annotated[list[Literal["logprobs"]], Field(max_length=8)] = []

    NEUTRAL = {"prompt": ("",), "chunking_strategy": ("auto",)}

    @model_validator(mode="after")
    def _formats_that_can_hold_it(self) -> "TranscriptionRequest":
        if (self.include or self.stream) and self.response_format not in (None, "json"):
            name = "include" if self.include else "stream"
            reason = "goes with response_format=json alone."
            raise PydanticCustomError("response_format", "{reason}", {"name": name, "reason": reason})
        return self
