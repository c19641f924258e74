"""What the LLM reads of a voice beside the words: a stream of positions, or a text whose words the voice chooses.

Letters: B utterances or windows, T encoder frames, K encoder layers, D their width, P output positions, H LLM width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, computed_dtype, frame_mask
from nemo_mtbi.modules.connectors.dense import each_normalized
from nemo_mtbi.modules.connectors.running import SMALLEST_DEVIATION, Influence, Standardization
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler
from nemo_mtbi.modules.connectors.wordings import Wordings

WHOLE = torch.inf  # center of a position that belongs to its utterance as a whole
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
    ) -> SpeechEmbeddings:
        """What the LLM reads.

        Args:
            features: (B, T, K D).
            lengths: (B,) frames.
            written: (B, 2) tokens and words of the text channel.
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
        self.influence = Influence(len(choices))

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        written: Tensor,
        scale: Tensor,
        embed_tokens: Callable[[Tensor], Tensor],
        agreed: Callable[[Tensor], Tensor] = torch.clone,
        only: bool = False,
    ) -> SpeechEmbeddings:
        """See :meth:`AcousticChannel.forward`.

        ``agreed`` makes a discrete choice that of all ranks that hold the LLM (:meth:`Connector.agreed`); ``only`` the
        most likely alternatives are read, in training too, and :meth:`risk_loss` trains them.
        """
        logits = self.logits(features, lengths, written)
        shares = self.shares(logits.detach() if only else logits, agreed)
        return self.written_out(shares, scale, embed_tokens)

    def written_out(self, shares: Tensor, scale: Tensor, embed_tokens: Callable[[Tensor], Tensor]) -> SpeechEmbeddings:
        """The text with ``shares`` (B, choices, most alternatives) of its alternatives; see :meth:`forward`."""
        chosen = shares.flatten(1)
        tokens, positions, places = self.prompt.unbind(1)
        weights = torch.cat([chosen, torch.ones_like(chosen[:, :1])], 1)[:, places]
        words = embed_tokens(tokens)
        embeddings = (self.offset.float() * scale).expand(len(weights), -1, -1)
        embeddings = embeddings.index_add(1, positions, weights[..., None] * words.float())
        embeddings = embeddings.to(computed_dtype(words.device, self.project.weight.dtype))
        centers = torch.full(embeddings.shape[:2], WHOLE, device=embeddings.device)
        lengths = torch.full(embeddings.shape[:1], embeddings.shape[1], device=embeddings.device)
        return SpeechEmbeddings(embeddings, lengths, centers)

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

        Its probability while it is trained by a gradient through it, else 1 for the most likely one.
        """
        if not (self.training and logits.requires_grad):
            return self.only(agreed(logits.detach().argmax(-1)))
        own = logits.masked_fill(self.impossible, 0.0)
        apart = (own - (own * self.even).sum(-1, keepdim=True)) * self.even
        return logits.detach().softmax(-1) + (apart - apart.detach())

    @property
    def sizes(self) -> Tensor:
        """Number of alternatives of each choice."""
        return (~self.impossible).sum(-1)

    @property
    def learns(self) -> bool:
        """Whether its choices are trained."""
        return any(p.requires_grad for part in (self.hidden, self.tempo, self.project) for p in part.parameters())

    def only(self, choices: Tensor) -> Tensor:
        """Alternatives (B, choices) as shares of 1 and 0."""
        shape = (len(choices), *self.impossible.shape)
        return torch.zeros(shape, device=choices.device).scatter_(-1, choices[..., None], 1.0)

    @torch.no_grad()
    def neighbours(self, logits: Tensor, count: int, tasks: Tensor) -> Tensor:
        """The most likely alternatives, and ``count - 1`` times those with one other choice: (S, B, choices).

        The other choice is drawn by the influence that it has had on the answers to such ``tasks`` (B,) (systematic
        sampling: with equal influences, all have their turn). Where it is the same one again, its alternatives take
        turns.
        """
        best, drawn = logits.argmax(-1), count - 1
        chances = self.influence.chances(tasks)
        points = (torch.rand_like(chances[:, :1]) + torch.arange(drawn, device=best.device)) / drawn
        choice = torch.searchsorted(chances.cumsum(-1), points, right=True).clamp_max(best.shape[1] - 1)
        others = self.sizes - 1
        begin = (torch.rand_like(chances) * others).long().minimum(others - 1)
        again = torch.arange(drawn, device=best.device) - torch.searchsorted(choice, choice)  # they are in order
        step = 1 + (begin.gather(1, choice) + again) % others[choice]
        other = (best.gather(1, choice) + step) % self.sizes[choice]
        found = best.expand(drawn, -1, -1).scatter(-1, choice.t()[..., None], other.t()[..., None])
        return torch.cat([best[None], found])

    def risk_loss(self, logits: Tensor, choices: Tensor, risks: Tensor, tasks: Tensor, copies: int = 1) -> Tensor:
        """Sum over rows of the risk of what is most likely, with a gradient that lowers it.

        Of alternatives a (most likely) and b of a choice, all others being equal, the one with the lower risk is right,
        and as important as the difference (cost-sensitive logistic loss, as of pairs in Herbrich et al. 2000)::

            sum_b  |risk_b - risk_a| log(1 + exp(-(z_better - z_worse)))

        which the drawn b, each over its chance, stand for. It is not weaker where a wrong choice is sure, and nothing
        moves a choice that the answer does not depend on, other than with the derivative of the loss by an embedding.

        The differences are added to the influence of the choices.

        Args:
            logits: z, (B, choices, most alternatives).
            choices: (S, B, choices) of :meth:`neighbours`.
            risks: (B, S); rows of equal ones teach nothing.
            tasks: (B,) of :meth:`neighbours`.
            copies: ranks that have the same rows.
        """
        changed = (choices[1:] != choices[0]).transpose(0, 1)  # (B, S - 1, choices), one of them
        values = logits.gather(-1, choices.permute(1, 2, 0)).transpose(1, 2)  # (B, S, choices)
        margins = torch.where(changed, values[:, 1:] - values[:, :1], 0.0).sum(-1)
        chances = self.influence.chances(tasks)[:, None] * changed.shape[1] / (self.sizes - 1)
        worse = (risks[:, 1:] - risks[:, :1]).float()
        weights = worse.abs() / torch.where(changed, chances, 0.0).sum(-1)
        loss = (weights * nn.functional.softplus(worse.sign() * margins)).sum()
        self.influence.add(tasks, changed, worse.abs(), copies)
        return loss + (risks[:, 0].float().sum() - loss).detach()

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
