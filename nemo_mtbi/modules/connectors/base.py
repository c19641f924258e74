"""Connectors from encoder frames to the LLM's embedding space; each plugs in as NeMo's ``modality_adapter``.

Letters: B utterances, T encoder frames, D encoder width, P output positions, H LLM width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.data.example import Example
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.transfer import to_device

NO_TOKEN = -1  # label of a position of a channel without tokens


@dataclass
class SpeechEmbeddings:
    """A connector's output.

    Attributes:
        embeddings: (B, P, H), zero-padded on the right.
        lengths: (B,) valid positions.
        centers: (B, P) time of each position in encoder frames; slices speech by word times. inf: it belongs to the
            utterance as a whole.
        ctc_log_probs: (B, P', V_ctc + 1) of a CTC connector, blank first; None otherwise.
        ctc_lengths: (B,) valid rows of ``ctc_log_probs``.
        nothing_heard: (B,) of a connector that writes text, whether it wrote none; None for others.
        labels: (B, P) the token (of a CTC connector: the CTC label) of each position; None for connectors without
            tokens, ``NO_TOKEN`` for positions of a channel without tokens.
        content: (B, P) how much each position says, the sum of its 1 - P(blank); None for connectors without CTC.
        words: (B,) written, of a connector that writes text; None for others.
    """

    embeddings: Tensor
    lengths: Tensor
    centers: Tensor
    ctc_log_probs: Tensor | None = None
    ctc_lengths: Tensor | None = None
    labels: Tensor | None = None
    content: Tensor | None = None
    nothing_heard: Tensor | None = None
    words: Tensor | None = None

    def rows(self, indices: list[int]) -> "SpeechEmbeddings":
        """Some of the utterances."""
        chosen = to_device(indices, self.lengths.device)
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return SpeechEmbeddings(**{name: None if value is None else value[chosen] for name, value in values})  # type: ignore[arg-type]


@dataclass
class Hypotheses:
    """Several readings of the same utterances by a connector that writes text.

    Attributes:
        tokens: S lists of the B utterances' tokens, in the connector's own vocabulary.
        speech: of each of the S lists, what the LLM would read.
    """

    tokens: list[list[list[int]]]
    speech: list[SpeechEmbeddings]

    def first_alike(self) -> list[list[int]]:
        """The number (S, B) of the first reading that has the same text."""
        return [
            [next(s for s, earlier in enumerate(self.tokens) if earlier[row] == own) for row, own in enumerate(reading)]
            for reading in self.tokens
        ]


def computed_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """Autocast's type where it is on, else ``own``."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own


class Connector(nn.Module):
    """Base class. ``connect`` is what we use; ``forward`` is NeMo's channel-first adapter contract."""

    subsampling_factor: int = 1
    emits_tokens = False  # see TokenConnector
    positions_per_second = 0.0  # beside the tokens, of a connector that emits them
    positions_per_window = 0  # of the encoder, likewise
    positions_per_audio = 0  # likewise: as many as ``opening`` comes to have
    window_seconds = math.inf  # longest audio that the encoder is given at once
    choice_group: Any = None  # process group that holds the LLM together (tensor parallelism)

    def agreed(self, choice: Tensor) -> Tensor:
        """A discrete choice (int64) of the connector: that of the first rank of ``choice_group``, on all of its ranks.

        Ranks compute the same up to rounding. A near tie that falls differently would give them sequences of different
        lengths, and their collectives would never meet.
        """
        if self.choice_group is not None:
            dist.broadcast(choice, dist.get_global_rank(self.choice_group, 0), self.choice_group)
        return choice

    def bind_language_model(self, tokenizer: Any, embed_tokens: nn.Module) -> None:
        """Take what depends on the LLM (its fast tokenizer, its embeddings).

        Not part of the checkpoint, called after a load.
        """

    @property
    def learns_transcripts(self) -> bool:
        """Whether the transcription loss trains anything here."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def learns_by_risk(self) -> bool:
        """Whether there is something that ``risk_loss`` trains."""
        return False

    @property
    def opening(self) -> list[int]:
        """Tokens that the LLM reads before every utterance."""
        return []

    def begin_imitation(self) -> None:
        """Called before the first step of an imitation stage in which CE or KL count."""

    def upgrade_state(self, state: dict[str, Any], prefix: str) -> None:
        """Bring weights of an earlier version into this one's form, in place; keys begin with ``prefix``."""

    def word_centers(self, speech: SpeechEmbeddings, examples: list[Example], frame_seconds: float) -> Tensor:
        """Times (B, P), in encoder frames, by which the positions are given to the words of the transcripts.

        Args:
            speech: what ``connect`` gave.
            examples: of the B utterances.
            frame_seconds: duration of an encoder frame.
        """
        return speech.centers

    def fusable(self, speech: SpeechEmbeddings) -> Tensor | None:
        """(B, P) positions that :class:`nemo_mtbi.modules.fusion.Fusion` may merge; None: all."""
        return None

    def transcript_tokens(self, transcripts: list[str], alone: list[bool] | None = None) -> int:
        """Target tokens of the transcripts, the count of :meth:`transcription_loss`; 0 without tokens.

        Args:
            transcripts: of utterances.
            alone: whether each is one window of the encoder; None: all are.
        """
        return 0

    def transcription_loss(
        self,
        speech: SpeechEmbeddings | None,
        features: Tensor,
        lengths: Tensor,
        transcripts: list[str],
        windows: Windows | None = None,
    ) -> tuple[Tensor, int]:
        """The connector's own loss on the transcripts (w_ctc), as a sum, and the number of target tokens.

        Args:
            speech: what the connector gave for these utterances, if it ran.
            features, lengths: as in ``connect``.
            transcripts: of the utterances.
            windows: whose rows these are; None: each its own utterance.

        Raises:
            ConfigError: the connector emits no tokens.
        """
        raise ConfigError(
            f"w_ctc > 0 (model.alignment_stage.w_ctc, model.imitation.w_ctc) needs a connector that emits tokens "
            f"(CTCCompressConnector, WhisperDecoderConnector, TwoChannelConnector); {type(self).__name__} does not. "
            "Set it to 0, or leave the alignment stage out: alignment_stage.enabled=false."
        )

    def hypotheses(
        self, features: Tensor, lengths: Tensor, count: int, temperature: float, starts: list[bool] | None = None
    ) -> Hypotheses:
        """The greedy reading of the utterances and ``count - 1`` sampled ones, without a graph.

        Only of connectors that write text; others are refused with the configuration.

        Args:
            features, lengths, starts: as in ``connect``.
            count: S.
            temperature: of the samples.
        """
        raise NotImplementedError

    def risk_loss(self, features: Tensor, lengths: Tensor, hypotheses: Hypotheses, risks: Tensor) -> Tensor:
        """Sum over the utterances of the expected risk (:mod:`nemo_mtbi.losses.risk`).

        Args:
            features, lengths: as in ``connect``.
            hypotheses: of the B utterances.
            risks: (B, S); equal ones teach nothing.
        """
        raise NotImplementedError

    def writing_key(self) -> str | None:
        """Identity of what a connector that writes text makes of given features, as long as no training changes it;
        None for others.
        """
        return None

    def transcribe(self, features: Tensor, lengths: Tensor, written: list[list[int]] | None = None) -> list[str] | None:
        """features (B, T, D), lengths (B,) -> what a connector that writes text heard; None for others.

        Args:
            written: the tokens of each row, where they are known.
        """
        return None

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        """features (B, T, D), lengths (B,) encoder frames -> :class:`SpeechEmbeddings`."""
        raise NotImplementedError

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """audio_signal (B, D, T), length (B,) -> (B, H, P), (B,)."""
        out = self.connect(audio_signal.transpose(1, 2), length)
        return out.embeddings.transpose(1, 2), out.lengths


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No dropout in here, with a graph or without; each submodule gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def frame_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size) bool, True where a position is valid."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def uniform_centers(positions: int, factor: int, like: Tensor) -> Tensor:
    """Centers (B, P), in input frames, of positions that each cover ``factor`` frames. like: (B, ...)."""
    centers = (torch.arange(positions, device=like.device) + 0.5) * factor - 0.5
    return centers.expand(like.shape[0], -1)


def mask_spans(features: Tensor, lengths: Tensor, count: int, longest: int) -> Tensor:
    """SpecAugment's time masks: zero ``count`` random spans of (B, T, D), each up to ``longest`` frames; at most half
    of an utterance can be lost."""
    keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    position = torch.arange(features.shape[1], device=features.device)
    limit = torch.minimum(lengths // (2 * max(1, count)), torch.full_like(lengths, longest))
    for _ in range(count):
        size = torch.rand(len(lengths), device=features.device) * (limit + 1)
        begin = torch.rand(len(lengths), device=features.device) * (lengths - size).clamp_min(0)
        keep &= ~((position >= begin[:, None].floor()) & (position < (begin + size.floor())[:, None].floor()))
    return features * keep[..., None]
