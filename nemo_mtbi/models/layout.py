"""The LLM's input from pieces of text and speech: one index over their embeddings.

Letters: B examples, L positions (right-padded), N text tokens of the batch, M speech positions of the batch, R response
tokens, H LLM width.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nemo_mtbi.data.example import Piece
from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.io.transfer import all_to_device
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings


def build_inputs(
    pieces: list[list[Piece]],
    responses: list[list[int]],
    speech: SpeechEmbeddings,
    speech_seconds: list[float],
    frame_seconds: float,
    embed_tokens: nn.Module,
) -> tuple[Tensor, "BatchLayout"]:
    """Text and speech embeddings in order. -> inputs (B, L, H) in the LLM's dtype, right-padded, and the layout.

    Args:
        pieces, responses, speech_seconds, frame_seconds: see :func:`lay_out_batch`.
        speech: what the spans of the pieces are cut from.
        embed_tokens: of the LLM.
    """
    device = speech.embeddings.device
    places = torch.cat([speech.lengths[:, None].double(), speech.centers.double()], 1).tolist()  # one transfer
    lengths, centers = [int(row[0]) for row in places], [row[1:] for row in places]
    layout = lay_out_batch(pieces, responses, lengths, centers, speech_seconds, frame_seconds, device)
    text = embed_tokens(layout.text_ids)
    rows = torch.cat([text, speech.embeddings.flatten(0, 1).to(text.dtype)])
    # index_select: the backward of rows[index] is serial on CPUs.
    return rows.index_select(0, layout.index.flatten()).unflatten(0, layout.index.shape), layout


@dataclass(frozen=True)
class BatchLayout:
    """How to build the LLM's input from ``cat([embed(text_ids), speech])``, padding of the speech included.

    Attributes:
        text_ids: (N,) tokens to embed.
        index: (B, L) rows of ``cat([text (N, H), speech (M, H)])``; padding points at row 0.
        lengths: (B,) valid positions.
        row_lengths: the same numbers on the host.
        response_rows: (R,) positions of the flattened (B * L) hidden states that predict each response token.
        response_ids: (R,).
        response_counts: response tokens of each example.
        empty_spans: speech spans for which the connector had no position (their words are lost to the LLM).
    """

    text_ids: Tensor
    index: Tensor
    lengths: Tensor
    row_lengths: list[int]
    response_rows: Tensor
    response_ids: Tensor
    response_counts: list[int]
    empty_spans: int


def lay_out_batch(
    pieces: list[list[Piece]],
    responses: list[list[int]],
    speech_lengths: list[int],
    speech_centers: list[list[float]],
    speech_seconds: list[float],
    frame_seconds: float,
    device: torch.device | str = "cpu",
) -> BatchLayout:
    """Lay out the batch.

    Args:
        pieces: of each example's prompt.
        responses: response tokens of each example; the last one is predicted but never an input.
        speech_lengths: connector positions of each audio.
        speech_centers: time of each position in encoder frames, of each audio as many with the padding; the M speech
            rows are these, concatenated.
        speech_seconds: duration of each audio; a span that reaches it takes every position that is left.
        frame_seconds: duration of an encoder frame.
        device: where the tensors go.
    """
    offsets = [0]
    for centers in speech_centers:
        offsets.append(offsets[-1] + len(centers))
    text_ids: list[int] = []
    rows: list[list[int]] = []  # text: token position; speech: -1 - speech row
    audios = [
        Places(own[:length], seconds, frame_seconds)
        for own, length, seconds in zip(speech_centers, speech_lengths, speech_seconds, strict=True)
    ]
    empty = 0
    for example, response in zip(pieces, responses, strict=True):
        row: list[int] = []
        last = {piece.audio: piece for piece in example if isinstance(piece, SpeechSpan)}
        for piece in [*example, response[:-1]]:
            if isinstance(piece, SpeechSpan):
                chosen = audios[piece.audio].of(piece, whole=piece is last[piece.audio])
                empty += not chosen
                row += [-1 - offsets[piece.audio] - c for c in chosen]
            else:
                row += range(len(text_ids), len(text_ids) + len(piece))
                text_ids += piece
        rows.append(row)
    width = max(len(row) for row in rows)
    index = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        index[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    index = torch.where(index < 0, len(text_ids) - 1 - index, index)
    response_rows = [
        i * width + len(row) - len(response) + j
        for i, (row, response) in enumerate(zip(rows, responses, strict=True))
        for j in range(len(response))
    ]
    response_ids = [t for r in responses for t in r]
    row_lengths = [len(row) for row in rows]
    plans = [torch.tensor(p, dtype=torch.long) for p in (text_ids, row_lengths, response_rows, response_ids)]
    text, lengths, predicting, ids, index = all_to_device([*plans, index], torch.device(device))
    counts = [len(r) for r in responses]
    return BatchLayout(text, index, lengths, row_lengths, predicting, ids, counts, empty)


class Places:
    """The positions of an audio by time.

    Args:
        centers: of the positions, in encoder frames.
        audio_seconds: duration of the audio.
        frame_seconds: of an encoder frame.
    """

    def __init__(self, centers: list[float], audio_seconds: float, frame_seconds: float) -> None:
        times, self.seconds = (np.array(centers, np.float64) + 0.5) * frame_seconds, audio_seconds
        self.order = times.argsort(kind="stable")
        self.times = times[self.order]
        self.timed = int(np.searchsorted(self.times, math.inf))  # those after belong to the utterance as a whole

    def of(self, span: SpeechSpan, whole: bool) -> list[int]:
        """Positions whose center lies in a span, in their order (of two channels, one after the other).

        Spans that meet share no position, and together they skip none. ``whole``: the span takes the positions too that
        belong to the utterance as a whole (center inf).
        """
        begin = -math.inf if span.start_seconds <= 0 else span.start_seconds
        end = math.inf if span.end_seconds >= self.seconds else span.end_seconds
        first, last = np.searchsorted(self.times, [begin, end])
        chosen = self.order[first:last]
        if whole and last < len(self.order):
            chosen = np.concatenate([chosen, self.order[self.timed :]])
        return np.sort(chosen).tolist()
