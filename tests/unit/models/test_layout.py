"""The LLM's input from pieces of text and speech."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.io.transfer import all_to_device
from nemo_mtbi.models.layout import Places, lay_out_batch

pytestmark = pytest.mark.unit


def test_positions_are_partitioned_by_adjacent_spans():
    centers = [i * 4 + 1.5 for i in range(30)]
    cuts = [0.0, 0.41, 0.42, 1.7, 2.4]
    pieces = [[SpeechSpan(0, a, b)] for a, b in zip(cuts, cuts[1:], strict=False)]
    together = [p for piece in pieces for p in piece]
    layout = lay_out_batch([together], [[7]], [30], [centers], [2.4], 0.02)
    assert layout.index[0].tolist() == list(range(30))
    assert layout.response_rows.tolist() == [29] and layout.response_ids.tolist() == [7]


def test_spans_without_a_position_are_counted():
    """Their words are lost to the LLM."""
    centers, cuts = [10.0, 90.0], [0.0, 0.5, 1.0, 1.5, 2.0]
    pieces = [[SpeechSpan(0, a, b) for a, b in pairwise(cuts)], [[1], SpeechSpan(1, 0.0, 2.0)]]
    layout = lay_out_batch(pieces, [[7], [7]], [2, 0], [centers, centers], [2.0, 2.0], 0.02)
    assert layout.empty_spans == 3 and layout.row_lengths == [2, 1]


def test_positions_by_time_are_those_of_a_search():
    """Two channels one after the other, and positions of the utterance as a whole, which its last speech takes."""
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        first, second = (torch.rand(n, generator=g).sort()[0] * 100 for n in (7, 12))
        centers = [*first.tolist(), *second.tolist(), torch.inf, torch.inf]
        places = Places(centers, 2.0, 0.02)
        for _ in range(10):
            start, end = sorted((torch.rand(2, generator=g) * 2.2 - 0.1).tolist())
            for whole in (False, True):
                low, high = -torch.inf if start <= 0 else start, torch.inf if end >= 2.0 else end
                times = [(c + 0.5) * 0.02 for c in centers]
                expected = [i for i, t in enumerate(times) if (whole if t == torch.inf else low <= t < high)]
                assert places.of(SpeechSpan(0, start, end), whole) == expected


def test_a_layout_goes_to_its_device_in_one_transfer():
    class Transfers(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None
            return function(*args, **(kwargs or {}))

    tensors = [torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.long), torch.tensor([5])]
    with Transfers() as transfers:
        moved = all_to_device(tensors, torch.device("meta"))
    assert transfers.count == 1
    assert [(t.device.type, t.shape) for t in moved] == [("meta", t.shape) for t in tensors]
    assert all_to_device(tensors, torch.device("cpu")) is tensors
