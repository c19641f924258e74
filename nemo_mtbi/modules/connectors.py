"""Connectors from encoder frames to the LLM's embedding space; each plugs in as NeMo's ``modality_adapter``.

Letters: B utterances, T encoder frames, D encoder width, P output positions, H LLM width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.data.ctc_vocabulary import CTCVocabulary
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.alignment import ctc_loss


@dataclass
class SpeechEmbeddings:
    """A connector's output.

    Attributes:
        embeddings: (B, P, H), zero-padded on the right.
        lengths: (B,) valid positions.
        centers: (B, P) time of each position in encoder frames, non-decreasing; slices speech by word times.
        ctc_log_probs: (B, P', V_ctc + 1) of a CTC connector, blank first; None otherwise.
        ctc_lengths: (B,) valid rows of ``ctc_log_probs``.
        encoded: frames (W, T, D) and their lengths (W,) after the layers that the connector trains before its tokens; None
            without such.
        classes: (B, P) the token (of a CTC connector: the class) of each position; None for connectors without tokens.
    """

    embeddings: Tensor
    lengths: Tensor
    centers: Tensor
    ctc_log_probs: Tensor | None = None
    ctc_lengths: Tensor | None = None
    classes: Tensor | None = None
    encoded: tuple[Tensor, Tensor] | None = None


class Connector(nn.Module):
    """Base class. ``connect`` is what we use; ``forward`` is NeMo's channel-first adapter contract."""

    subsampling_factor: int = 1
    # Whether a position is a token rather than a stretch of time. Such a connector knows the LLM's tokenizer and embeddings
    # (bind_language_model, called after every load), can be taught transcripts, and its positions belong to words by order.
    emits_tokens = False

    def bind_language_model(self, tokenizer: Any, embed_tokens: nn.Module) -> None:
        """Take what depends on the LLM: its fast tokenizer and its embeddings; not part of the checkpoint."""
        raise NotImplementedError

    def classes_of(self, tokens: Iterable[int]) -> list[int]:
        """``SpeechEmbeddings.classes`` that stand for LLM tokens."""
        raise NotImplementedError

    def transcription_loss(
        self, speech: SpeechEmbeddings | None, features: Tensor, lengths: Tensor, transcripts: list[str]
    ) -> tuple[Tensor, int]:
        """The connector's own loss on the transcripts (w_ctc), as a sum, and the number of target tokens.

        Args:
            speech: what ``connect`` gave for these features, if it ran.
            features, lengths: as in ``connect``.
            transcripts: of the B utterances.

        Raises:
            ConfigError: the connector emits no tokens.
        """
        raise ConfigError(
            f"w_ctc > 0 needs a connector that emits tokens as modality_adapter (CTCCompressConnector, "
            f"WhisperDecoderConnector); {type(self).__name__} does not."
        )

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        """features (B, T, D), lengths (B,) encoder frames -> :class:`SpeechEmbeddings`."""
        raise NotImplementedError

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """audio_signal (B, D, T), length (B,) -> (B, H, P), (B,)."""
        out = self.connect(audio_signal.transpose(1, 2), length)
        return out.embeddings.transpose(1, 2), out.lengths


def frame_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size) bool, True where a position is valid."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def uniform_centers(positions: int, factor: int, like: Tensor) -> Tensor:
    """Centers (B, P), in input frames, of positions that each cover ``factor`` frames. like: (B, ...)."""
    centers = (torch.arange(positions, device=like.device) + 0.5) * factor - 0.5
    return centers.expand(like.shape[0], -1)


def mask_spans(features: Tensor, lengths: Tensor, count: int, longest: int) -> Tensor:
    """SpecAugment's time masks: zero ``count`` random spans of (B, T, D), each up to ``longest`` frames; at most half of an
    utterance can be lost."""
    keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    position = torch.arange(features.shape[1], device=features.device)
    limit = torch.minimum(lengths // (2 * max(1, count)), torch.full_like(lengths, longest))
    for _ in range(count):
        size = torch.rand(len(lengths), device=features.device) * (limit + 1)
        begin = torch.rand(len(lengths), device=features.device) * (lengths - size).clamp_min(0)
        keep &= ~((position >= begin[:, None].floor()) & (position < (begin + size.floor())[:, None].floor()))
    return features * keep[..., None]


class StackMLPConnector(Connector):
    """Stack ``factor`` frames, then a two-layer MLP (as SLAM-ASR and Ultravox).

    Args:
        feat_in: D, encoder width.
        output_dim: H, LLM width.
        factor: frames stacked into one position.
        hidden_dim: width of the MLP.
    """

    def __init__(self, feat_in: int, output_dim: int, factor: int = 5, hidden_dim: int = 2048) -> None:
        super().__init__()
        self.subsampling_factor = factor
        self.norm = nn.LayerNorm(feat_in * factor)
        self.mlp = nn.Sequential(nn.Linear(feat_in * factor, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim))

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        batch, frames, width = features.shape
        features = features * frame_mask(lengths, frames)[..., None]
        padding = -frames % self.subsampling_factor
        stacked = nn.functional.pad(features, (0, 0, 0, padding)).reshape(batch, -1, width * self.subsampling_factor)
        embeddings = self.mlp(self.norm(stacked))
        lengths = (lengths + self.subsampling_factor - 1) // self.subsampling_factor
        return SpeechEmbeddings(
            embeddings * frame_mask(lengths, embeddings.shape[1])[..., None],
            lengths,
            uniform_centers(embeddings.shape[1], self.subsampling_factor, embeddings),
        )


class ConvSubsampler(nn.Module):
    """Strided convolutions (kernel 5, stride 2, GELU), masked so that padding never reaches a valid frame."""

    def __init__(self, feat_in: int, width: int, layers: int) -> None:
        super().__init__()
        self.factor = 2**layers
        self.layers = nn.ModuleList(nn.Conv1d(feat_in if i == 0 else width, width, 5, 2, 2) for i in range(layers))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), (B,) -> (B, ceil(T / 2^layers), width), (B,)."""
        hidden = features.transpose(1, 2)
        for layer in self.layers:
            hidden = hidden * frame_mask(lengths, hidden.shape[2])[:, None]
            hidden = nn.functional.gelu(layer(hidden))
            lengths = (lengths + 1) // 2
        return hidden.transpose(1, 2), lengths


class ConvBottleneckConnector(Connector):
    """Three strided convolutions and a residual bottleneck, as BLSP (arXiv 2309.00916).

    Args:
        feat_in: D, encoder width.
        output_dim: H, LLM width.
        layers: strided convolutions; 2^layers fewer positions.
        bottleneck_dim: width of the bottleneck.
    """

    def __init__(self, feat_in: int, output_dim: int, layers: int = 3, bottleneck_dim: int = 512) -> None:
        super().__init__()
        self.subsample = ConvSubsampler(feat_in, feat_in, layers)
        self.subsampling_factor = self.subsample.factor
        self.project = nn.Linear(feat_in, output_dim)
        self.bottleneck = nn.Sequential(
            nn.LayerNorm(output_dim),
            nn.Linear(output_dim, bottleneck_dim),
            nn.GELU(),
            nn.Linear(bottleneck_dim, output_dim),
        )
        self.norm = nn.LayerNorm(output_dim)

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        hidden, lengths = self.subsample(features, lengths)
        hidden = self.project(hidden)
        hidden = self.norm(hidden + self.bottleneck(hidden))
        return SpeechEmbeddings(
            hidden * frame_mask(lengths, hidden.shape[1])[..., None],
            lengths,
            uniform_centers(hidden.shape[1], self.subsampling_factor, hidden),
        )


class CTCCompressConnector(Connector):
    """Conv subsampling and a small transformer whose CTC posteriors over LLM tokens compress the frames.

    With ``h`` the (normalized) hidden frames and ``E`` the LLM's embeddings of ``token_ids``::

        posteriors = softmax([blank(h), s project(h) E'^T + b])     E' = E / (rms(E) sqrt(H)), s is learned
        position   = mean over a run of frames with the same non-blank argmax, weighted by 1 - P(blank), of
                     sum_v P(v | not blank) E_v  +  residual_scale rms(E) residual(h)   residual is zero-initialized

    The blank runs are dropped. Gradients of the LLM reach the posteriors through the weighted sums and the residual.
    The CTC vocabulary is the token set of the training transcripts, so cost does not grow with the LLM's vocabulary.

    Args:
        feat_in: D, encoder width.
        output_dim: H, LLM width.
        d_model, layers, heads: size of the transformer.
        conv_layers: strided convolutions before it (2: 12.5 frames/s from 50).
        dropout: of the transformer.
        time_masks, time_mask_frames: in training, so many spans of up to so many encoder frames are set to zero (as
            SpecAugment does, but behind the frozen encoder, so that its features can be cached).
        residual_scale: how far the residual can go in a step of the optimizer; 0 leaves it out.
        vocab_size: number of LLM tokens that CTC can emit; their ids are set by :meth:`set_vocabulary`.
    """

    emits_tokens = True
    vocabulary: CTCVocabulary  # over ``token_ids``
    token_ids: Tensor
    table: Tensor
    table_rms: Tensor

    def __init__(
        self,
        feat_in: int,
        output_dim: int,
        vocab_size: int,
        d_model: int = 512,
        layers: int = 2,
        heads: int = 8,
        conv_layers: int = 2,
        dropout: float = 0.1,
        time_masks: int = 0,
        time_mask_frames: int = 20,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.time_masks, self.time_mask_frames = time_masks, time_mask_frames
        if vocab_size < 1:
            raise ConfigError(f"vocab_size={vocab_size}: a CTC connector needs the tokens of the training transcripts.")
        self.norm_in = nn.LayerNorm(feat_in)
        self.subsample = ConvSubsampler(feat_in, d_model, conv_layers)
        self.subsampling_factor = self.subsample.factor
        # A depthwise convolution gives the attention layers relative position.
        self.position = nn.Conv1d(d_model, d_model, 15, padding=7, groups=d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, heads, 4 * d_model, dropout, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm_out = nn.LayerNorm(d_model)
        self.project = nn.Linear(d_model, output_dim)
        self.blank = nn.Linear(d_model, 1)
        self.token_bias = nn.Parameter(torch.zeros(vocab_size))
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.residual = nn.Linear(d_model, output_dim) if residual_scale else None
        if self.residual is not None:
            nn.init.zeros_(self.residual.weight)
            nn.init.zeros_(self.residual.bias)
        self.register_buffer("token_ids", torch.zeros(vocab_size, dtype=torch.long))
        self.register_buffer("table", torch.zeros(vocab_size, output_dim), persistent=False)
        self.register_buffer("table_rms", torch.ones(()), persistent=False)

    def set_vocabulary(self, token_ids: list[int]) -> None:
        """Fix the LLM tokens that CTC emits (ascending ids); class ``i + 1`` is ``token_ids[i]``, class 0 is blank."""
        if len(token_ids) != self.token_ids.numel():
            raise ConfigError(f"The connector was built for {self.token_ids.numel()} tokens, got {len(token_ids)}.")
        self.token_ids.copy_(torch.as_tensor(sorted(token_ids)))

    def bind_language_model(self, tokenizer: Any, embed_tokens: nn.Module) -> None:
        self.vocabulary = CTCVocabulary(self.token_ids.tolist(), tokenizer)
        weight = next(embed_tokens.parameters())
        if not weight.is_meta:  # a shard that is not read yet
            with torch.no_grad():
                self.bind_embeddings(embed_tokens(self.token_ids.to(weight.device)))

    def classes_of(self, tokens: Iterable[int]) -> list[int]:
        return self.vocabulary.classes_of(tokens)

    def transcription_loss(
        self, speech: SpeechEmbeddings | None, features: Tensor, lengths: Tensor, transcripts: list[str]
    ) -> tuple[Tensor, int]:
        """CTC; utterances too short for their transcript contribute nothing."""
        if speech is None:
            log_probs, frames = self.ctc(features, lengths)
        else:
            assert speech.ctc_log_probs is not None and speech.ctc_lengths is not None
            log_probs, frames = speech.ctc_log_probs, speech.ctc_lengths
        return ctc_loss(log_probs, frames, [self.vocabulary.encode(t) for t in transcripts])

    def bind_embeddings(self, embeddings: Tensor) -> None:
        """Take the LLM's embeddings (V_ctc, H) of ``token_ids``; they are not part of the checkpoint."""
        self.table.copy_(embeddings.detach().to(self.table))
        self.table_rms.copy_(self.table.square().mean().sqrt().clamp_min(1e-6))

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        hidden, lengths = self._frames(features, lengths)
        log_probs = self._ctc_log_probs(hidden)
        embeddings, counts, centers, classes = self._compress(hidden, log_probs, lengths)
        centers = (centers + 0.5) * self.subsampling_factor - 0.5
        return SpeechEmbeddings(embeddings, counts, centers, log_probs, lengths, classes)

    def ctc(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """CTC log-probabilities only (alignment warm start). (B, T, D), (B,) -> (B, P', V_ctc + 1), (B,)."""
        hidden, lengths = self._frames(features, lengths)
        return self._ctc_log_probs(hidden), lengths

    def _frames(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm_in(features)
        if self.training:
            features = mask_spans(features, lengths, self.time_masks, self.time_mask_frames)
        hidden, lengths = self.subsample(features, lengths)
        mask = frame_mask(lengths, hidden.shape[1])
        hidden = hidden * mask[..., None]
        hidden = hidden + nn.functional.gelu(self.position(hidden.transpose(1, 2))).transpose(1, 2)
        hidden = self.transformer(hidden, src_key_padding_mask=~mask)
        return self.norm_out(hidden), lengths

    def _ctc_log_probs(self, hidden: Tensor) -> Tensor:
        # Without the square root the first logits would be sharp and wrong: a few hundred steps to unlearn.
        scale = self.logit_scale / (self.table_rms * self.table.shape[1] ** 0.5)
        tokens = self.project(hidden) @ (self.table * scale).t() + self.token_bias
        return torch.cat([self.blank(hidden), tokens], -1).float().log_softmax(-1)

    def _compress(self, hidden: Tensor, log_probs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> embeddings (B, P, H), counts (B,), centers (B, P) in subsampled frames, classes (B, P)."""
        batch, frames, _ = log_probs.shape
        valid = frame_mask(lengths, frames)
        best = log_probs.argmax(-1)
        emitted = (best != 0) & valid
        # Silence or noise without a token still gives the LLM one position: the frame nearest to emitting one.
        empty = ~emitted.any(1)
        if empty.any():
            loudest = log_probs[..., 0].masked_fill(~valid, torch.inf).argmin(1)
            emitted[empty, loudest[empty]] = True
        previous = nn.functional.pad(best, (1, 0), value=-1)[:, :-1]
        previous_emitted = nn.functional.pad(emitted, (1, 0))[:, :-1]
        starts = emitted & ((best != previous) | ~previous_emitted)
        counts = starts.sum(1)
        positions = int(counts.max())
        run = (starts.cumsum(1) - 1).clamp_min(0)
        slot = torch.arange(batch, device=run.device)[:, None] * positions + run
        slot, rows = slot[emitted], emitted.nonzero(as_tuple=True)

        probs = log_probs[rows].exp()
        weight = (1 - probs[:, 0]).clamp_min(1e-6)

        def pool(values: Tensor) -> Tensor:
            return values.new_zeros(batch * positions, *values.shape[1:]).index_add(0, slot, values)

        total = pool(weight).clamp_min(1e-6)
        posteriors = pool(probs[:, 1:]) / total[:, None]  # weight * P(v | not blank) = P(v)
        embeddings = posteriors.to(self.table.dtype) @ self.table
        if self.residual is not None:
            states = pool(hidden[rows] * weight[:, None].to(hidden.dtype)) / total[:, None].to(hidden.dtype)
            # In units of the embeddings, so that an optimizer step of the residual is small against them.
            embeddings = embeddings + self.residual(states) * (self.residual_scale * self.table_rms)
        used = frame_mask(counts, positions)
        embeddings = embeddings.view(batch, positions, -1) * used[..., None]
        ones = torch.ones_like(weight)
        centers = (pool(rows[1].to(weight.dtype)) / pool(ones).clamp_min(1)).view(batch, positions)
        classes = best.new_zeros(batch * positions).scatter(0, slot, best[rows]).view(batch, positions)
        return embeddings, counts, centers, classes
