"""What the LLM reads of a voice beside the words: a stream of positions, or a text that the voice moves.

Letters: B utterances or windows, T encoder frames, K encoder layers, D their width, P output positions, H LLM width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, frame_mask
from nemo_mtbi.modules.connectors.dense import each_normalized
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler

WHOLE = torch.inf  # center of a position that belongs to its utterance as a whole
PASSES_COUNTED = 200  # of training, whose windows say what is usual
SMALLEST_DEVIATION = 1e-4  # of normalized features and their statistics
FARTHEST = 10.0  # deviations from the mean: silence, or a few frames, would drown everything else
TEMPO_UNITS = 32
FRAMES_PER_SECOND = 50  # of Whisper's encoder


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
        self.positions_per_second, self.positions_per_window = FRAMES_PER_SECOND / self.subsample.factor, 0

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        written: Tensor,
        scale: Tensor,
        embed_tokens: Callable[[Tensor], Tensor],
    ) -> SpeechEmbeddings:
        """What the LLM reads.

        Args:
            features: (B, T, K D).
            lengths: (B,) frames.
            written: (B,) tokens of the text channel.
            scale: () root mean square of the LLM's embeddings.
            embed_tokens: the LLM's.
        """
        layers = self.norm_in(features.unflatten(-1, (len(self.layer_weights), -1)))
        mixed = torch.einsum("btkd,k->btd", layers, self.layer_weights.softmax(0).to(layers.dtype))
        hidden, lengths = self.subsample(mixed, lengths)
        embeddings = self.project(self.norm(hidden)) * scale
        positions = embeddings.shape[1]
        embeddings = embeddings * frame_mask(lengths, positions)[..., None]
        return SpeechEmbeddings(embeddings, lengths, self.subsample.centers(positions, embeddings))


class DescriptionChannel(nn.Module):
    """A text of P tokens, moved by statistics of the whole window: a description of an average voice at first.

    ::

        E_p  +  rms(E) project_p(gelu([hidden(standardized([mean_t x; std_t x])); tempo(standardized(r))]))

    with x = norm(layers), and the mean and standard deviation over time of x-vectors (Snyder et al. 2018), of several
    encoder layers side by side, standardized over the utterances of training: they differ little beside what they
    share, which is all that untrained layers would see otherwise. r are the logarithms of the seconds and of the tokens
    that the text channel writes in one: no statistic of frames counts words. ``project`` starts at zero, so the LLM
    reads the text itself before the first step (as soft prompts that begin as words, Lester et al. 2021), and what
    training adds says how this voice differs from it.

    Args:
        encoder_layers: K.
        width: D.
        output_dim: H.
        prompt_ids: the P tokens of the text, of the LLM.
    """

    prompt_ids: Tensor

    def __init__(self, encoder_layers: int, width: int, output_dim: int, prompt_ids: list[int]) -> None:
        super().__init__()
        self.encoder_layers = encoder_layers
        self.standardized = Standardization(2 * encoder_layers * width)
        self.hidden = nn.Linear(2 * encoder_layers * width, width)
        self.tempo_standardized = Standardization(2)
        self.tempo = new_tempo()
        self.project = nn.Linear(width + TEMPO_UNITS, len(prompt_ids) * output_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids, dtype=torch.long))
        self.positions_per_second, self.positions_per_window = 0.0, len(prompt_ids)

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        written: Tensor,
        scale: Tensor,
        embed_tokens: Callable[[Tensor], Tensor],
    ) -> SpeechEmbeddings:
        """See :meth:`AcousticChannel.forward`."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = self.standardized(statistics(each_normalized(features.float(), self.encoder_layers), lengths))
            rate = self.tempo_standardized(tempo(lengths, written))
        weights = self.hidden.weight
        hidden = torch.cat([self.hidden(pooled.to(weights.dtype)), self.tempo(rate.to(weights.dtype))], -1)
        moved = self.project(nn.functional.gelu(hidden)) * scale
        text = embed_tokens(self.prompt_ids).to(moved.dtype)
        embeddings = text + moved.unflatten(-1, text.shape)
        count = torch.full_like(lengths, len(text))
        centers = torch.full(embeddings.shape[:2], WHOLE, device=embeddings.device)
        return SpeechEmbeddings(embeddings, count, centers)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given, own = state_dict.get(f"{prefix}prompt_ids"), self.prompt_ids
        if given is not None and not own.is_meta and given.tolist() != own.tolist():
            raise CheckpointError(
                f"The acoustic channel was trained with another text (modality_adapter.acoustic_prompt): tokens "
                f"{given.tolist()}, now {own.tolist()}. Give the one that it was trained with."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def new_tempo() -> nn.Linear:
    return nn.Linear(2, TEMPO_UNITS)


class Standardization(nn.Module):
    """Values less their mean, over their standard deviation, of the first ``PASSES_COUNTED`` micro-batches of training.

    In training as in use (batch normalization would differ); of all ranks together. Before the first of them it only
    clips, at ``FARTHEST``. Vectors that are not finite do not count. During these passes a gradient depends on how a
    step is cut into micro-batches, as with batch normalization.

    Args:
        size: F, of the vectors.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    passes: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))  # sum of squared differences from the mean
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self._passes = 0  # the buffer's value, without asking a GPU for it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Standardization":
        """Move to a device, but never to another precision: the mean is many times the deviation."""
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._passes = int(state_dict.get(f"{prefix}passes", self._passes))

    def forward(self, values: Tensor) -> Tensor:
        """(B, F) -> (B, F), float32."""
        if self.training and torch.is_grad_enabled() and self._passes < PASSES_COUNTED:
            self._add(values)
        deviation = (self.squares / self.count.clamp_min(1)).sqrt()
        known = self.count > 1
        apart = (values - self.mean) / torch.where(known, deviation.clamp_min(SMALLEST_DEVIATION), 1.0)
        return apart.clamp(-FARTHEST, FARTHEST)

    @torch.no_grad()
    def _add(self, values: Tensor) -> None:
        """Chan et al. 1979, with sums that are relative to the mean so far."""
        self._passes += 1
        self.passes.fill_(self._passes)
        finite = values.isfinite().all(1, keepdim=True)
        apart = torch.where(finite, values - self.mean, 0.0).double()
        sums = torch.cat([apart.sum(0), apart.square().sum(0), finite.sum()[None].double()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        (first, second), added = sums[:-1].view(2, -1), sums[-1]
        total = self.count + added
        self.squares += second - first.square() / total.clamp_min(1)
        self.mean += first / total.clamp_min(1)
        self.count.copy_(total)


def statistics(values: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, F), (B,) valid frames -> mean and standard deviation over them, (B, 2 F)."""
    mask = frame_mask(lengths, values.shape[1])[..., None]
    count = lengths.clamp_min(1)[:, None].to(values.dtype)
    mean = (values * mask).sum(1) / count
    variance = ((values - mean[:, None]).square() * mask).sum(1) / count
    return torch.cat([mean, variance.clamp_min(SMALLEST_DEVIATION**2).sqrt()], -1)  # sqrt has no slope at 0


def tempo(lengths: Tensor, written: Tensor) -> Tensor:
    """(B,) frames, (B,) tokens -> logarithms of the seconds and of the tokens in a second, (B, 2)."""
    seconds = lengths.clamp_min(1) / FRAMES_PER_SECOND
    return torch.stack([seconds.log(), ((written + 1) / seconds).log()], -1)


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
        nothing_heard=second.nothing_heard if first.nothing_heard is None else first.nothing_heard,
    )
