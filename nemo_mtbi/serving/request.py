"""One question to the batcher, and its answer as it grows."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_mtbi.data.audio_stream import AudioBlocks, Gap
from nemo_mtbi.serving.sampling import Draw, Sampling, TokenScore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """New text of an answer, and the scores of the tokens behind it if they are wanted."""

    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Listening:
    """The share of the audio that is heard."""

    share: float


@dataclass(eq=False)
class Request:
    """One question.

    Attributes:
        dialog: messages, as :meth:`SpeechLLM.generate` takes them.
        audios: one for each audio tag, in blocks of float32 samples at the model's rate.
        max_tokens: new tokens at most.
        on_piece: called by the worker thread with each new piece of text, and before the first, while long audio is
            heard, with :class:`Listening`.
        on_end: called once with ``stop``, ``length`` or ``cancelled``, or the error.
        sampling: how the answer is chosen.
        silence: the answer to audio without speech; None: the model's own (``model.nothing_heard_answer``).
        ordinal: which of several answers to the same question.
        tokens: of the answer so far, without the end-of-turn token.
        prompt_positions: embeddings of the prompt, speech included.
        finished: why the answer has ended.
        gaps: which audio, and the parts of it that could not be read.
        long: whether the audio is heard in several passes.
    """

    dialog: list[dict[str, Any]]
    audios: list[AudioBlocks]
    max_tokens: int
    on_piece: Callable[[Any], None]
    on_end: Callable[[str | Exception], None]
    sampling: Sampling = field(default_factory=Sampling)
    ordinal: int = 0
    silence: str | None = None
    tokens: list[int] = field(default_factory=list)
    prompt_positions: int = 0
    finished: str | None = None
    gaps: list[tuple[int, Gap]] = field(default_factory=list)
    long: bool = False

    def __post_init__(self) -> None:
        self.draw = Draw(self.sampling, self.ordinal)
        self.newest: TokenScore | None = None  # of the token that was drawn last
        self._text = ""  # all that was decoded
        self._sent = 0  # characters of it
        self._scores: list[tuple[int, TokenScore]] = []  # not sent yet: where the token's text begins, its score
        self._ended = False

    def cancel(self) -> None:
        """The client has gone; the answer stops at the next token."""
        self.finished = self.finished or "cancelled"

    def add(self, token: int, tokenizer: Any, ends: set[int]) -> None:
        """The next token of the answer."""
        if self.finished:
            return
        if token in ends:
            self.finished = "stop"
        else:
            self.tokens.append(token)
            if self.newest is not None:
                self._scores.append((len(self._text.rstrip("\ufffd")), self.newest))
            if len(self.tokens) >= self.max_tokens:
                self.finished = "length"
        self._text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [self._text.find(text) for text in self.sampling.stop if text in self._text]
        if found:
            self.finished, self._text = "stop", self._text[: min(found)]
            self._scores = [(begin, score) for begin, score in self._scores if begin < min(found)]
        if self.finished:
            self._text = self._text.rstrip()
        self._send()
        if self.finished:
            self.end(self.finished)

    def listened(self, share: float) -> None:
        """That share of the audio is heard."""
        self._tell(self.on_piece, Listening(share))

    def audio_gaps(self) -> dict[str, Any]:
        """For the answer's body, beyond OpenAI's fields: what could not be read; empty if everything could."""
        gaps = [{"audio": index, **asdict(gap)} for index, gap in self.gaps]
        return {"audio_gaps": gaps} if gaps else {}

    def hear_nothing(self, answer: list[int], tokenizer: Any, ends: set[int]) -> None:
        """The answer to audio without speech: ``answer`` (token ids), or ``silence``."""
        if self.silence is not None:
            self._text, self.finished = self.silence, "stop"
            self._send()
            self.end("stop")
            return
        for token in answer:
            self.add(token, tokenizer, ends)

    def end(self, reason: str | Exception) -> None:
        """Tell the end, once."""
        if not self._ended:
            self._ended = True
            self.finished = self.finished or "failed"
            self._tell(self.on_end, reason)

    def _send(self) -> None:
        ready = len(self._text)
        if not self.finished:
            if self._text.endswith("\ufffd"):
                return  # in the middle of a character
            ready -= max((_begun(self._text, stop) for stop in self.sampling.stop), default=0)
            ready = len(self._text[:ready].rstrip())  # an answer does not end in spaces
        due = [score for begin, score in self._scores if self.finished or begin < ready]
        if ready > self._sent or due:
            self._scores = self._scores[len(due) :]
            piece = Piece(self._text[self._sent : ready], tuple(due))
            self._sent = max(ready, self._sent)
            self._tell(self.on_piece, piece)

    def _tell(self, listener: Callable[[Any], None], event: Any) -> None:
        try:
            listener(event)
        except Exception as error:  # of this client alone: the others of the batch go on
            log.warning(f"An answer reached nobody ({type(error).__name__}: {error}).")
            self.cancel()


def _begun(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop text may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
