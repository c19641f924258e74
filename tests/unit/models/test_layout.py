"""The LLM's input from pieces of text and speech."""

import pytest

from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.models.layout import lay_out_batch

pytestmark = pytest.mark.unit


def test_positions_are_partitioned_by_adjacent_spans():
    centers = [i * 4 + 1.5 for i in range(30)]
    cuts = [0.0, 0.41, 0.42, 1.7, 2.4]
    pieces = [[SpeechSpan(0, a, b)] for a, b in zip(cuts, cuts[1:], strict=False)]
    together = [p for piece in pieces for p in piece]
    layout = lay_out_batch([together], [[7]], [30], [centers], [2.4], 0.02)
    assert layout.index[0].tolist() == list(range(30))
    assert layout.response_rows.tolist() == [29] and layout.response_ids.tolist() == [7]
