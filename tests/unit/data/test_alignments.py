"""Word times count from the beginning of a recording, whatever Lhotse made of the cut since."""

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem
from lhotse.testing.dummies import dummy_recording

from nemo_mtbi.data.alignments import from_its_beginning, set_words, utterances
from nemo_mtbi.data.conversation import spoken_part
from nemo_mtbi.data.rendering import TimedWord

pytestmark = pytest.mark.unit


def words(*times):
    return [AlignmentItem(f"w{int(start)}", start, 0.5) for start in times]


def cut(name="a", start=0.0, duration=6.0, times=(0.0, 1.0, 2.0, 3.0, 4.0), at=0.0, length=None):
    recording = dummy_recording(0, duration=10.0, with_data=True)
    items = words(*times)
    text = " ".join(item.symbol for item in items)
    supervision = SupervisionSegment(
        name, recording.id, at, length or duration, text=text, alignment={"word": items} if times else None
    )
    return MonoCut(name, start, duration, 0, supervisions=[supervision], recording=recording)


def timed(cut):
    return {w.text: w.start_seconds for w in spoken_part(cut).words}


def test_a_truncated_cut():
    found = timed(cut().truncate(offset=1.0, duration=2.8))
    assert found == {"w0": None, "w1": 0.0, "w2": 1.0, "w3": 2.0, "w4": None}  # what was cut off has no times


def test_a_cut_of_an_utterance():
    whole = cut()
    whole.supervisions = [
        SupervisionSegment("x", whole.recording.id, 1.0, 2.5, text="w1 w2 w3", alignment={"word": words(1.0, 2.0, 3.0)})
    ]
    [own] = whole.trim_to_supervisions()
    assert own.start == 1.0 and timed(own) == {"w1": 0.0, "w2": 1.0, "w3": 2.0}
    assert timed(own.perturb_speed(2.0)) == {"w1": 0.0, "w2": 0.5, "w3": 1.0}


def test_appended_and_mixed_cuts():
    first, second = cut("a", duration=3.0, times=(0.0, 1.0)), cut("b", start=2.0, duration=3.0, times=(3.0, 4.0))
    mixed = first.append(second).pad(duration=8.0)
    assert timed(mixed) == {"w0": 0.0, "w1": 1.0, "w3": 4.0, "w4": 5.0}
    assert [own.start for own, _ in utterances(mixed)] == [0.0, 3.0]


def test_times_that_earlier_versions_wrote_from_the_beginning_of_the_cut():
    assert timed(cut(start=5.0, duration=4.0, times=(0.0, 1.0, 2.0))) == {"w0": 0.0, "w1": 1.0, "w2": 2.0}
    assert timed(cut(start=5.0, duration=4.0, times=(5.0, 6.0, 7.0))) == {"w5": 0.0, "w6": 1.0, "w7": 2.0}


def test_what_is_written_is_read():
    own = cut(start=2.0, times=())
    set_words(own.supervisions[0], [TimedWord("a", 0.25, 0.5), TimedWord("b"), TimedWord("c", 1.0, 1.5)], own.start)
    assert [w.start for w in own.supervisions[0].alignment["word"]] == [2.25, 3.0]
    own.supervisions[0].text = "a b c"
    assert timed(own) == {"a": 0.25, "b": None, "c": 1.0}


def test_audio_that_becomes_a_recording_of_its_own(tmp_path):
    own = cut(start=1.0, duration=4.0, times=(1.0, 2.0, 3.0))
    expected = timed(own)
    audio = own.load_audio()
    CutSet([from_its_beginning(own)]).to_shar(tmp_path, {"recording": "flac"})
    [read] = CutSet.from_shar(in_dir=tmp_path)
    assert read.start == 0 and timed(read) == expected
    assert np.allclose(read.load_audio(), audio, atol=1e-3)


def test_earlier_versions_times_in_a_recording_of_its_own():
    own = cut(start=5.0, duration=4.0, times=(0.0, 1.0, 2.0))
    expected = timed(own)
    own = from_its_beginning(own)
    own.start = 0.0
    assert timed(own) == expected


def test_a_word_is_looked_for_among_those_of_its_own_utterance():
    """The first utterance has no times, and a word of the second."""
    own = cut(duration=10.0, times=())
    own.supervisions = [
        SupervisionSegment("x", "r", 0.0, 3.0, text="yes i do"),
        SupervisionSegment("y", "r", 9.0, 1.0, text="yes", alignment={"word": [AlignmentItem("yes", 9.2, 0.4)]}),
    ]
    assert [w.start_seconds for w in spoken_part(own).words] == [None, None, None, 9.2]
