"""Recordings in which nothing is said: made once, prepared with an empty transcript, read as nothing heard."""

import pytest
from lhotse import CutSet

from nemo_mtbi.data.conversation import spoken_part
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.preparation.no_speech import SOUNDS, read_no_speech
from nemo_mtbi.preparation.prepare import Preparation
from nemo_mtbi.preparation.sources import SourceConfig
from tests.unit.preparation_helpers import config

pytestmark = pytest.mark.unit


def test_every_sound_is_prepared_with_an_empty_transcript(tmp_path):
    source = SourceConfig(
        "no_speech", options={"counts": {"train": 2 * len(SOUNDS), "held_out": 1}, "seconds": [0.06, 2]}
    )
    written = Preparation(config(tmp_path, source, aligner="pocketsphinx", unaligned="skip", min_seconds=0.05)).run()
    assert set(written) == {"train", "held_out"}
    cuts = list(CutSet.from_file(written["train"]))
    assert len(cuts) == 2 * len(SOUNDS)
    for cut in cuts:
        assert cut.supervisions[0].text == "" and 0.05 < cut.duration <= 2.0
        samples = cut.load_audio()
        assert abs(samples).max() <= 1.0 and spoken_part(cut).transcript == "..."
    again = {e.id: e.load().load_audio().tobytes() for e in read_no_speech(source, tmp_path / "other")}
    assert all(cut.load_audio().tobytes() == again[cut.id] for cut in cuts)


@pytest.mark.parametrize("options", [{"count": 3}, {"seconds": [0, 1]}, {"seconds": [2, 1]}])
def test_options_that_cannot_be(tmp_path, options):
    with pytest.raises(ConfigError, match="no_speech"):
        list(read_no_speech(SourceConfig("no_speech", options=options), tmp_path))
