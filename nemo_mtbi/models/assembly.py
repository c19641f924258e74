"""From interleaving plans to one index over text and speech embeddings. No model in here.

Letters: B examples, L positions (right-padded), N text tokens of the batch, M speech positions of the batch, R response
tokens.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_mtbi.data.dataset import Example
from nemo_mtbi.data.interleaving import InterleavingPolicy, SpeechSpan, merge

Piece = list[int] | SpeechSpan


@dataclass(frozen=True)
class Assembled:
    """How to build the LLM's input from ``cat([embed(text_ids), speech])``.

    Attributes:
        text_ids: (N,) tokens to embed.
        index: (B, L) rows of ``cat([text (N, H), speech (M, H)])``; padding points at row 0.
        lengths: (B,) valid positions.
        response_rows: (R,) positions of the flattened (B * L) hidden states that predict each response token.
        response_ids: (R,).
        response_counts: response tokens of each example.
        empty_spans: speech spans for which the connector had no position (their words are lost to the LLM).
    """

    text_ids: Tensor
    index: Tensor
    lengths: Tensor
    response_rows: Tensor
    response_ids: Tensor
    response_counts: list[int]
    empty_spans: int


def prompt_pieces(example: Example, audio: int, plan: list[bool]) -> list[Piece]:
    """The prompt with its utterance as planned: token lists and speech spans in order."""
    units, ids = example.units, example.prompt_ids
    pieces: list[Piece] = [ids[: units[0].token_begin]]
    for piece in merge(units, plan, audio):
        pieces.append(piece if isinstance(piece, SpeechSpan) else ids[piece[0] : piece[1]])
    pieces.append(ids[units[-1].token_end :])
    return pieces


def plan_batch(examples: list[Example], policy: InterleavingPolicy | None, step: int) -> list[list[Piece]]:
    """Pieces of every example; ``policy=None`` is pure speech. Example i speaks audio i."""
    pieces = []
    for index, example in enumerate(examples):
        plan = [False] * len(example.units)
        if policy is not None:
            plan = policy.plan(example.units, example.id, example.visit, step)
        pieces.append(prompt_pieces(example, index, plan))
    return pieces


def assemble(
    pieces: list[list[Piece]],
    responses: list[list[int]],
    speech_lengths: list[int],
    speech_centers: list[list[float]],
    speech_seconds: list[float],
    frame_seconds: float,
    device: torch.device | str = "cpu",
) -> Assembled:
    """Lay out the batch.

    Args:
        pieces: of each example's prompt.
        responses: response tokens of each example; the last one is predicted but never an input.
        speech_lengths: connector positions of each audio; the M speech rows are these, concatenated.
        speech_centers: time of each position in encoder frames.
        speech_seconds: duration of each audio; a span that reaches it takes every position that is left.
        frame_seconds: duration of an encoder frame.
        device: where the tensors go.
    """
    offsets = [0]
    for length in speech_lengths:
        offsets.append(offsets[-1] + length)
    text_ids: list[int] = []
    rows: list[list[int]] = []  # text: token position; speech: -1 - speech row
    empty = 0
    for example, response in zip(pieces, responses, strict=True):
        row: list[int] = []
        for piece in [*example, response[:-1]]:
            if isinstance(piece, SpeechSpan):
                a = piece.audio
                chosen = _positions(piece, speech_centers[a][: speech_lengths[a]], speech_seconds[a], frame_seconds)
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
    return Assembled(
        torch.tensor(text_ids, dtype=torch.long, device=device),
        index.to(device),
        torch.tensor([len(row) for row in rows], device=device),
        torch.tensor(response_rows, dtype=torch.long, device=device),
        torch.tensor([t for r in responses for t in r], dtype=torch.long, device=device),
        [len(r) for r in responses],
        empty,
    )


def _positions(span: SpeechSpan, centers: list[float], audio_seconds: float, frame_seconds: float) -> list[int]:
    """Positions whose center lies in the span. Spans that meet share no position, and together they skip none."""
    times = [(c + 0.5) * frame_seconds for c in centers]
    begin = 0 if span.start_seconds <= 0 else bisect_left(times, span.start_seconds)
    end = len(times) if span.end_seconds >= audio_seconds else bisect_left(times, span.end_seconds)
    return list(range(begin, end))
