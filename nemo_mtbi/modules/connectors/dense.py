"""Connectors whose positions are stretches of time: frames stacked or convolved, then projected to the LLM's width.

Letters: B utterances, T encoder frames, D encoder width, P output positions, H LLM width.
"""

from torch import Tensor, nn

from nemo_mtbi.modules.connectors.base import Connector, SpeechEmbeddings, frame_mask, uniform_centers
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler


def normalized(features: Tensor, layers: int) -> Tensor:
    """(B, T, D) of several encoder layers side by side, each with mean 0 and variance 1 at every frame.

    A Whisper's last layer is three to four times as large as the lower ones, which know the voice. One layer stays as
    it is.
    """
    return features if layers == 1 else each_normalized(features, layers)


def each_normalized(features: Tensor, layers: int) -> Tensor:
    """:func:`normalized` of one layer too."""
    each = features.unflatten(-1, (layers, -1))
    return nn.functional.layer_norm(each, each.shape[-1:]).flatten(-2)


class StackMLPConnector(Connector):
    """Stack ``factor`` frames, then a two-layer MLP (as SLAM-ASR and Ultravox).

    Args:
        feat_in: D, encoder width.
        output_dim: H, LLM width.
        factor: frames stacked into one position.
        hidden_dim: width of the MLP.
        encoder_layers: K of them side by side in D (``perception.encoder_taps``), each normalized.
    """

    def __init__(
        self, feat_in: int, output_dim: int, factor: int = 5, hidden_dim: int = 2048, encoder_layers: int = 1
    ) -> None:
        super().__init__()
        self.encoder_layers = encoder_layers
        self.subsampling_factor = factor
        self.norm = nn.LayerNorm(feat_in * factor)
        self.mlp = nn.Sequential(nn.Linear(feat_in * factor, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim))

    def connect(self, features: Tensor, lengths: Tensor) -> SpeechEmbeddings:
        batch, frames, width = features.shape
        features = normalized(features, self.encoder_layers) * frame_mask(lengths, frames)[..., None]
        padding = -frames % self.subsampling_factor
        stacked = nn.functional.pad(features, (0, 0, 0, padding)).reshape(batch, -1, width * self.subsampling_factor)
        embeddings = self.mlp(self.norm(stacked))
        lengths = (lengths + self.subsampling_factor - 1) // self.subsampling_factor
        return SpeechEmbeddings(
            embeddings * frame_mask(lengths, embeddings.shape[1])[..., None],
            lengths,
            uniform_centers(embeddings.shape[1], self.subsampling_factor, embeddings),
        )


class ConvBottleneckConnector(Connector):
    """Three strided convolutions and a residual bottleneck, as BLSP (arXiv 2309.00916).

    Args:
        feat_in: D, encoder width.
        output_dim: H, LLM width.
        layers: strided convolutions; 2^layers fewer positions.
        bottleneck_dim: width of the bottleneck.
        encoder_layers: K of them side by side in D (``perception.encoder_taps``), each normalized.
    """

    def __init__(
        self, feat_in: int, output_dim: int, layers: int = 3, bottleneck_dim: int = 512, encoder_layers: int = 1
    ) -> None:
        super().__init__()
        self.encoder_layers = encoder_layers
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
        hidden, lengths = self.subsample(normalized(features, self.encoder_layers), lengths)
        hidden = self.project(hidden)
        hidden = self.norm(hidden + self.bottleneck(hidden))
        return SpeechEmbeddings(
            hidden * frame_mask(lengths, hidden.shape[1])[..., None],
            lengths,
            self.subsample.centers(hidden.shape[1], hidden),
        )
