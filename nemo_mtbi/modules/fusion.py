"""Long speech in a bounded number of positions: similar neighbours are fused, as in FastLongSpeech (arXiv 2507.14815).

In each round the most similar neighbours are merged, at most half of the positions, until the budget is met. A merged
position is the mean of what it came from, weighted by how much each says: by 1 - P(blank) where the connector has CTC
posteriors, else by its energy.

Letters: B utterances, P positions, H LLM width.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, frame_mask

SMALLEST = 1e-6  # of a position's content: none is lost altogether
TOGETHER = 8192  # positions that are worked on at once
HELD, HELD_BUDGETS = (
    8192,
    8,
)  # positions of one audio, or so many times its budget, that are held until its end is heard


class Fusion(nn.Module):
    """Reduces a connector's positions to a budget for each audio; has no weights.

    Args:
        max_positions: budget; None: none.
        per_second: positions for each second of audio, as a further budget; None: none.
        sampled: budgets of which training draws one for each step (None among them: no fusion), so that one model
            serves them all.
        sampled_per_second: budgets for each second, drawn likewise.

    Raises:
        ConfigError: a budget below 1.
    """

    def __init__(
        self,
        max_positions: int | None = None,
        per_second: float | None = None,
        sampled: list[int | None] | None = None,
        sampled_per_second: list[float | None] | None = None,
    ) -> None:
        super().__init__()
        self.max_positions, self.per_second = max_positions, per_second
        self.sampled, self.sampled_per_second = list(sampled or []), list(sampled_per_second or [])
        for name, values in (("max_positions", [max_positions]), ("sampled", self.sampled)):
            if wrong := [v for v in values if v is not None and (type(v) is not int or v < 1)]:
                raise ConfigError(f"fusion.{name}={wrong[0]}: give whole numbers of at least 1, or null.")
        for name, rates in (("per_second", [per_second]), ("sampled_per_second", self.sampled_per_second)):
            for rate in rates:
                if rate is not None and not (type(rate) in (int, float) and 0 < rate < math.inf):
                    raise ConfigError(f"fusion.{name}={rate}: give positions for each second, above 0, or null.")
        self.drawn, self.drawn_per_second = max_positions, per_second

    def draw(self, key: str) -> None:
        """Draw the budget of the next training batch; equal keys draw alike, on every rank and after a resume."""
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if self.sampled:
            self.drawn = self.sampled[int(torch.randint(len(self.sampled), (), generator=generator))]
        if self.sampled_per_second:
            place = int(torch.randint(len(self.sampled_per_second), (), generator=generator))
            self.drawn_per_second = self.sampled_per_second[place]

    def budgets(self, seconds: list[float]) -> list[int | None]:
        """Positions that each audio may have; None: as many as it has."""
        fixed, rate = self.max_positions, self.per_second
        if self.training:
            fixed, rate = self.drawn, self.drawn_per_second
        own = [None if rate is None else max(1, math.ceil(s * rate)) for s in seconds]
        return [min((b for b in (fixed, o) if b is not None), default=None) for o in own]

    def held(self, seconds: list[float]) -> list[int | None]:
        """Positions of each audio that are held until its end is heard; None: all."""
        return [None if b is None else max(HELD, HELD_BUDGETS * b) for b in self.budgets(seconds)]

    def forward(
        self,
        speech: SpeechEmbeddings,
        seconds: list[float],
        fusable: Tensor | None = None,
        cuts: Tensor | None = None,
        agreed: Callable[[Tensor], Tensor] = lambda choice: choice,
        budgets: list[int | None] | None = None,
    ) -> SpeechEmbeddings:
        """Fuse.

        Args:
            speech: what a connector gave; a merged position has no label.
            seconds: duration of each of the B audios.
            fusable: (B, P) positions that may be merged with a neighbour that may; None: all.
            cuts: (B, K) ascending times, in the units of ``centers``, padded with inf; nothing is merged across them
                (where interleaving goes from speech to text and back).
            agreed: makes a choice the same on all ranks that hold the LLM together.
            budgets: of each audio, instead of its own.
        """
        budgets = self.budgets(seconds) if budgets is None else budgets
        if all(budget is None for budget in budgets):
            return speech
        mask = frame_mask(speech.lengths, speech.embeddings.shape[1])
        may = mask if fusable is None else mask & fusable
        links = may[:, 1:] & may[:, :-1]
        if cuts is not None:
            stretch = torch.searchsorted(cuts, speech.centers.to(cuts.dtype).contiguous(), right=True)
            links &= stretch[:, 1:] == stretch[:, :-1]
        lengths = speech.lengths.tolist()
        rounds = plan(lengths, links.sum(1).tolist(), budgets)
        if not rounds:
            return speech
        left = Positions.of(speech, mask, links)
        for merges in rounds:
            lengths = [length - own for length, own in zip(lengths, merges, strict=True)]
            left = left.merged(merges, max(lengths), agreed)
        return replace(
            speech,
            embeddings=left.embeddings.to(speech.embeddings.dtype),
            lengths=left.lengths,
            centers=left.centers,
            content=left.content,
            labels=left.labels,
        )


def contents(speech: SpeechEmbeddings, mask: Tensor) -> Tensor:
    """(B, P) how much each position says: 1 - P(blank) where it is known, else its energy; 0 for padding."""
    content = speech.content
    if content is None:
        content = speech.embeddings.detach().float().square().mean(-1)
    return content.clamp_min(SMALLEST) * mask


def plan(lengths: list[int], links: list[int], budgets: list[int | None]) -> list[list[int]]:
    """Merges of each of B utterances in each round: at most half of its positions, and no more than it has links."""
    rows = []
    for length, left, budget in zip(lengths, links, budgets, strict=True):
        row = []
        while budget is not None and (merges := min(length - budget, length // 2, left)) > 0:
            row.append(merges)
            length, left = length - merges, left - merges
        rows.append(row)
    return [[row[i] if i < len(row) else 0 for row in rows] for i in range(max(map(len, rows)))]


@dataclass(frozen=True)
class Positions:
    """What is left between two rounds.

    Attributes:
        embeddings: (B, P, H), float32 at least.
        content: (B, P) how much each position says; 0 for padding.
        centers: (B, P) times.
        spans: (B, P) original positions in each one.
        lengths: (B,).
        links: (B, P - 1) whether a position may be merged with the next one.
        labels: (B, P) as those of :class:`SpeechEmbeddings`.
    """

    embeddings: Tensor
    content: Tensor
    centers: Tensor
    spans: Tensor
    lengths: Tensor
    links: Tensor
    labels: Tensor | None = None

    @classmethod
    def of(cls, speech: SpeechEmbeddings, mask: Tensor, links: Tensor) -> "Positions":
        content, embeddings = contents(speech, mask), speech.embeddings
        wide = torch.promote_types(embeddings.dtype, torch.float32)  # sums of many positions
        spans = mask.to(content.dtype)
        return cls(embeddings.to(wide), content, speech.centers, spans, speech.lengths, links, speech.labels)

    def _similarities(self) -> Tensor:
        """(B, P - 1) cosine of each position and the next one."""
        found = []
        for begin in range(0, self.links.shape[1], TOGETHER):
            part = nn.functional.normalize(self.embeddings[:, begin : begin + TOGETHER + 1].float(), dim=-1)
            found.append((part[:, 1:] * part[:, :-1]).sum(-1))
        return torch.cat(found, 1)

    def merged(self, merges: list[int], size: int, agreed: Callable[[Tensor], Tensor]) -> "Positions":
        """After merging the most similar neighbours, ``merges`` of each utterance; a chain becomes one position.

        ``size``: of the longest utterance that is left.
        """
        wanted = torch.tensor(merges, device=self.links.device)
        with torch.no_grad():
            similarity = self._similarities().masked_fill(~self.links, -torch.inf)
            order = agreed(similarity.argsort(dim=1, descending=True, stable=True))
            place = torch.arange(order.shape[1], device=order.device).expand_as(order)
            chosen = torch.empty_like(order).scatter_(1, order, place) < wanted[:, None]
            # Where each position goes; padding, which counts nothing, to the last place at most.
            target = nn.functional.pad((~chosen).long(), (1, 0)).cumsum(1).clamp_max(size - 1)

        rows = (target + size * torch.arange(len(target), device=target.device)[:, None]).flatten()

        def pooled(values: Tensor, weights: Tensor | None = None) -> Tensor:
            flat, sums = values.flatten(0, 1), values.new_zeros(len(values) * size, *values.shape[2:])
            for begin in range(0, len(flat), TOGETHER):
                part = flat[begin : begin + TOGETHER]
                if weights is not None:
                    part = part * weights.flatten()[begin : begin + TOGETHER, None].to(part.dtype)
                sums.index_add_(0, rows[begin : begin + TOGETHER], part)
            return sums.unflatten(0, (-1, size))

        content, spans = pooled(self.content), pooled(self.spans)
        weighted = pooled(self.embeddings, self.content)
        embeddings = weighted / content.clamp_min(SMALLEST)[..., None].to(weighted.dtype)
        centers = pooled(self.centers * self.spans) / spans.clamp_min(1)
        kept = (self.links & ~chosen).long()  # each of them joins what its two ends have become
        links = kept.new_zeros(len(kept), size).scatter_add(1, target[:, :-1], kept)[:, : size - 1] > 0
        labels = None
        if self.labels is not None:
            alone = pooled((self.spans > 0).long()) == 1
            labels = pooled(self.labels * (self.spans > 0)).masked_fill(~alone, NO_TOKEN)
        return Positions(embeddings, content, centers, spans, self.lengths - wanted, links, labels)
