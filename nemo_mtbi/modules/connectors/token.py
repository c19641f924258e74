"""Connectors whose positions are tokens rather than stretches of time.

Which word a position belongs to follows from the order of the tokens, not from their time: CTC is free to emit a
token earlier or later than it is spoken, and an attention decoder has no times. Slicing by word times would lose
words of a speech span or repeat words given as text.
"""

import difflib
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from nemo_mtbi.data.example import Example
from nemo_mtbi.io.transfer import to_device
from nemo_mtbi.modules.connectors.base import Connector, SpeechEmbeddings, frame_mask


class TokenConnector(Connector):
    """A connector that knows the LLM's tokenizer and embeddings, and can be taught transcripts
    (``transcription_loss``).
    """

    emits_tokens = True

    def connect(
        self,
        features: Tensor,
        lengths: Tensor,
        starts: list[bool] | None = None,
        written: list[list[int]] | None = None,
    ) -> SpeechEmbeddings:
        """See :meth:`Connector.connect`.

        Args:
            features, lengths: (B, T, D) and (B,) encoder frames.
            starts: whether each row begins its utterance; a row that does not is written after a space. None: all do.
            written: what a connector with a :meth:`Connector.writing_key` is known to write of each row; None: it
                writes now.
        """
        raise NotImplementedError

    def labels_of(self, tokens: Iterable[int]) -> list[int]:
        """``SpeechEmbeddings.labels`` that stand for LLM tokens."""
        raise NotImplementedError

    def word_centers(self, speech: SpeechEmbeddings, examples: list[Example], frame_seconds: float) -> Tensor:
        """Centers that put every position inside the unit that it belongs to by order."""
        assert speech.labels is not None
        placed = []
        labels = torch.cat([speech.lengths[:, None], speech.labels], 1).tolist()  # one transfer
        for example, (count, *emitted) in zip(examples, labels, strict=True):
            spoken = [self.labels_of(example.prompt_ids[u.token_begin : u.token_end]) for u in example.units]
            middles = [(u.start_seconds + u.end_seconds) / 2 / frame_seconds - 0.5 for u in example.units]
            units = units_by_order(emitted[:count], spoken)
            placed.append([middles[u] for u in units] + [0.0] * (len(emitted) - count))
        centers = to_device(placed, speech.centers.device, torch.float64).to(speech.centers.dtype)
        return torch.where(frame_mask(speech.lengths, centers.shape[1]), centers, speech.centers)


def units_by_order(emitted: list[int], spoken: list[list[int]]) -> list[int]:
    """Unit of each emitted label, non-decreasing.

    Args:
        emitted: labels in order.
        spoken: labels of each unit's transcript.

    Emitted and spoken labels are aligned as sequences. A position that matches nothing (an error of the recognizer)
    goes with the match before it, or, at a boundary, between two matches in proportion.
    """
    flat = [(c, unit) for unit, labels in enumerate(spoken) for c in labels]
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
