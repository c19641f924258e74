"""What a recognizer wrote, and beside it what it could not write: a token channel and a dense acoustic channel.

Letters: B utterances, T encoder frames, K encoder layers, D their width, P output positions, H LLM width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.data.example import Example
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.connectors.base import NO_TOKEN, Hypotheses, SpeechEmbeddings, frame_mask, uniform_centers
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler
from nemo_mtbi.modules.connectors.whisper_decoder import WhisperDecoderConnector

ORDERS = ("text_first", "acoustic_first")


class AcousticChannel(nn.Module):
    """Dense positions from several encoder layers, mixed with learned weights (as ELMo and DeSTA2 mix them).

    ``x = sum_k softmax(w)_k norm(layer_k)``, strided convolutions, then ``rms(E) project(norm(x))``.

    Args:
        encoder_layers: K.
        width: D.
        output_dim: H.
        strides: convolutions of stride 2: 50 / 2^strides positions a second.
    """

    def __init__(self, encoder_layers: int, width: int, output_dim: int, strides: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(encoder_layers))
        self.norm_in = nn.LayerNorm(width, elementwise_affine=False)  # layers differ in scale by orders of magnitude
        self.subsample = ConvSubsampler(width, width, strides)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, output_dim)

    def forward(self, features: Tensor, lengths: Tensor, scale: Tensor) -> SpeechEmbeddings:
        """features (B, T, K D), lengths (B,), scale () root mean square of the LLM's embeddings."""
        layers = self.norm_in(features.unflatten(-1, (len(self.layer_weights), -1)))
        mixed = torch.einsum("btkd,k->btd", layers, self.layer_weights.softmax(0).to(layers.dtype))
        hidden, lengths = self.subsample(mixed, lengths)
        embeddings = self.project(self.norm(hidden)) * scale
        positions = embeddings.shape[1]
        embeddings = embeddings * frame_mask(lengths, positions)[..., None]
        return SpeechEmbeddings(embeddings, lengths, uniform_centers(positions, self.subsample.factor, embeddings))


class TwoChannelConnector(WhisperDecoderConnector):
    """The text that Whisper's decoder writes, and dense acoustic positions beside it, trained by imitation.

    The acoustic positions enter with the first step of the imitation stage (:meth:`begin_imitation`): before, the LLM
    reads the text channel alone. (Positions that say nothing disturb the LLM, whatever they hold: see docs/results.md.)
    Interleaving takes the positions of a span from both channels.

    Args:
        feat_in: K D; the last D are what the decoder reads (``perception.encoder_taps`` puts lower layers before it).
        output_dim: H, LLM width.
        decoder: fields of ``transformers.WhisperConfig``, with the width D.
        acoustic_strides: 50 / 2^strides acoustic positions a second; 3 gives 6.25.
        order: ``text_first`` or ``acoustic_first``.
        text: further arguments of :class:`WhisperDecoderConnector`.

    Raises:
        ConfigError: an unknown order, or an encoder that is not that Whisper's.
    """

    acoustic_open: Tensor

    def __init__(
        self,
        feat_in: int,
        output_dim: int,
        decoder: dict[str, Any],
        acoustic_strides: int = 3,
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
        self.acoustic = AcousticChannel(feat_in // width, width, output_dim, acoustic_strides)
        self.positions_per_second = 50 / self.acoustic.subsample.factor
        self.register_buffer("acoustic_open", torch.zeros((), dtype=torch.bool))
        self._open = False  # the buffer's value, without asking a GPU for it

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

    def connect(self, features: Tensor, lengths: Tensor, starts: list[bool] | None = None) -> SpeechEmbeddings:
        text = super().connect(features, lengths, starts)
        return self._with_acoustic(features, lengths, [text])[0]

    def _with_acoustic(
        self, features: Tensor, lengths: Tensor, texts: list[SpeechEmbeddings]
    ) -> list[SpeechEmbeddings]:
        if not self._open:
            return texts
        acoustic = self.acoustic(features, lengths, self.embedding_rms)
        return [joined(t, acoustic) if self.order == "text_first" else joined(acoustic, t) for t in texts]

    @torch.no_grad()
    def hypotheses(
        self, features: Tensor, lengths: Tensor, count: int, temperature: float, starts: list[bool] | None = None
    ) -> Hypotheses:
        result = super().hypotheses(features, lengths, count, temperature, starts)
        result.speech = self._with_acoustic(features, lengths, result.speech)
        return result

    def fusable(self, speech: SpeechEmbeddings) -> Tensor | None:
        """The acoustic positions; the others are the LLM's own tokens."""
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


def joined(first: SpeechEmbeddings, second: SpeechEmbeddings) -> SpeechEmbeddings:
    """The positions of two channels one after the other; ``labels`` of a channel without tokens are ``NO_TOKEN``.

    first: (B, P1, H), second: (B, P2, H) -> (B, P, H), P the longest sum of two lengths.
    """
    sizes = first.embeddings.shape[1], second.embeddings.shape[1]
    valid = torch.cat([frame_mask(first.lengths, sizes[0]), frame_mask(second.lengths, sizes[1])], 1)
    lengths = first.lengths + second.lengths
    index = (~valid).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    embeddings = torch.cat([first.embeddings, second.embeddings.to(first.embeddings.dtype)], 1)
    embeddings = embeddings.gather(1, index[..., None].expand(-1, -1, embeddings.shape[-1]))
    labels = [
        channel.labels if channel.labels is not None else torch.full_like(channel.centers, NO_TOKEN, dtype=torch.long)
        for channel in (first, second)
    ]
    return SpeechEmbeddings(
        embeddings * frame_mask(lengths, index.shape[1])[..., None],
        lengths,
        torch.cat([first.centers, second.centers.to(first.centers.dtype)], 1).gather(1, index),
        labels=torch.cat(labels, 1).gather(1, index),
    )
