"""Whether a model notices that nothing is said, with a connector that writes text and with one that does not."""

import pytest
from lhotse import CutSet

from nemo_mtbi.evaluation.silence import nothing_heard
from nemo_mtbi.evaluation.systems import EvaluationSet, SpeechSystem, system_batches
from tests.helpers import build

pytestmark = pytest.mark.unit
DECODER = {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector"}


def share(model, manifest):
    return nothing_heard(SpeechSystem(model), CutSet.from_file(manifest), False, 2, "test")


def test_a_model_without_text_is_asked(tiny_config, manifest):
    model = build(tiny_config).eval()
    assert share(model, manifest) == 0
    system, questions = SpeechSystem(model), EvaluationSet(model, CutSet.from_file(manifest), False, every_cut=True)

    def answers(longest):
        batches = system_batches(system, questions, questions.conversations, 2, "test")
        return [
            text.strip() for reading in batches for text in system.answers(reading, [longest] * len(reading.examples))
        ]

    first = answers(4)[0]
    model.config.nothing_heard_answer = first  # as if training had taught it to this recording
    again = answers(len(model.nothing_heard_ids()))
    assert share(model, manifest) == again.count(first) / len(again)
    model.config.nothing_heard_answer = None
    assert share(model, manifest) is None


def test_a_connector_that_writes_text_is_read(tiny_config, manifest):
    tiny_config["perception"]["modality_adapter"] = DECODER
    model = build(tiny_config).eval()
    connector = model.perception.modality_adapter
    assert share(model, manifest) == 0
    connector.no_speech_threshold = 1e-300
    assert connector.no_speech_id is None or share(model, manifest) == 1
