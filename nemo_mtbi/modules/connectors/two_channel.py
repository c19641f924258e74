"""What a recognizer wrote, and beside it what it could not write: a token channel and an acoustic channel.

Letters: B utterances, T encoder frames, K encoder layers, D their width, P output positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.data.example import Example
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.connectors.acoustic import AcousticChannel, DescriptionChannel, joined
from nemo_mtbi.modules.connectors.base import NO_TOKEN, Hypotheses, SpeechEmbeddings, frame_mask
from nemo_mtbi.modules.connectors.whisper_decoder import WhisperDecoderConnector
from nemo_mtbi.modules.connectors.wordings import WORDS, Wordings

ORDERS = ("text_first", "acoustic_first")


class TwoChannelConnector(WhisperDecoderConnector):
    """The text that Whisper's decoder writes, and acoustic positions beside it, trained by imitation.

    The acoustic positions enter with the first step of the imitation stage (:meth:`begin_imitation`): before, the LLM
    reads the text channel alone. (Positions that say nothing disturb the LLM, whatever they hold: see docs/results.md.)
    Interleaving takes the positions of a span from both channels; those that describe an utterance stay with its last
    speech.

    Args:
        feat_in: K D; the last D are what the decoder reads (``perception.encoder_taps`` puts lower layers before it).
        output_dim: H, LLM width.
        decoder: fields of ``transformers.WhisperConfig``, with the width D.
        acoustic_strides: 50 / 2^strides acoustic positions a second; 3 gives 6.25.
        acoustic_prompt: text with choices, such as "The gender is {female|male}.", as whose positions the acoustic
            channel describes each window of the encoder, in place of that stream and its strides
            (:class:`DescriptionChannel`). None: the stream. Whole lines may stand before the words, whose place is
            ``{words}``: small LLMs that are told that they read a transcript understand its description better.
        acoustic_prompt_ids, acoustic_opening_ids: its tokens after and before the words, from
            :func:`~nemo_mtbi.modules.connectors.wordings.around_words`.
        order: ``text_first`` or ``acoustic_first``.
        text: further arguments of :class:`WhisperDecoderConnector`.

    Raises:
        ConfigError: an unknown order, ``acoustic_first`` with lines before the words, an encoder that is not that
            Whisper's, or ids of an earlier version.
    """

    acoustic_open: Tensor

    def __init__(
        self,
        feat_in: int,
        output_dim: int,
        decoder: dict[str, Any],
        acoustic_strides: int = 3,
        acoustic_prompt: str | None = None,
        acoustic_prompt_ids: Wordings | None = None,
        acoustic_opening_ids: list[int] | None = None,
        order: str = "text_first",
        **text: Any,
    ) -> None:
        width = int(decoder["d_model"])
        if order not in ORDERS:
            raise ConfigError(f"order={order!r}: use {' or '.join(ORDERS)}.")
        if feat_in % width:
            raise ConfigError(f"The encoder gives {feat_in} features, no multiple of the decoder's width {width}.")
        super().__init__(width, output_dim, decoder, **text)
        self.order = order
        self.acoustic: AcousticChannel | DescriptionChannel
        if acoustic_prompt is None:
            self.acoustic = AcousticChannel(feat_in // width, width, output_dim, acoustic_strides)
        else:
            if acoustic_prompt_ids is None or not all(isinstance(p, Sequence) for p in acoustic_prompt_ids):
                raise ConfigError(
                    f"acoustic_prompt_ids={acoustic_prompt_ids}: leave them out, they are made of acoustic_prompt. "
                    "(Connectors of before December 2026, with a text without choices, have to be trained again.)"
                )
            if WORDS in acoustic_prompt and acoustic_opening_ids is None:
                raise ConfigError(f"acoustic_opening_ids: give those before {WORDS} too, or leave both out.")
            opening = acoustic_opening_ids or []
            if opening and order != "text_first":
                raise ConfigError(
                    f"order={order}: what follows {WORDS} in acoustic_prompt comes after them (text_first)."
                )
            self.acoustic = DescriptionChannel(feat_in // width, width, output_dim, acoustic_prompt_ids, opening)
            self.positions_per_audio = len(opening)
        self.positions_per_second = self.acoustic.positions_per_second
        self.positions_per_window = self.acoustic.positions_per_window
        self.register_buffer("acoustic_open", torch.zeros((), dtype=torch.bool))
        self._open = False  # the buffer's value, without asking a GPU for it

    @property
    def opening(self) -> list[int]:
        return self.acoustic.opening_ids if self._open and isinstance(self.acoustic, DescriptionChannel) else []

    def begin_imitation(self) -> None:
        self.acoustic_open.fill_(True)
        self._open = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._open = bool(state_dict.get(f"{prefix}acoustic_open", self._open))

    def upgrade_state(self, state: dict[str, Any], prefix: str) -> None:
        """Weights of a :class:`WhisperDecoderConnector` serve as the text channel of a new connector."""
        super().upgrade_state(state, prefix)
        if f"{prefix}decoder.layer_norm.weight" in state and f"{prefix}acoustic_open" not in state:
            state.update({f"{prefix}acoustic.{k}": v for k, v in self.acoustic.state_dict().items()})
            state[f"{prefix}acoustic_open"] = torch.zeros_like(self.acoustic_open)
        if f"{prefix}acoustic.prompt" in state:  # of before there were lines before the words
            state.setdefault(f"{prefix}acoustic.opening", torch.zeros(0, dtype=torch.long))

    def connect(
        self,
        features: Tensor,
        lengths: Tensor,
        starts: list[bool] | None = None,
        written: list[list[int]] | None = None,
    ) -> SpeechEmbeddings:
        text = super().connect(features, lengths, starts, written)
        return self._with_acoustic(features, lengths, [text])[0]

    def _with_acoustic(
        self, features: Tensor, lengths: Tensor, texts: list[SpeechEmbeddings]
    ) -> list[SpeechEmbeddings]:
        """Each of several readings with the acoustic channel beside it, which is that of the first, the greedy one."""
        if not self._open:
            return texts
        assert self._language_model is not None
        assert texts[0].words is not None
        written = torch.stack([texts[0].lengths, texts[0].words], -1)
        embed_tokens = self._language_model[1]
        acoustic = self.acoustic(features, lengths, written, self.embedding_rms, embed_tokens, self.agreed)
        return [joined(t, acoustic) if self.order == "text_first" else joined(acoustic, t) for t in texts]

    @torch.no_grad()
    def hypotheses(
        self, features: Tensor, lengths: Tensor, count: int, temperature: float, starts: list[bool] | None = None
    ) -> Hypotheses:
        result = super().hypotheses(features, lengths, count, temperature, starts)
        result.speech = self._with_acoustic(features, lengths, result.speech)
        return result

    def fusable(self, speech: SpeechEmbeddings) -> Tensor | None:
        """The positions of the stream; the others are the LLM's own tokens. (An ``acoustic_prompt`` has no fusion.)"""
        return None if speech.labels is None else speech.labels == NO_TOKEN

    def word_centers(self, speech: SpeechEmbeddings, examples: list[Example], frame_seconds: float) -> Tensor:
        """Text positions belong to words by order, acoustic ones by time."""
        assert speech.labels is not None
        written = (speech.labels != NO_TOKEN) & frame_mask(speech.lengths, speech.labels.shape[1])
        counts = written.sum(1)
        front = (~written).long().argsort(dim=1, stable=True)  # of a row, its text positions first
        text = SpeechEmbeddings(
            speech.embeddings, counts, speech.centers.gather(1, front), labels=speech.labels.gather(1, front)
        )
        by_order = super().word_centers(text, examples, frame_seconds)
        back = torch.empty_like(front).scatter_(
            1, front, torch.arange(front.shape[1], device=front.device).expand_as(front)
        )
        return torch.where(written, by_order.gather(1, back), speech.centers)
