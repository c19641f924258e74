"""Strided convolutions that shorten the encoder's frames."""

import torch
from torch import Tensor, nn

from nemo_mtbi.modules.connectors.base import frame_mask


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

    def centers(self, positions: int, like: Tensor) -> Tensor:
        """Times (B, P) of positions, in frames, as :class:`SpeechEmbeddings` has them; like: (B, ...).

        Position i looks at frames around frame 2^layers i, whose middle is at that many frame durations (Whisper's
        first frame is centered at 0 s); a time is the number of a frame whose middle is half a frame later.
        """
        centers = torch.arange(positions, device=like.device) * self.factor - 0.5
        return centers.expand(like.shape[0], -1)
