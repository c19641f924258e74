"""Conversations: several turns, each with any number of audios, whole answers or pieces of text as they come."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from nemo_mtbi.data.audio import waveform
from nemo_mtbi.data.audio_stream import AudioBlocks, open_audio

Audio = str | Path | np.ndarray | Tensor


class ConversationModel(Protocol):
    """What a conversation asks of its model (:class:`nemo_mtbi.models.generation.SpeechLLM`)."""

    tokenizer: Any

    @property
    def sampling_rate(self) -> int: ...

    def generate(self, prompts: list[list[dict[str, Any]]], **options: Any) -> Tensor: ...

    def user_turn(self, prompt: str, audios: int = 1) -> dict[str, Any]: ...


class Stopped(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Conversation:
    """A dialog with a speech LLM; every answer becomes part of what the next question is asked about.

    Args:
        model: the speech LLM.
        system: system message, where the prompt format has one.
    """

    def __init__(self, model: ConversationModel, system: str | None = None) -> None:
        self.model = model
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": [system]}] if system else []
        self.audios: list[AudioBlocks] = []

    def ask(self, prompt: str, audio: Audio | Sequence[Audio] = (), **generation: Any) -> str:
        """The answer to the next question.

        Args:
            prompt: the question.
            audio: paths, or waveforms (S,) of one channel at the model's rate; none for a question about the earlier
                ones.
            generation: for Transformers' ``generate``, e.g. ``max_new_tokens`` (128), ``do_sample``, ``num_beams``.

        Raises:
            DataError: an audio cannot be read.
        """
        messages, audios, options = self._next(prompt, audio, generation)
        ids = self.model.generate([messages], **options)
        answer = self.model.tokenizer.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        self._remember(messages, audios, answer)
        return answer

    def stream(self, prompt: str, audio: Audio | Sequence[Audio] = (), **generation: Any) -> Iterator[str]:
        """:meth:`ask`, in pieces as they are generated; leaving the iterator early stops the generation."""
        messages, audios, options = self._next(prompt, audio, generation)
        streamer = TextIteratorStreamer(self.model.tokenizer.tokenizer, skip_special_tokens=True)
        stopped, failed = Stopped(), []

        def work() -> None:
            try:
                criteria = StoppingCriteriaList([stopped])
                self.model.generate([messages], streamer=streamer, stopping_criteria=criteria, **options)
            except Exception as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stopped.event.set()
            thread.join()
            if not failed:
                self._remember(messages, audios, "".join(pieces).strip())
        if failed:
            raise failed[0]

    def _next(
        self, prompt: str, audio: Any, generation: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Any], dict[str, Any]]:
        """Messages and audios with the question added, and the other arguments of ``MTBISALM.generate``."""
        given = [audio] if isinstance(audio, str | Path | np.ndarray | Tensor) else list(audio)
        own = [self._open(a) for a in given]
        messages = [*self.messages, self.model.user_turn(prompt, len(own))]
        audios = [*self.audios, *own]
        config = generation.get("generation_config")
        limited = config is not None and (config.max_new_tokens is not None or config.max_length is not None)
        options = generation if limited else {"max_new_tokens": 128, **generation}
        if audios:
            options["audios"] = audios
        return messages, audios, options

    def _open(self, audio: Audio) -> AudioBlocks:
        if isinstance(audio, str | Path):
            return open_audio(audio, self.model.sampling_rate)
        return [waveform(audio)]

    def _remember(self, messages: list[dict[str, Any]], audios: list[Any], answer: str) -> None:
        self.messages = [*messages, {"role": "assistant", "content": [answer]}]
        self.audios = audios
