"""What a connector gave for the windows of longer utterances, as whole utterances again.

Letters: N windows, B utterances, P positions of a window, H LLM width.
"""

from dataclasses import fields

import torch
from torch import Tensor, nn

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.io.transfer import to_device
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, frame_mask


def whole_utterances(speech: SpeechEmbeddings, windows: Windows | None) -> SpeechEmbeddings:
    """What a connector gave for N windows as the positions of B utterances, in order.

    The text for "nothing heard" stands once, and only in an utterance of which no window says anything.
    """
    if windows is None:
        return speech
    device = speech.embeddings.device
    owners = to_device(windows.owners, device, torch.long)
    count, size = len(windows.firsts), speech.embeddings.shape[1]
    kept, nothing = frame_mask(speech.lengths, size), speech.nothing_heard
    if nothing is not None:
        heard = torch.zeros(count, dtype=torch.long, device=device).index_add(0, owners, (~nothing).long())
        nothing = heard == 0
        later = to_device([not start for start in windows.starts], device)
        silent = speech.nothing_heard & (~nothing[owners] | later)  # type: ignore[operator]
        kept = kept & ~(silent[:, None] & (speech.labels != NO_TOKEN))
    begins = to_device(windows.begins, device)[:, None]
    # What belongs to a window as a whole: at its end, or with the utterance's last speech.
    following = [b if b > 0 else torch.inf for b in [*windows.begins[1:], 0]]
    ends = to_device(following, device, speech.centers.dtype)[:, None] - 1
    centers = torch.where(speech.centers.isinf(), ends, speech.centers + begins)
    lengths = _lengths(kept, owners, count)
    sizes = lengths.tolist()  # the only wait for the device
    order = _order(kept, sizes)
    result = SpeechEmbeddings(_joined(speech.embeddings, order, sizes), lengths, _joined(centers, order, sizes))
    if speech.labels is not None:
        result.labels = _joined(speech.labels, order, sizes)
    if speech.content is not None:
        result.content = _joined(speech.content, order, sizes)
    if speech.ctc_log_probs is not None and speech.ctc_lengths is not None:
        result.ctc_log_probs, result.ctc_lengths = joined_rows(speech.ctc_log_probs, speech.ctc_lengths, windows)
    result.nothing_heard = nothing
    if speech.words is not None:
        result.words = speech.words.new_zeros(count).index_add(0, owners, speech.words)
    return result


def concatenated(parts: list[SpeechEmbeddings]) -> SpeechEmbeddings:
    """Rows of several outputs of a connector as one."""
    if len(parts) == 1:
        return parts[0]

    def rows(name: str) -> Tensor | None:
        own = [getattr(part, name) for part in parts]
        if any(values is None for values in own):
            return None
        if own[0].ndim == 1:
            return torch.cat(own)
        return nn.utils.rnn.pad_sequence([row for values in own for row in values], batch_first=True)

    return SpeechEmbeddings(**{field.name: rows(field.name) for field in fields(SpeechEmbeddings)})  # type: ignore[arg-type]


def joined_rows(values: Tensor, lengths: Tensor, windows: Windows | None) -> tuple[Tensor, Tensor]:
    """(N, P, ...) and (N,) of windows -> (B, P', ...) and (B,) of utterances."""
    if windows is None:
        return values, lengths
    kept = frame_mask(lengths, values.shape[1])
    whole = _lengths(kept, to_device(windows.owners, lengths.device, torch.long), len(windows.firsts))
    sizes = whole.tolist()
    return _joined(values, _order(kept, sizes), sizes), whole


def _lengths(kept: Tensor, owners: Tensor, count: int) -> Tensor:
    """(count,) kept positions of each owner, where (N, P) are kept and (N,) own the windows."""
    numbers = kept.sum(1)
    return numbers.new_zeros(count).index_add(0, owners, numbers)


def _order(kept: Tensor, sizes: list[int]) -> Tensor:
    """Which of the (N P) positions are kept, in their order; ``sizes`` say how many."""
    return (~kept.flatten()).byte().argsort(stable=True)[: sum(sizes)]


def _joined(values: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
    """Positions ``order`` of (N, P, ...) one after the other for each owner of ``sizes``, zero-padded."""
    return nn.utils.rnn.pad_sequence(values.flatten(0, 1)[order].split(sizes), batch_first=True)
