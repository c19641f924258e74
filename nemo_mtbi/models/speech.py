"""Audio to what the LLM reads of it: frozen encoder, connector, and the times by which words are cut out.

Letters: B utterances, S samples, T encoder frames, D encoder width, P connector positions, H LLM width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.data.example import Example, Piece
from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.modules.causal_lm import is_frozen
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings, uniform_centers
from nemo_mtbi.modules.connectors.token import TokenConnector
from nemo_mtbi.modules.perception import connector_of, encoder_frame_seconds


@dataclass
class SpeechInput:
    """The speech of a batch, ready to be laid out.

    Attributes:
        pieces: of each example; their spans name rows of ``embeddings``.
        embeddings: the connector's output.
        seconds: duration of each row's audio.
    """

    pieces: list[list[Piece]]
    embeddings: SpeechEmbeddings
    seconds: list[float]


def speech_input(perception: Any, batch: dict[str, Any], pieces: list[list[Piece]], level: str | None) -> SpeechInput:
    """Encode and connect the speech of a batch.

    Args:
        perception: encoder and connector.
        batch: of :class:`nemo_mtbi.data.dataset.MTBIDataset`; it keeps the features of whole utterances.
        pieces: of each example.
        level: of the interleaving (``embedding`` or ``waveform``); None for pure speech.

    Raises:
        ConfigError: ``waveform`` with cached features.
    """
    examples: list[Example] = batch["examples"]
    seconds, starts = [e.duration_seconds for e in examples], None
    if level == "waveform":
        if "encoder_features" in batch:
            raise ConfigError("interleaving.level=waveform encodes pieces of the audio; set cached_features=false.")
        starts = [p.start_seconds <= 0 for row in pieces for p in row if isinstance(p, SpeechSpan)] or None
        pieces, batch, seconds = cut_speech_spans(pieces, batch, perception.preprocessor.featurizer.sample_rate)
    embeddings = connect(perception, *batch_features(perception, batch), starts)
    connector = connector_of(perception)
    if level == "embedding" and connector is not None:
        embeddings.centers = connector.word_centers(embeddings, examples, encoder_frame_seconds(perception))
    return SpeechInput(pieces, fused(perception, embeddings, seconds), seconds)


def batch_features(perception: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Encoder features (B, T, D) and lengths (B,); the batch keeps them, if it does not bring them from the cache."""
    if "encoder_features" not in batch:
        features = encode(perception, batch["audios"], batch["audio_lens"])
        batch["encoder_features"], batch["encoder_feature_lens"] = features
    return batch["encoder_features"], batch["encoder_feature_lens"]


def encode(perception: Any, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Preprocessor and encoder, without a graph if the encoder is frozen.

    Args:
        audios: (B, S) at the preprocessor's sampling rate, zero-padded.
        audio_lens: (B,) samples.

    Returns:
        Features (B, T, D) and their lengths (B,).
    """
    frozen = is_frozen(perception.encoder)
    if frozen:
        perception.encoder.eval()
    with torch.no_grad() if frozen else torch.enable_grad():
        mel, mel_lens = perception.preprocessor(input_signal=audios, length=audio_lens)
        if perception.spec_augmentation is not None and perception.training:
            mel = perception.spec_augmentation(input_spec=mel, length=mel_lens)
        dtype = next(perception.encoder.parameters()).dtype
        features, lengths = perception.encoder(audio_signal=mel.to(dtype), length=mel_lens)
    return features.transpose(1, 2), lengths


def connect(perception: Any, features: Tensor, lengths: Tensor, starts: list[bool] | None = None) -> SpeechEmbeddings:
    """Connector. features (B, T, D), lengths (B,) -> :class:`SpeechEmbeddings` in the connector's precision.

    Args:
        starts: whether each row begins its utterance (token connectors).
    """
    features = connector_dtype(perception, features)
    connector = connector_of(perception)
    if isinstance(connector, TokenConnector):
        return connector.connect(features, lengths, starts)
    if connector is not None:
        return connector.connect(features, lengths)
    encoded, counts = perception.modality_adapter(audio_signal=features.transpose(1, 2), length=lengths)
    embeddings = perception.proj(encoded.transpose(1, 2))
    factor = round(features.shape[1] / embeddings.shape[1])
    return SpeechEmbeddings(embeddings, counts, uniform_centers(embeddings.shape[1], factor, embeddings))


def fused(perception: Any, speech: SpeechEmbeddings, seconds: list[float]) -> SpeechEmbeddings:
    """What a connector gave for audios of ``seconds``, within the budget of ``perception.fusion``."""
    fusion, connector = getattr(perception, "fusion", None), connector_of(perception)
    if fusion is None or connector is None:
        return speech
    return fusion(speech, seconds, connector.fusable(speech), connector.agreed)


@torch.no_grad()
def transcribe(perception: Any, features: Tensor, lengths: Tensor) -> list[str] | None:
    """features (B, T, D), lengths (B,) -> what the connector itself writes; None for connectors without text."""
    connector = connector_of(perception)
    return None if connector is None else connector.transcribe(connector_dtype(perception, features), lengths)


def connector_dtype(perception: Any, features: Tensor) -> Tensor:
    """Features in the connector's precision."""
    trained = [*perception.modality_adapter.parameters(), *perception.proj.parameters()]
    return features.to(trained[0].dtype if trained else torch.float32)


def cut_speech_spans(
    pieces: list[list[Piece]], batch: dict[str, Any], sampling_rate: int
) -> tuple[list[list[Piece]], dict[str, Any], list[float]]:
    """Waveform-level interleaving: cut ``batch["audios"]`` (B, S) at the planned spans, each an audio of its own.

    Returns:
        Pieces whose spans name the new audios as a whole, a batch with those audios, and their durations in seconds.
    """
    audios, lengths = batch["audios"], batch["audio_lens"].tolist()
    parts: list[torch.Tensor] = []
    result: list[list[Piece]] = []
    for example in pieces:
        row: list[Piece] = []
        for piece in example:
            if isinstance(piece, SpeechSpan):
                begin = round(piece.start_seconds * sampling_rate)
                end = min(lengths[piece.audio], round(piece.end_seconds * sampling_rate))
                part = audios[piece.audio, begin : max(end, begin + 1)]
                row.append(SpeechSpan(len(parts), 0.0, len(part) / sampling_rate))
                parts.append(part)
            else:
                row.append(piece)
        result.append(row)
    if not parts:  # everything is text; the encoder still needs an input, which nothing refers to
        parts = [audios[0, : lengths[0]]]
    cut = {
        **batch,
        "audios": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
        "audio_lens": torch.tensor([len(p) for p in parts], device=audios.device),
    }
    return result, cut, [len(p) / sampling_rate for p in parts]
