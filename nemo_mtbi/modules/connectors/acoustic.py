"""What the LLM reads of a voice beside the words: a stream of positions, or a text whose words the voice chooses.

Letters: B utterances or windows, T encoder frames, K encoder layers, D their width, P output positions, H LLM width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, computed_dtype, frame_mask
from nemo_mtbi.modules.connectors.dense import each_normalized
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler
from nemo_mtbi.modules.connectors.wordings import Wordings

WHOLE = torch.inf  # center of a position that belongs to its utterance as a whole
PASSES_COUNTED = 200  # of training, whose windows say what is usual
SMALLEST_DEVIATION = 1e-4  # of normalized features and their statistics
FARTHEST = 10.0  # deviations from the mean: silence, or a few frames, would drown everything else
TEMPO_UNITS = 32
TEMPO_SCALE = 8.0  # of three numbers beside thousands of statistics of frames
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
        agreed: Callable[[Tensor], Tensor] = torch.clone,
    ) -> SpeechEmbeddings:
        """What the LLM reads.

        Args:
            features: (B, T, K D).
            lengths: (B,) frames.
            written: (B, 2) tokens and words of the text channel.
            scale: () root mean square of the LLM's embeddings.
            embed_tokens: the LLM's.
            agreed: makes a discrete choice that of all ranks that hold the LLM (:meth:`Connector.agreed`).
        """
        layers = self.norm_in(features.unflatten(-1, (len(self.layer_weights), -1)))
        mixed = torch.einsum("btkd,k->btd", layers, self.layer_weights.softmax(0).to(layers.dtype))
        hidden, lengths = self.subsample(mixed, lengths)
        embeddings = self.project(self.norm(hidden)) * scale
        positions = embeddings.shape[1]
        embeddings = embeddings * frame_mask(lengths, positions)[..., None]
        return SpeechEmbeddings(embeddings, lengths, self.subsample.centers(positions, embeddings))


class DescriptionChannel(nn.Module):
    """A description of the voice in the LLM's own words, which what is heard chooses: P positions.

    A text with choices (:mod:`nemo_mtbi.modules.connectors.wordings`). Of the alternatives of choice c the most likely
    one stands in the text, its embeddings less or more the offset that all voices share::

        a_c = argmax_a z_ca,    z = project(gelu([hidden(standardized([mean_t x; std_t x])); tempo(standardized(r))]))
        positions of c:  E_{c a_c} + rms(E) offset_c

    with E_ca the embeddings of its alternative a, x = norm(layers), and the mean and standard deviation over time of
    x-vectors (Snyder et al. 2018), of several encoder layers side by side, standardized over the utterances of
    training: they differ little beside what they share, which is all that untrained layers would see otherwise. r are
    the logarithms of the seconds and of the tokens and words that the text channel writes in one, which no statistic of
    frames counts (``TEMPO_SCALE`` times, so that few steps learn them).

    So the LLM reads what the text LLM does, and questions of any wording are answered as of a text: a mixture of
    alternatives is answered as the LLM likes. In training it reads such a mixture, sum_a softmax(z)_ca E_ca, in which
    the gradient of the imitation objective decides among the words, as through a verbalizer (Schick and Schuetze 2021)
    that stands in the prompt: where one word stands alone, it is many times weaker (docs/results.md, Voices).

    The gradient of the probabilities is that of a softmax at equal ones, wherever they are (straight-through, Bengio et
    al. 2013): a choice that became sure of one alternative for all voices would never learn again from its own.

    ``offset`` is the same for all voices and begins at zero, as a soft prompt that begins as words (Lester et al.
    2021): a text about a voice behind every transcript would be repeated, and summed up, with it.

    Args:
        encoder_layers: K.
        width: D.
        output_dim: H.
        prompt: the text with its choices, as tokens of the LLM.
        opening: tokens of the lines before the words.
    """

    opening: Tensor  # tokens before the words
    prompt: Tensor  # of every token of every alternative: itself, its position, the place of its weight
    impossible: Tensor  # places of alternatives that a choice does not have
    even: Tensor  # probabilities of alternatives of which each is as likely

    def __init__(
        self, encoder_layers: int, width: int, output_dim: int, prompt: Wordings, opening: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.encoder_layers = encoder_layers
        self.opening_ids = list(opening)  # the buffer's values, without asking a GPU for them
        self.register_buffer("opening", torch.tensor(self.opening_ids, dtype=torch.long))
        self.standardized = Standardization(2 * encoder_layers * width)
        self.hidden = nn.Linear(2 * encoder_layers * width, width)
        self.tempo_standardized = Standardization(3)
        self.tempo = nn.Linear(3, TEMPO_UNITS)
        choices = [piece for piece in prompt if len(piece) > 1]
        most = max(map(len, choices))
        self.project = nn.Linear(width + TEMPO_UNITS, len(choices) * most)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        rows, count, choice = [], 0, 0
        for piece in prompt:
            for a, ids in enumerate(piece):
                place = choice * most + a if len(piece) > 1 else len(choices) * most  # the last weight is 1
                rows += [(token, count + i, place) for i, token in enumerate(ids)]
            count, choice = count + len(piece[0]), choice + (len(piece) > 1)
        self.positions_per_second, self.positions_per_window = 0.0, count
        self.offset = nn.Parameter(torch.zeros(count, output_dim))
        self.register_buffer("prompt", torch.tensor(rows))
        sizes = torch.tensor([len(c) for c in choices])
        self.register_buffer("impossible", torch.arange(most) >= sizes[:, None], persistent=False)
        self.register_buffer("even", ~self.impossible / sizes[:, None], persistent=False)

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        written: Tensor,
        scale: Tensor,
        embed_tokens: Callable[[Tensor], Tensor],
        agreed: Callable[[Tensor], Tensor] = torch.clone,
    ) -> SpeechEmbeddings:
        """See :meth:`AcousticChannel.forward`."""
        chosen = self.shares(self.logits(features, lengths, written), agreed).flatten(1)
        tokens, positions, places = self.prompt.unbind(1)
        shares = torch.cat([chosen, torch.ones_like(chosen[:, :1])], 1)[:, places]
        words = embed_tokens(tokens)
        embeddings = (self.offset.float() * scale).expand(len(shares), -1, -1)
        embeddings = embeddings.index_add(1, positions, shares[..., None] * words.float())
        embeddings = embeddings.to(computed_dtype(words.device, self.project.weight.dtype))
        centers = torch.full(embeddings.shape[:2], WHOLE, device=embeddings.device)
        return SpeechEmbeddings(embeddings, torch.full_like(lengths, embeddings.shape[1]), centers)

    def logits(self, features: Tensor, lengths: Tensor, written: Tensor) -> Tensor:
        """Of the alternatives of each choice, (B, choices, most alternatives), float32, -inf where a choice has fewer;
        see :meth:`forward`."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = self.standardized(statistics(each_normalized(features.float(), self.encoder_layers), lengths))
            rate = TEMPO_SCALE * self.tempo_standardized(tempo(lengths, written))
            own = self.hidden.weight.dtype  # near ties would fall otherwise in autocast's type
            heard = torch.cat([self.hidden(pooled.to(own)), self.tempo(rate.to(own))], -1)
            logits = self.project(nn.functional.gelu(heard)).unflatten(-1, self.impossible.shape).float()
        return logits.masked_fill(self.impossible, -torch.inf)

    def shares(self, logits: Tensor, agreed: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Of each alternative in what the LLM reads, (B, choices, most alternatives).

        Its probability while it is trained, else 1 for the most likely one.
        """
        if not (self.training and logits.requires_grad):
            best = agreed(logits.detach().argmax(-1))
            return torch.zeros_like(logits).scatter_(-1, best[..., None], 1.0)
        own = logits.masked_fill(self.impossible, 0.0)
        apart = (own - (own * self.even).sum(-1, keepdim=True)) * self.even
        return logits.detach().softmax(-1) + (apart - apart.detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        pairs = [(state_dict.get(f"{prefix}{name}"), getattr(self, name)) for name in ("prompt", "opening")]
        if f"{prefix}prompt_ids" in state_dict or any(
            given is not None and not own.is_meta and given.tolist() != own.tolist() for given, own in pairs
        ):
            raise CheckpointError(
                "The acoustic channel was trained with another text (modality_adapter.acoustic_prompt), or, before "
                "December 2026, with one without choices. Give the one that it was trained with."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


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
    """(B,) frames, (B, 2) tokens and words -> logarithms of the seconds and of both in a second, (B, 3)."""
    seconds = lengths.clamp_min(1) / FRAMES_PER_SECOND
    return torch.cat([seconds[:, None], (written + 1) / seconds[:, None]], -1).log()


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
        words=second.words if first.words is None else first.words,
    )
