"""Which word each position of a connector that emits tokens belongs to: by the order of the tokens, not by their time.

CTC is free to emit a token earlier or later than it is spoken, and a connector with global attention does; an attention
decoder has no times. Slicing positions by word times would lose words of a speech span or repeat words given as text.
"""

import difflib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nemo_mtbi.data.dataset import Example
from nemo_mtbi.modules.connectors import SpeechEmbeddings


def units_by_order(emitted: list[int], spoken: list[list[int]]) -> list[int]:
    """Unit of each emitted class, non-decreasing.

    Args:
        emitted: classes (or tokens) in order.
        spoken: classes of each unit's transcript.

    Emitted and spoken classes are aligned as sequences. A position that matches nothing (an error of the recognizer) goes
    with the match before it, or, at a boundary, between two matches in proportion.
    """
    flat = [(c, unit) for unit, classes in enumerate(spoken) for c in classes]
    matcher = difflib.SequenceMatcher(None, emitted, [c for c, _ in flat], autojunk=False)
    units: list[int | None] = [None] * len(emitted)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            units[block.a + offset] = flat[block.b + offset][1]
    known = [(i, u) for i, u in enumerate(units) if u is not None]
    anchors = [(-1, 0), *known, (len(emitted), len(spoken) - 1)]
    for (left, low), (right, high) in pairwise(anchors):
        for index in range(left + 1, right):
            units[index] = low + round((high - low) * (index - left) / (right - left))
    return [u for u in units if u is not None]


def centers_by_order(
    examples: list[Example],
    speech: SpeechEmbeddings,
    classes_of: Callable[[list[int]], list[int]],
    frame_seconds: float,
) -> Tensor:
    """Times (B, P), in encoder frames, that put every position inside the unit that it belongs to by order.

    Args:
        classes_of: the connector's (see :class:`Connector`).
    """
    assert speech.classes is not None
    centers = speech.centers.clone()
    for row, (example, count) in enumerate(zip(examples, speech.lengths.tolist(), strict=True)):
        spoken = [classes_of(example.prompt_ids[u.token_begin : u.token_end]) for u in example.units]
        middles = torch.tensor([(u.start_seconds + u.end_seconds) / 2 / frame_seconds - 0.5 for u in example.units])
        units = units_by_order(speech.classes[row, :count].tolist(), spoken)
        centers[row, :count] = middles[torch.tensor(units, dtype=torch.long)].to(centers)
    return centers
