"""Small corpora for the tests of the preparation."""

import numpy as np
import soundfile
from lhotse import CutSet
from textgrid import IntervalTier, TextGrid

from nemo_mtbi.preparation.prepare import PrepareConfig


def tone(path, seconds=1.0, rate=16000, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.sin(np.arange(round(seconds * rate)) / 20)
    soundfile.write(path, np.stack([samples] * channels, 1), rate)
    return path


def text_grid(path, *words, tier="words"):
    """As the Montreal Forced Aligner writes it: words (text, begin, end), in seconds, and phones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = max([w[2] for w in words], default=1.0)
    grid = TextGrid(maxTime=end)
    for name, own in ((tier, words), (tier.replace("words", "phones"), words[:1])):
        intervals = IntervalTier(name, 0, end)
        for text, begin, until in own:
            intervals.add(begin, until, text)
        grid.append(intervals)
    grid.write(str(path))
    return path


def config(tmp_path, *sources, **kwargs):
    return PrepareConfig(str(tmp_path / "out"), list(sources), aligner=kwargs.pop("aligner", "none"), **kwargs)


def cuts_of(written):
    return [c for path in written.values() for c in CutSet.from_file(path)]
