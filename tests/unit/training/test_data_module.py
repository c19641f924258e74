"""Each term of the loss is divided by its own count over the whole optimizer step."""

import pytest
import torch

from nemo_mtbi.models.objective import KINDS, WINDOW_COUNTS
from nemo_mtbi.modules.perception import connector_of
from nemo_mtbi.training.data_module import WindowedLoader
from tests.helpers import assert_same, build, gradients, make_batch, split

pytestmark = pytest.mark.unit
CTC = {
    "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
    "vocab_size": 60,
    "d_model": 32,
    "heads": 4,
    "dropout": 0.0,
}


@pytest.fixture
def model(tiny_config):
    tiny_config["perception"]["modality_adapter"] = CTC
    model = build(tiny_config, imitation={"w_ctc": 0.5, "w_align": 0.3})
    model.set_ctc_vocabulary(
        model.tokenizer.tokenizer("one two three four five six")["input_ids"] + list(range(300, 354))
    )
    return model


@pytest.mark.parametrize("sizes", [[8], [4, 4], [1, 2, 5]])
def test_terms_do_not_depend_on_how_a_step_is_cut(model, sizes):
    batch = make_batch(model, 8)
    expected = gradients(model, [batch])
    parts = list(WindowedLoader(split(batch, sizes), len(sizes), connector_of(model.perception)))
    assert len(parts) == len(sizes) and all(set(p[WINDOW_COUNTS]) == set(KINDS) for p in parts)
    assert_same(gradients(model, parts), expected)


def test_other_responses_leave_the_transcription_term_its_weight(model):
    """Once it was divided by response tokens: tasks with long answers trained recognition less."""
    from dataclasses import replace

    def transcription_part(extra):
        batch = make_batch(model, 4)
        batch["examples"] = [replace(e, response_ids=e.response_ids + [7] * extra) for e in batch["examples"]]
        parts = []
        for w_ctc in (0.0, 1.0):
            model.config.imitation.w_ctc, model.config.imitation.w_align = w_ctc, 0.0
            parts.append(gradients(model, [batch]))
        return {n: parts[1][n] - parts[0].get(n, torch.zeros_like(parts[1][n])) for n in parts[1]}

    short, long = transcription_part(0), transcription_part(20)
    assert_same(long, short, 1e-3)
