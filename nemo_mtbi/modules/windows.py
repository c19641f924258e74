"""How audio beyond 30 s is cut: in equal parts, the same for the encoder and for a connector that reads its frames."""

import math


def equal_windows(frames: int, longest: int, multiple: int = 1) -> list[tuple[int, int]]:
    """(begin, end) of the fewest windows of at most ``longest`` frames, equal but for the last; none is a few frames.

    Args:
        frames: of the utterance; 0 counts as 1.
        longest: limit of a window.
        multiple: of the windows' size, so that cuts stay cuts after subsampling by it.
    """
    frames = max(1, frames)
    count = math.ceil(frames / longest)
    size = math.ceil(math.ceil(frames / count) / multiple) * multiple
    return [(begin, min(begin + size, frames)) for begin in range(0, frames, size)]
