"""Audio to what the LLM reads of it: frozen encoder, connector, and the times by which words are cut out.

Audio beyond the encoder's window (30 s) is cut where it is quiet. Its windows are rows of their own for encoder and
connector, in training as in use; their positions are then joined.

Letters: B utterances, N windows of them (B where none is long), S samples, T encoder frames, D encoder width, P
connector positions, H LLM width.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.data.audio_windows import Windows, audio_windows
from nemo_mtbi.data.example import Example, Piece
from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.text import in_one
from nemo_mtbi.modules.causal_lm import is_frozen
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings, uniform_centers
from nemo_mtbi.modules.connectors.token import TokenConnector
from nemo_mtbi.modules.connectors.windows import whole_utterances
from nemo_mtbi.modules.perception import connector_of, encoder_frame_seconds, window_samples


@dataclass
class SpeechInput:
    """The speech of a batch, ready to be laid out.

    Attributes:
        pieces: of each example; their spans name rows of ``embeddings``.
        embeddings: the connector's output, fused where there is a budget.
        seconds: duration of each row's audio.
        unfused: the connector's output.
    """

    pieces: list[list[Piece]]
    embeddings: SpeechEmbeddings
    seconds: list[float]
    unfused: SpeechEmbeddings


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
    embeddings = connect(perception, *batch_features(perception, batch), starts=starts)
    connector = connector_of(perception)
    if level == "embedding" and connector is not None:
        embeddings.centers = connector.word_centers(embeddings, examples, encoder_frame_seconds(perception))
    cuts = span_cuts(pieces, seconds, encoder_frame_seconds(perception)) if level == "embedding" else None
    budgets = None if starts is None else shared_budgets(perception, examples, pieces)
    return SpeechInput(pieces, fused(perception, embeddings, seconds, cuts, budgets), seconds, embeddings)


def shared_budgets(perception: Any, examples: list[Example], pieces: list[list[Piece]]) -> list[int | None] | None:
    """The budget of each utterance for its pieces that are audios of their own, by their durations."""
    if (fusion := getattr(perception, "fusion", None)) is None:
        return None
    whole = [e.duration_seconds for e in examples]
    return [
        None if budget is None else max(1, round(budget * piece.end_seconds / seconds))
        for row, budget, seconds in zip(pieces, fusion.budgets(whole), whole, strict=True)
        for piece in row
        if isinstance(piece, SpeechSpan)
    ]


def span_cuts(pieces: list[list[Piece]], seconds: list[float], frame_seconds: float) -> list[list[float]]:
    """Where the speech of each audio is cut for interleaving, as positions' times in encoder frames, ascending."""
    places: list[set[float]] = [set() for _ in seconds]
    for span in (piece for row in pieces for piece in row if isinstance(piece, SpeechSpan)):
        inner = {p for p in (span.start_seconds, span.end_seconds) if 0 < p < seconds[span.audio]}
        places[span.audio] |= inner
    return [frame_times(sorted(own), frame_seconds) for own in places]


def frame_times(seconds: Iterable[float], frame_seconds: float) -> list[float]:
    """Seconds in the units of ``SpeechEmbeddings.centers``, where a frame's number is its middle."""
    return [second / frame_seconds - 0.5 for second in seconds]


def batch_features(
    perception: Any, batch: dict[str, Any]
) -> tuple[Tensor, Tensor, Windows | None, list[list[int]] | None]:
    """Encoder features (N, T, D), lengths (N,), whose windows they are (None: of one utterance each), and what the
    connector's recognizer writes of them, where that is known.

    The batch keeps them, if it does not bring them from the cache.
    """
    if "encoder_features" not in batch:
        audios, lengths, batch["windows"] = cut_windows(perception, batch["audios"], batch["audio_lens"])
        batch["encoder_features"], batch["encoder_feature_lens"] = encode(perception, audios, lengths)
    return batch["encoder_features"], batch["encoder_feature_lens"], batch.get("windows"), batch.get("written")


def first_examples(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """A batch of the first ``count`` examples, without what a teacher gave for them."""
    windows: Windows | None = batch.get("windows")
    rows = count if windows is None else sum(owner < count for owner in windows.owners)
    few = {k: v[:count] for k, v in batch.items() if k in ("examples", "audios", "audio_lens")}
    few |= {k: v[:rows] for k, v in batch.items() if k in ("encoder_features", "encoder_feature_lens", "written")}
    if windows is not None:
        few["windows"] = Windows(windows.owners[:rows], windows.begins[:rows])
    return few


def cut_windows(perception: Any, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor, Windows | None]:
    """audios (B, S), audio_lens (B,) -> windows (N, S'), their samples (N,), and whose they are."""
    rate, longest, frame = window_samples(perception)
    if audios.shape[1] <= longest:
        return audios, audio_lens, None
    parts, begins = [], []
    for row, length in zip(audios, audio_lens.tolist(), strict=True):
        windows = list(audio_windows([row[:length].cpu().numpy()], rate, longest, frame))
        begins.append([window.begin // frame for window in windows])
        parts += [row[window.begin : window.begin + len(window.samples)] for window in windows]
    sizes = torch.tensor([len(part) for part in parts], device=audios.device)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), sizes, Windows.of(begins)


def encode(perception: Any, audios: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Preprocessor and encoder, without a graph if the encoder is frozen.

    Args:
        audios: (N, S) at the preprocessor's sampling rate, zero-padded, none beyond ``perception.window_seconds``.
        audio_lens: (N,) samples.

    Returns:
        Features (N, T, D) and their lengths (N,).
    """
    frozen = is_frozen(perception.encoder)
    if frozen:
        perception.encoder.eval()
    with torch.no_grad() if frozen else nullcontext():
        if getattr(perception.preprocessor, "takes_lengths_on_cpu", False):
            audio_lens = audio_lens.cpu()  # once for both
        mel, mel_lens = perception.preprocessor(input_signal=audios, length=audio_lens)
        if perception.spec_augmentation is not None and perception.training:
            mel = perception.spec_augmentation(input_spec=mel, length=mel_lens.to(mel.device))
        dtype = next(perception.encoder.parameters()).dtype
        features, lengths = perception.encoder(audio_signal=mel.to(dtype), length=mel_lens)
    return features.transpose(1, 2), lengths


def connect(
    perception: Any,
    features: Tensor,
    lengths: Tensor,
    windows: Windows | None = None,
    written: list[list[int]] | None = None,
    starts: list[bool] | None = None,
) -> SpeechEmbeddings:
    """Connector. features (N, T, D), lengths (N,) -> :class:`SpeechEmbeddings` of B utterances in the connector's
    precision.

    Args:
        windows: whose windows the rows are; None: each its own utterance.
        written: of each row, as for :meth:`TokenConnector.connect`.
        starts: whether each of the B begins its utterance (token connectors); None: all do.
    """
    speech = connect_windows(perception, features, lengths, windows_start(windows, starts), written)
    return whole_utterances(speech, windows)


def windows_start(windows: Windows | None, starts: list[bool] | None = None) -> list[bool] | None:
    """Whether each of N windows begins its utterance, where ``starts`` says it of the first one of each of the B."""
    if windows is None:
        return starts
    rows = zip(windows.owners, windows.starts, strict=True)
    return [start and (starts is None or starts[owner]) for owner, start in rows]


def connect_windows(
    perception: Any,
    features: Tensor,
    lengths: Tensor,
    starts: list[bool] | None = None,
    written: list[list[int]] | None = None,
) -> SpeechEmbeddings:
    """:func:`connect` of N windows, each on its own."""
    features = connector_dtype(perception, features)
    connector = connector_of(perception)
    if isinstance(connector, TokenConnector):
        return connector.connect(features, lengths, starts, written)
    if connector is not None:
        return connector.connect(features, lengths)
    encoded, counts = perception.modality_adapter(audio_signal=features.transpose(1, 2), length=lengths)
    embeddings = perception.proj(encoded.transpose(1, 2))
    factor = round(features.shape[1] / embeddings.shape[1])
    return SpeechEmbeddings(embeddings, counts, uniform_centers(embeddings.shape[1], factor, embeddings))


def fused(
    perception: Any,
    speech: SpeechEmbeddings,
    seconds: list[float],
    cuts: list[list[float]] | None = None,
    budgets: list[int | None] | None = None,
) -> SpeechEmbeddings:
    """What a connector gave for audios of ``seconds``, within the budget of ``perception.fusion``.

    Args:
        cuts: of :func:`span_cuts`; nothing is merged across them.
        budgets: of each audio, instead of its own.
    """
    fusion, connector = getattr(perception, "fusion", None), connector_of(perception)
    if fusion is None or connector is None:
        return speech
    times = None
    if cuts is not None and any(cuts):
        width = max(map(len, cuts))
        times = torch.tensor([own + [torch.inf] * (width - len(own)) for own in cuts], dtype=torch.float64)
        times = times.to(speech.centers.device)
    return fusion(speech, seconds, connector.fusable(speech), times, connector.agreed, budgets)


@torch.no_grad()
def transcribe(
    perception: Any,
    features: Tensor,
    lengths: Tensor,
    windows: Windows | None = None,
    written: list[list[int]] | None = None,
) -> list[str] | None:
    """features (N, T, D), lengths (N,) -> what the connector itself writes of B utterances; None for connectors without
    text.
    """
    connector = connector_of(perception)
    texts = None if connector is None else connector.transcribe(connector_dtype(perception, features), lengths, written)
    if texts is None or windows is None:
        return texts
    own: list[list[str]] = [[] for _ in windows.firsts]
    for owner, text in zip(windows.owners, texts, strict=True):
        own[owner] += [text] * bool(text)
    return [in_one(parts) for parts in own]


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
        **{k: v for k, v in batch.items() if k != "windows"},
        "audios": torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
        "audio_lens": torch.tensor([len(p) for p in parts], device=audios.device),
    }
    return result, cut, [len(p) / sampling_rate for p in parts]
