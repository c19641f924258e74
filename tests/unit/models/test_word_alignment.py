"""The word-level term: which positions and tokens are pooled, against a loop over words."""

from dataclasses import replace

import pytest
import torch

from nemo_mtbi.config import ImitationConfig
from nemo_mtbi.models import objective
from nemo_mtbi.models.objective import WORDS, has_word, pooled_words, term_counts
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings
from tests.helpers import build, make_batch

pytestmark = pytest.mark.unit


def by_hand(examples, speech, frame_seconds, embed_tokens):
    for row, example in enumerate(examples):
        seconds = (speech.centers[row, : speech.lengths[row]] + 0.5) * frame_seconds
        for unit in example.units:
            inside = (seconds >= unit.start_seconds) & (seconds < unit.end_seconds)
            if has_word(example, unit) and inside.any():
                own = speech.embeddings[row, : speech.lengths[row]][inside].mean(0)
                yield own, embed_tokens(torch.tensor(example.prompt_ids[unit.token_begin : unit.token_end])).mean(0)


@torch.no_grad()
def test_means_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    embed = torch.nn.Embedding(5000, 8)
    batch = make_batch(type("Model", (), {})(), 3)
    examples = batch["examples"]
    examples[1] = replace(examples[1], units=[replace(examples[1].units[0], words=4, token_end=7)])  # no times at all
    centers = torch.sort(torch.rand(3, 30, generator=g) * 40)[0]
    centers[0, 3] = torch.inf
    speech = SpeechEmbeddings(torch.randn(3, 30, 8, generator=g), torch.tensor([30, 30, 11]), centers)
    speech.embeddings[2, 11:] = torch.nan  # padding is never read
    spoken, text = pooled_words(examples, speech, 0.02, embed)
    own = [(a, b) for a, b in zip(spoken, text, strict=True) if a.any()]
    expected = list(by_hand(examples, speech, 0.02, embed))
    assert len(own) == len(expected) >= 5
    for found, reference in zip(own, expected, strict=True):
        torch.testing.assert_close(torch.stack(found), torch.stack(reference))
    assert term_counts(examples, None)[WORDS] == sum(len(e.units) for e in examples) - 1


@torch.no_grad()
def test_many_positions_of_a_word_in_half_precision():
    embed = torch.nn.Embedding(5000, 8)
    [example] = make_batch(type("Model", (), {})(), 1)["examples"]
    speech = SpeechEmbeddings(
        torch.ones(1, 900, 8, dtype=torch.bfloat16), torch.tensor([900]), torch.arange(900.0)[None] / 10
    )
    spoken, _ = pooled_words([example], speech, 0.02, embed)
    torch.testing.assert_close(spoken.float(), torch.ones_like(spoken).float())


def test_the_term_reads_what_was_not_fused(tiny_config, monkeypatch):
    tiny_config["perception"]["fusion"] = {"max_positions": 2}
    model = build(tiny_config, imitation={"w_align": 1.0, "w_ctc": 0.0}).train()
    batch, seen = make_batch(model, 2), []
    whole = objective.transcript_terms

    def noted(batch, spoken, *rest):
        seen.append(spoken.embeddings.shape[1])
        return whole(batch, spoken, *rest)

    monkeypatch.setattr("nemo_mtbi.models.mtbi_salm.transcript_terms", noted)
    model.training_step(batch, 0)
    assert isinstance(model.config.imitation, ImitationConfig) and seen[0] > 2
