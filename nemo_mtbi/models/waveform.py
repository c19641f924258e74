"""Waveform-level interleaving: each speech span becomes an audio of its own."""

from typing import Any

import torch

from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.models.assembly import Piece


def cut_speech_spans(
    pieces: list[list[Piece]], batch: dict[str, Any], sampling_rate: int
) -> tuple[list[list[Piece]], dict[str, Any], list[float]]:
    """Cut ``batch["audios"]`` (B, S) at the planned spans.

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
