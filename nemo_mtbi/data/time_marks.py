"""The time as text before stretches of speech (``[00:30]``), so that answers can say when. Pure functions."""

import math
from collections.abc import Callable
from typing import Any

from nemo_mtbi.data.example import Piece
from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.errors import ConfigError


def require_time_marks(every: Any) -> None:
    """
    Raises:
        ConfigError: neither None nor a number of at least 1.
    """
    if every is not None and not (type(every) in (int, float) and every >= 1):
        raise ConfigError(f"time_marks={every}: give seconds, at least 1.")


def clock(seconds: int) -> str:
    """Minutes and seconds, ``01:30``."""
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def marks(seconds: float, every: float) -> list[float]:
    """Where time marks stand in an audio: at its beginning and at every multiple of ``every`` seconds within it."""
    return [index * every for index in range(max(1, math.ceil(seconds / every - 1e-6)))]


def with_time_marks(
    pieces: list[list[Piece]], seconds: list[float], every: float, encode_text: Callable[[str], list[int]]
) -> list[list[Piece]]:
    """Spans of whole audios as stretches of ``every`` seconds, each after the time at which it begins, as text.

    Args:
        pieces: of dialogs.
        seconds: of the audios.
        every: seconds of a stretch.
        encode_text: tokens of literal text.
    """
    result: list[list[Piece]] = []
    for row in pieces:
        own: list[Piece] = []
        for piece in row:
            if not isinstance(piece, SpeechSpan):
                own.append(piece)
                continue
            begins = marks(seconds[piece.audio], every)
            for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
                own += [encode_text(f"\n[{clock(int(begin))}] "), SpeechSpan(piece.audio, begin, end)]
        result.append(own)
    return result
