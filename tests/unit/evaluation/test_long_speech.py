"""Long recordings of consecutive utterances, the questions about them, and errors at cuts."""

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from nemo_mtbi.data.target import TARGETS_FIELD, Target
from nemo_mtbi.evaluation.long_speech import (
    PLACES,
    LongRecording,
    long_recordings,
    questions_on,
    seam_errors,
    word_times,
)
from nemo_mtbi.evaluation.score import Evaluation
from nemo_mtbi.evaluation.systems import TextSystem
from nemo_mtbi.preparation.sources import SourceConfig, read_tsv
from nemo_mtbi.tasks.library import load_library
from tests.helpers import build

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def utterances():
    table = SourceConfig("tsv", "pkg://nemo_mtbi/samples/librispeech/transcripts.tsv", split_column="split")
    return [e.load() for e in read_tsv(table) if e.id.split("-")[1] in ("1272", "1673")]


@pytest.fixture(scope="module")
def recordings(utterances, tmp_path_factory):
    return long_recordings(utterances, 20.0, tmp_path_factory.mktemp("long"))


def test_recordings_hold_a_speakers_utterances_in_order(utterances, recordings):
    assert len(recordings) >= 3 and len({r.path for r in recordings}) == len(recordings)
    texts = {c.supervisions[0].text: c for c in utterances}
    for recording in recordings:
        info = soundfile.info(recording.path)
        assert info.frames == round(recording.seconds * 16_000) >= 20 * 16_000
        own = [texts[text] for _, text in recording.utterances]
        assert len({c.supervisions[0].speaker for c in own}) == 1
        assert [c.id for c in own] == sorted(c.id for c in own)
        starts = np.cumsum([0] + [c.duration + 0.3 for c in own[:-1]])
        assert [begin for begin, _ in recording.utterances] == pytest.approx(starts, abs=0.01)
        assert recording.at(0.0) == recording.utterances[0][1] and recording.at(1.0) == recording.utterances[-1][1]
    used = [text for r in recordings for _, text in r.utterances]
    assert len(used) == len(set(used))


def test_questions_have_the_text_llms_answers(recordings, tiny_config):
    model = build(tiny_config, prompt_format="chat_template").eval()
    cuts = questions_on(recordings[:2], model, load_library()["question_generation"], max_new_tokens=6)
    targets = [Target(**t) for cut in cuts for t in cut.custom[TARGETS_FIELD]]
    assert {t.task for t in targets} <= set(PLACES) and len(targets) >= 4
    assert all(t.prompt and 0 < len(t.response_ids) <= 6 for t in targets)
    topline = Evaluation(model, CutSet.from_cuts(cuts), cached_features=False, batch_size=2)
    scores = topline.score("topline", TextSystem(model, None), generate=False).summary()
    assert scores["token_agreement"] == 1 and scores["kl_per_token"] == pytest.approx(0, abs=1e-6)


def test_words_are_timed_within_their_utterances(recordings):
    pytest.importorskip("pocketsphinx")
    from nemo_mtbi.preparation.word_times import PocketSphinxAligner

    words = word_times(recordings[0], PocketSphinxAligner())
    assert " ".join(w for w, _ in words) == " ".join(recordings[0].transcript.lower().split())
    times = [t for _, t in words]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= recordings[0].seconds
    begins = [begin for begin, _ in recordings[0].utterances[1:]]
    spoken = [sum(t < begin for t in times) for begin in begins]
    lengths = np.cumsum([len(text.split()) for _, text in recordings[0].utterances])[:-1]
    assert np.abs(np.array(spoken) - lengths).max() <= 1


WORDS = [("one", 1.0), ("two", 9.2), ("three", 10.4), ("four", 11.5), ("five", 20.0)]


@pytest.mark.parametrize(
    ("heard", "at_seams", "elsewhere", "lost"),
    [
        ("one two three four five", 0, 0, 0),
        ("One, two three four five.", 0, 0, 0),
        ("one three four five", 1, 0, 1),
        ("one two two three four five", 1, 0, 1),  # doubled
        ("one too three four five", 1, 0, 0),
        ("won two three four", 0, 2, 0),
        ("one two three four five six", 0, 1, 0),
        ("", 2, 3, 2),
    ],
)
def test_errors_are_counted_where_they_are(heard, at_seams, elsewhere, lost):
    found = seam_errors(WORDS, heard, [10.0, 40.0])
    assert (found["words_at_seams"], found["words_elsewhere"]) == (2, 3)
    assert (found["errors_at_seams"], found["errors_elsewhere"]) == (at_seams, elsewhere)
    assert found["lost_or_doubled_at_seams"] == lost


def test_a_place_is_the_utterance_spoken_there(tmp_path):
    recording = LongRecording(tmp_path, 10.0, [(0.0, "a"), (4.9, "b"), (9.6, "c")])
    assert [recording.at(share) for share in (0.05, 0.5, 0.95, 0.97)] == ["a", "b", "b", "c"]
