"""Dialogs to token ids, the same for target generation, training and inference, with the place of every spoken word.

Any NeMo ``PromptFormatter`` (``prompt_format: llama3``, ``qwen``, ...) or the tokenizer's own chat template
(``prompt_format: chat_template``) does the formatting; a recording tokenizer under it keeps character offsets.
"""

import difflib
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

from nemo_mtbi.data.interleaving import Word
from nemo_mtbi.data.literal import without_control_tokens
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io.text import normalized

AUDIO_TAG = "<|audio|>"  # what NeMo's vLLM plugin knows

PLACEHOLDER = "placeholder-of-message-"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say it, no tokenizer can read it


@dataclass(frozen=True)
class TimedWord:
    """One aligned word: text and times in seconds (times None if it could not be aligned)."""

    text: str
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True)
class Spoken:
    """A part of a message that is spoken: its transcript, and optionally the times of its words."""

    transcript: str
    words: tuple[TimedWord, ...] = ()
    duration_seconds: float = 0.0


@dataclass(frozen=True)
class AudioTag:
    """The place of an audio in a message, at inference: one control token."""

    text: str = AUDIO_TAG


Message = dict[str, Any]  # {"role": str, "content": list[str | Spoken | AudioTag]}; strings are read letter by letter


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids up to where the answer begins.

    Attributes:
        ids: the text LLM's input, transcripts in place of speech.
        spoken: for each spoken part, in order, its words with their token ranges in ``ids``.
        tags: position in ``ids`` of each audio tag, in order.
    """

    ids: list[int]
    spoken: list[list[Word]]
    tags: list[int]

    @property
    def positions(self) -> list[int]:
        """Number of ids, first id of the last spoken part, and the one after its last."""
        words = self.spoken[-1]
        return [len(self.ids), words[0].token_begin, words[-1].token_end]


class RecordingTokenizer:
    """Wraps NeMo's ``AutoTokenizer``; remembers each text that a formatter tokenizes, with character offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self.wrapped = tokenizer
        self.hf = tokenizer.tokenizer
        if not self.hf.is_fast:
            raise ConfigError(
                f"{type(self.hf).__name__} has no fast tokenizer, which the word times need. "
                "Convert it with tokenizers, or choose an LLM that ships tokenizer.json."
            )
        self.split_special_tokens = bool(getattr(self.hf, "split_special_tokens", False))
        self.records: list[tuple[str, list[int], list[tuple[int, int]]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def text_to_ids(self, text: str, *_: Any) -> list[int]:
        ids, offsets = self._encoded(text)
        self.records.append((text, ids, offsets))
        return list(ids)

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets; by the tokenizer's core where nothing that surrounds it has a part in them, which
        takes a third of the time.
        """
        core = self.hf.backend_tokenizer
        if core.truncation is None and core.padding is None and core.encode_special_tokens == self.split_special_tokens:
            encoded = core.encode(text, add_special_tokens=False)
            return encoded.ids, encoded.offsets
        encoding = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoding["input_ids"]), list(encoding["offset_mapping"])


class PromptRenderer:
    """Renders dialogs with one tokenizer and one prompt format.

    Args:
        tokenizer: NeMo ``AutoTokenizer`` around a fast Hugging Face tokenizer.
        formatter: subclass of NeMo's ``PromptFormatter``.
    """

    def __init__(self, tokenizer: Any, formatter: type) -> None:
        self.tokenizer = RecordingTokenizer(tokenizer)
        self.formatter = formatter(self.tokenizer)
        self.between: dict[tuple[str, ...], list[str]] = {}  # see _between

    def render(self, messages: list[Message]) -> RenderedPrompt:
        """Render a dialog whose last message is the user's.

        Raises:
            DataError: an empty transcript, a role that the format lacks, a text that is no Unicode, or a prompt whose
                text runs into the transcript within one token.
        """
        texts, parts = [], []
        for index, message in enumerate(messages):
            text, spans = self._message_text(message)
            if lone := LONE_SURROGATE.search(text):
                raise DataError(f"The text holds {lone.group()!r}, half of a character: {text[:60]!r}.")
            texts.append(text)
            parts += [(index, span, part) for span, part in spans]
        roles = tuple(m["role"] for m in messages)
        between = self._between(roles)
        ids, offsets, text = self._encode(roles, texts)
        starts, data = self._locate(texts, text, between)
        places = [(starts[index] + begin, starts[index] + end, part) for index, (begin, end), part in parts]
        tags = [(begin, end) for begin, end, part in places if isinstance(part, AudioTag)]
        ids, offsets = without_control_tokens(self.tokenizer.hf, text, ids, offsets, _outside(data, tags))
        spoken = [
            self._words(offsets, text, begin, end, part) for begin, end, part in places if isinstance(part, Spoken)
        ]
        return RenderedPrompt(ids, spoken, [offsets.index(tag) for tag in tags])

    def _encode(self, roles: tuple[str, ...], texts: list[str]) -> tuple[list[int], list[tuple[int, int] | None], str]:
        """Ids, their offsets, and the text that the prompt format makes of messages."""
        self.tokenizer.records.clear()
        turns = [self._turn(role, text) for role, text in zip(roles, texts, strict=True)]
        ids = self.formatter.encode_dialog(turns)["context_ids"].tolist()
        return ids, *self._join_records(ids)

    def _between(self, roles: tuple[str, ...]) -> list[str]:
        """The prompt format's own text before each message of a dialog, found with words that it does not have; a
        message may have the format's words.
        """
        if roles not in self.between:
            texts, found, position = [f"{PLACEHOLDER}{i}." for i in range(len(roles))], [], 0
            _, _, text = self._encode(roles, texts)
            for own in texts:
                place = text.find(own, position)
                found.append(text[position:place] if place >= 0 else "")
                position = max(position, place + len(own))
            self.between[roles] = found
        return self.between[roles]

    def _turn(self, role: str, text: str) -> dict[str, Any]:
        roles = self.formatter.get_roles()
        if role not in roles or role == "preamble":
            raise DataError(f"The prompt format {self.formatter.NAME!r} has no role {role!r}, only {', '.join(roles)}.")
        return {"role": role, "slots": {name: text for name in self.formatter.get_slots(role)}}

    @staticmethod
    def _message_text(message: Message) -> tuple[str, list[tuple[tuple[int, int], Spoken | AudioTag]]]:
        text = ""
        spans: list[tuple[tuple[int, int], Spoken | AudioTag]] = []
        for part in message["content"]:
            if isinstance(part, AudioTag):
                spans.append(((len(text), len(text) + len(part.text)), part))
                text += part.text
                continue
            if isinstance(part, Spoken):
                transcript = part.transcript.strip()
                if not transcript:
                    raise DataError("The transcript is empty; prepare_data.py drops such utterances and counts them.")
                spans.append(((len(text), len(text) + len(transcript)), part))
                text += transcript
            else:
                text += part
        return text, spans

    def _join_records(self, ids: list[int]) -> tuple[list[tuple[int, int] | None], str]:
        """Character offsets (into the joined text) of each id; None for ids that a formatter put in by itself."""
        offsets: list[tuple[int, int] | None] = []
        text, position = "", 0
        for record_text, record_ids, record_offsets in self.tokenizer.records:
            while position < len(ids) and ids[position : position + len(record_ids)] != record_ids:
                offsets.append(None)
                position += 1
            offsets += [(begin + len(text), end + len(text)) for begin, end in record_offsets]
            position += len(record_ids)
            text += record_text
        offsets += [None] * (len(ids) - len(offsets))
        if len(offsets) != len(ids):
            raise DataError("The prompt format changed the tokens of its own text; use another prompt_format.")
        return offsets, text

    @staticmethod
    def _locate(messages: list[str], text: str, between: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Where each message begins in the text, and the stretch of the text that it is.

        Args:
            messages: in their order.
            text: that the prompt format made of them.
            between: its own text before each of them; where it has another one here, the first place is taken.
        """
        starts, stretches, position = [], [], 0
        for message, own in zip(messages, between, strict=True):
            inner = message.strip()  # some templates strip what they are given
            if text.startswith(own + message, position) or text.startswith(own + inner, position):
                position += len(own)
            found, lead = text.find(message, position), 0
            if found < 0:
                message, lead = inner, len(message) - len(message.lstrip())
                found = text.find(message, position)
            if found < 0:
                raise DataError(f"The prompt format altered the message {message[:60]!r}; use another prompt_format.")
            starts.append(found - lead)
            position = found + len(message)
            stretches.append((found, position))
        return starts, stretches

    def _words(
        self, offsets: list[tuple[int, int] | None], text: str, begin: int, end: int, part: Spoken
    ) -> list[Word]:
        """Words of text[begin:end] with token ranges; a token belongs to the word that holds its last character."""
        inside = [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > begin]
        edges = offsets[inside[0]], offsets[inside[-1]]
        assert edges[0] is not None and edges[1] is not None
        if edges[0][0] < begin or edges[1][1] > end:
            raise DataError(
                f"The prompt runs into the transcript within one token ({text[max(0, begin - 20) : begin + 10]!r}), so "
                "training and inference would differ. Put the speech on its own line (the default message layout)."
            )
        matches = list(re.finditer(r"\S+", text[begin:end]))
        ends = [begin + m.end() for m in matches]
        tokens: list[list[int]] = [[] for _ in matches]
        splits = [False] * len(matches)
        for index in inside:
            token_begin, token_end = offsets[index] or (0, 0)
            first_char = token_begin + len(text[token_begin:token_end]) - len(text[token_begin:token_end].lstrip())
            owner = min(bisect_right(ends, token_end - 1), len(ends) - 1)
            tokens[owner].append(index)
            for word in range(bisect_right(ends, min(first_char, token_end - 1)), owner):
                splits[word] = True
        words, position = [], inside[0]
        times = match_words([m.group() for m in matches], part.words)
        for own, split, timed in zip(tokens, splits, times, strict=True):
            first, position = position, (own[-1] + 1 if own else position)
            words.append(Word(first, position, timed.start_seconds, timed.end_seconds, split))
        return words


def _outside(stretches: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of the stretches that lie between the holes; both in order."""
    result = []
    for begin, end in stretches:
        for hole in [h for h in holes if begin <= h[0] and h[1] <= end]:
            result.append((begin, hole[0]))
            begin = hole[1]
        result.append((begin, end))
    return [(begin, end) for begin, end in result if begin < end]


def match_words(words: list[str], timed: tuple[TimedWord, ...]) -> list[TimedWord]:
    """Give each word of the transcript the times of the aligned word it corresponds to.

    Aligners normalize case and punctuation and may drop words, so sequences are matched on letters and digits alone;
    words without a partner have no times.
    """

    def key(word: str) -> str:
        return normalized(word).replace(" ", "").replace("'", "")

    if words == [own.text for own in timed]:
        return list(timed)
    result = [TimedWord(word) for word in words]
    if not timed:
        return result
    own, others = [key(w) for w in words], [key(t.text) for t in timed]
    if own == others:
        return [replace(other, text=word) for other, word in zip(timed, words, strict=True)]
    matcher = difflib.SequenceMatcher(None, own, others, autojunk=False)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            result[block.a + offset] = replace(timed[block.b + offset], text=words[block.a + offset])
    return result
