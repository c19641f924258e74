"""What the LLM reads of a voice beside the words: a stream of positions, or a text that the voice moves.

Letters: B utterances or windows, T encoder frames, K encoder layers, D their width, P output positions, H LLM width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, frame_mask, uniform_centers
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler

WHOLE = torch.inf  # center of a position that belongs to its utterance as a whole
SMALLEST_VARIANCE = 1e-4  # of normalized features; a square root has no slope at 0


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
        self.positions_per_second, self.positions_per_window = 50 / self.subsample.factor, 0

    def forward(
        self, features: Tensor, lengths: Tensor, scale: Tensor, embed_tokens: Callable[[Tensor], Tensor]
    ) -> SpeechEmbeddings:
        """What the LLM reads.

        Args:
            features: (B, T, K D).
            lengths: (B,) frames.
            scale: () root mean square of the LLM's embeddings.
            embed_tokens: the LLM's.
        """
        layers = self.norm_in(features.unflatten(-1, (len(self.layer_weights), -1)))
        mixed = torch.einsum("btkd,k->btd", layers, self.layer_weights.softmax(0).to(layers.dtype))
        hidden, lengths = self.subsample(mixed, lengths)
        embeddings = self.project(self.norm(hidden)) * scale
        positions = embeddings.shape[1]
        embeddings = embeddings * frame_mask(lengths, positions)[..., None]
        return SpeechEmbeddings(embeddings, lengths, uniform_centers(positions, self.subsample.factor, embeddings))


class DescriptionChannel(nn.Module):
    """A text of P tokens, moved by statistics of the whole utterance: a description of an average voice at first.

    ::

        E_p  +  rms(E) project_p(gelu(hidden(norm([mean_t x; std_t x])))),     x = convolutions(mix(norm(layers)))

    with the mean and standard deviation over time of x-vectors (Snyder et al. 2018). ``project`` starts at zero, so the
    LLM reads the text itself before the first step (as soft prompts that begin as words, Lester et al. 2021), and what
    training adds says how this voice differs from it.

    Args:
        encoder_layers: K.
        width: D.
        output_dim: H.
        prompt_ids: the P tokens of the text, of the LLM.
        strides: convolutions of stride 2 before the statistics.
    """

    def __init__(
        self, encoder_layers: int, width: int, output_dim: int, prompt_ids: list[int], strides: int = 2
    ) -> None:
        super().__init__()
        self.encoder_layers = encoder_layers
        self.norm_in = nn.LayerNorm(width, elementwise_affine=False)
        self.mix = nn.Linear(encoder_layers * width, width)
        self.subsample = ConvSubsampler(width, width, strides)
        self.norm = nn.LayerNorm(2 * width)
        self.hidden = nn.Linear(2 * width, width)
        self.project = nn.Linear(width, len(prompt_ids) * output_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids), persistent=False)
        self.positions_per_second, self.positions_per_window = 0.0, len(prompt_ids)

    prompt_ids: Tensor

    def forward(
        self, features: Tensor, lengths: Tensor, scale: Tensor, embed_tokens: Callable[[Tensor], Tensor]
    ) -> SpeechEmbeddings:
        """See :meth:`AcousticChannel.forward`."""
        layers = self.norm_in(features.unflatten(-1, (self.encoder_layers, -1))).flatten(-2)
        hidden, frames = self.subsample(nn.functional.gelu(self.mix(layers)), lengths)
        pooled = statistics(hidden, frames)
        moved = self.project(nn.functional.gelu(self.hidden(self.norm(pooled)))) * scale
        text = embed_tokens(self.prompt_ids).to(moved.dtype)
        embeddings = text + moved.unflatten(-1, text.shape)
        count = torch.full_like(lengths, len(text))
        return SpeechEmbeddings(embeddings, count, embeddings.new_full(embeddings.shape[:2], WHOLE))


def statistics(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, D), (B,) valid frames -> mean and standard deviation over them, (B, 2 D)."""
    mask = frame_mask(lengths, hidden.shape[1])[..., None]
    count = lengths.clamp_min(1)[:, None].to(hidden.dtype)
    mean = (hidden * mask).sum(1) / count
    variance = ((hidden - mean[:, None]).square() * mask).sum(1) / count
    return torch.cat([mean, (variance + SMALLEST_VARIANCE).sqrt()], -1)


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
