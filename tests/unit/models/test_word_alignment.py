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
            end = torch.inf if unit is example.units[-1] else unit.end_seconds  # the last one takes what is left
            inside = (seconds >= unit.start_seconds) & (seconds < end) & seconds.isfinite()
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
def test_the_last_word_has_the_positions_up_to_the_end():
    """Of which the last one's middle may lie behind the audio."""
    embed = torch.nn.Embedding(5000, 8)
    [example] = make_batch(type("Model", (), {})(), 1)["examples"]
    frames = example.duration_seconds / 0.02
    centers = torch.tensor([[*torch.linspace(0, frames - 6, 20), frames + 2]])
    speech = SpeechEmbeddings(torch.randn(1, 21, 8), torch.tensor([21]), centers)
    spoken, _ = pooled_words([example], speech, 0.02, embed)
    begin = example.units[-1].start_seconds
    torch.testing.assert_close(
        spoken[len(example.units) - 1], speech.embeddings[0][(centers[0] + 0.5) * 0.02 >= begin].mean(0)
    )


def test_a_term_stays_where_a_step_has_none_of_the_count_that_it_is_in_units_of():
    """Word alignment where all utterances of a step are of several windows, and none has a transcription loss."""
    own = torch.tensor(3.0, requires_grad=True)
    counts = torch.tensor([float({objective.RESPONSE_TOKENS: 9, WORDS: 12}.get(kind, 0)) for kind in objective.KINDS])
    terms = [objective.Term(1.0, torch.zeros(()), objective.TRANSCRIPT_TOKENS), objective.Term(1.0, own, WORDS)]
    numbers = {kind: int(count) for kind, count in zip(objective.KINDS, counts, strict=True)}
    step = objective.alignment_loss(terms, numbers, counts)
    assert float(step.total) == pytest.approx(3 / 12)
    assert float(torch.autograd.grad(step.total, own)[0]) == pytest.approx(1 / 12)


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
