"""A connector that compresses speech to the LLM's own tokens by CTC.

Letters: B utterances, T encoder frames, D encoder width, P output positions, H LLM width, V_ctc tokens that CTC can
    emit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.alignment import ctc_loss
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings, evaluation_mode, frame_mask, mask_spans
from nemo_mtbi.modules.connectors.ctc_vocabulary import CTCVocabulary
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler
from nemo_mtbi.modules.connectors.token import TokenConnector
from nemo_mtbi.modules.connectors.windows import joined_rows


class CTCCompressConnector(TokenConnector):
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
        dropout: of the transformer, for the CTC loss.
        time_masks, time_mask_frames: in training, so many spans of up to so many encoder frames are set to zero (as
            SpecAugment does, but behind the frozen encoder, so that its features can be cached).
        residual_scale: how far the residual can go in a step of the optimizer; 0 leaves it out.
        vocab_size: number of LLM tokens that CTC can emit; their ids are set by :meth:`set_vocabulary`.
    """

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

    def labels_of(self, tokens: Iterable[int]) -> list[int]:
        return self.vocabulary.labels_of(tokens)

    def transcript_tokens(self, transcripts: list[str], alone: list[bool] | None = None) -> int:
        return sum(len(self.vocabulary.encode(t)) for t in transcripts)

    def transcription_loss(
        self,
        speech: SpeechEmbeddings | None,
        features: Tensor,
        lengths: Tensor,
        transcripts: list[str],
        windows: Windows | None = None,
    ) -> tuple[Tensor, int]:
        """CTC; utterances too short for their transcript contribute nothing.

        Dropout and time masks are applied here alone, so in training the frames are computed anew.
        """
        if speech is None or self.training:
            log_probs, frames = joined_rows(*self.ctc(features, lengths), windows)
        else:
            assert speech.ctc_log_probs is not None and speech.ctc_lengths is not None
            log_probs, frames = speech.ctc_log_probs, speech.ctc_lengths
        return ctc_loss(log_probs, frames, [self.vocabulary.encode(t) for t in transcripts])

    def bind_embeddings(self, embeddings: Tensor) -> None:
        """Take the LLM's embeddings (V_ctc, H) of ``token_ids``; they are not part of the checkpoint."""
        self.table.copy_(embeddings.detach().to(self.table))
        self.table_rms.copy_(self.table.square().mean().sqrt().clamp_min(1e-6))

    def connect(
        self,
        features: Tensor,
        lengths: Tensor,
        starts: list[bool] | None = None,
        written: list[list[int]] | None = None,
    ) -> SpeechEmbeddings:
        with evaluation_mode(self):  # what the LLM reads in training is what it reads in use
            hidden, lengths = self._frames(features, lengths)
        log_probs = self._ctc_log_probs(hidden)
        embeddings, counts, centers, labels, content = self._compress(hidden, log_probs, lengths)
        centers = centers * self.subsampling_factor - 0.5  # as ConvSubsampler.centers
        return SpeechEmbeddings(embeddings, counts, centers, log_probs, lengths, labels, content)

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

    def _compress(self, hidden: Tensor, log_probs: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """-> embeddings (B, P, H), counts (B,), centers (B, P) in subsampled frames, labels (B, P), content (B, P)."""
        batch, frames, _ = log_probs.shape
        valid = frame_mask(lengths, frames)
        best = self.agreed(log_probs.argmax(-1))
        emitted = (best != 0) & valid
        # Silence or noise without a token still gives the LLM one position: the frame nearest to emitting one.
        loudest = self.agreed(log_probs[..., 0].masked_fill(~valid, torch.inf).argmin(1))
        emitted |= torch.zeros_like(emitted).scatter(1, loudest[:, None], ~emitted.any(1, keepdim=True))
        previous = nn.functional.pad(best, (1, 0), value=-1)[:, :-1]
        previous_emitted = nn.functional.pad(emitted, (1, 0))[:, :-1]
        starts = emitted & ((best != previous) | ~previous_emitted)
        counts = starts.sum(1)
        positions = int(counts.max())
        run = (starts.cumsum(1) - 1).clamp_min(0)
        slot = torch.arange(batch, device=run.device)[:, None] * positions + run
        rows = emitted.nonzero(as_tuple=True)
        slot = slot[rows]

        own = log_probs[rows]
        weight = (-torch.expm1(own[:, 0])).clamp_min(1e-6)
        spoken = own[:, 1:].softmax(-1)  # P(v | not blank), also where the blank is sure

        def pool(values: Tensor) -> Tensor:
            return values.new_zeros(batch * positions, *values.shape[1:]).index_add(0, slot, values)

        total = pool(weight).clamp_min(1e-6)
        posteriors = pool(weight[:, None] * spoken) / total[:, None]
        embeddings = posteriors.to(self.table.dtype) @ self.table
        if self.residual is not None:
            states = pool(hidden[rows] * weight[:, None].to(hidden.dtype)) / total[:, None].to(hidden.dtype)
            # In units of the embeddings, so that an optimizer step of the residual is small against them.
            embeddings = embeddings + self.residual(states) * (self.residual_scale * self.table_rms)
        used = frame_mask(counts, positions)
        embeddings = embeddings.view(batch, positions, -1) * used[..., None]
        ones = torch.ones_like(weight)
        centers = (pool(rows[1].to(weight.dtype)) / pool(ones).clamp_min(1)).view(batch, positions)
        labels = best.new_zeros(batch * positions).scatter(0, slot, best[rows]).view(batch, positions)
        return embeddings, counts, centers, labels, total.view(batch, positions).detach() * used
