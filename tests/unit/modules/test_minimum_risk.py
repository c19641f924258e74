"""Minimum risk over the decoder connector's hypotheses, against plain PyTorch; and what it is for."""

import pytest
import torch

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.objective import KINDS, WINDOW_COUNTS, of_rows, risk_term, term_counts
from nemo_mtbi.models.speech import batch_features
from nemo_mtbi.modules.connectors.base import Hypotheses, evaluation_mode
from tests.helpers import assert_same, gradients, make_batch, split

pytestmark = pytest.mark.unit
DECODER = "nemo_mtbi.modules.connectors.WhisperDecoderConnector"


def config(tiny_llm, tiny_whisper, connector=DECODER, **imitation):
    return {
        "pretrained_llm": tiny_llm,
        "pretrained_asr": tiny_whisper,
        "prompt_format": "chatml",
        "perception": {"input_length": "own", "modality_adapter": {"_target_": connector, "dropout": 0.3}},
        "imitation": {"teacher": "online", "w_ce": 0.0, "w_risk": 1.0, "risk_samples": 3, **imitation},
        "interleaving": {"probability": 0.0},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }


@pytest.fixture(scope="module")
def model(tiny_llm, tiny_whisper):
    return MTBISALM(config(tiny_llm, tiny_whisper)).eval()


def readings(model, count=3, samples=3):
    connector = model.perception.modality_adapter
    features, lengths, _, _ = batch_features(model.perception, make_batch(model, count))
    torch.manual_seed(0)
    return connector, features, lengths, connector.hypotheses(features, lengths, samples, 1.0)


@torch.no_grad()
def test_the_first_reading_is_the_connectors_own_and_the_others_differ(model):
    connector, features, lengths, found = readings(model)
    own = connector.connect(features, lengths)
    torch.testing.assert_close(found.speech[0].embeddings, own.embeddings)
    assert found.speech[0].labels.tolist() == own.labels.tolist()
    assert found.tokens[1] != found.tokens[0] and found.tokens[2] != found.tokens[1]
    for tokens, speech in zip(found.tokens, found.speech, strict=True):
        texts = [connector.tokenizer.decode(own).strip() for own in tokens]
        ids = model.tokenizer.tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert [row[:n] for row, n in zip(speech.labels.tolist(), speech.lengths, strict=True)] == ids


def test_value_and_gradient_are_the_plain_ones(model):
    """Expected risk from log-probabilities under teacher forcing, one hypothesis at a time, by autograd."""
    connector, features, lengths, found = readings(model)
    risks = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    connector.train()
    plain = 0.0
    with evaluation_mode(connector):
        for row in range(3):
            log_probs = []
            for sample in found.tokens:
                own = [*sample[row], connector.eos_id]
                encoded, sizes = connector._encode(features[row : row + 1], lengths[row : row + 1])
                ids = torch.tensor([[*connector.prompt_ids, *own[:-1]]])
                states = connector._step(ids, 0, encoded[:, : int(sizes)], None, None)[
                    0, len(connector.prompt_ids) - 1 :
                ]
                logits = states @ connector._output_weight().t()
                log_probs.append(logits.log_softmax(-1)[range(len(own)), own].sum())
            plain = plain + (torch.stack(log_probs).softmax(0) * risks[row]).sum()
    trained = [p for p in connector.decoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad(plain, trained)
    loss = connector.risk_loss(features, lengths, found, risks)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    got = torch.autograd.grad(loss, trained)
    assert_same(dict(enumerate(got)), dict(enumerate(expected)), 1e-3)


def test_utterances_of_several_windows_add_no_risk(model):
    connector = model.perception.modality_adapter
    rows = {"encoder_features": torch.randn(3, 60, 32), "encoder_feature_lens": torch.tensor([60, 40, 50])}
    batch = {**rows, "windows": Windows([0, 0, 1], [0, 60, 0])}
    heard = []

    def answer_losses(speech, rows):
        heard.append(speech)
        assert rows == [1]  # not the long one, whose risk is left out
        return torch.tensor([0.5])

    term = risk_term(batch, model.perception, model.config.imitation, answer_losses)
    assert float(term.total) == pytest.approx(0.5)
    assert [len(speech.lengths) for speech in heard] == [1, 1, 1]
    trained = [p for p in connector.decoder.parameters() if p.requires_grad]
    assert all(float(g.abs().max()) < 1e-6 for g in torch.autograd.grad(term.total, trained))


def test_a_text_that_was_drawn_twice_is_read_once(model, monkeypatch):
    """With the same value and gradient as where every reading is read."""
    connector, batch = model.perception.modality_adapter, make_batch(model, 4)
    written, drawn = type(connector)._write, []

    def alike(self, features, sizes, temperature=None):
        tokens, states = written(self, features, sizes)
        drawn.append(1)
        for row in range(4):  # of four utterances one, two, two and three different texts
            tokens[row] = tokens[row][: len(tokens[row]) - min(row, len(drawn) - 1)] if row < 3 else tokens[row]
        return tokens, states

    monkeypatch.setattr(type(connector), "_write", alike)
    rows_read = []

    def losses(heard, rows):
        rows_read.append(rows)
        return heard.lengths.float() + torch.tensor(rows)

    term = risk_term(batch, model.perception, model.config.imitation, losses)
    trained = [p for p in connector.decoder.parameters() if p.requires_grad]
    got = torch.autograd.grad(term.total, trained)
    assert sum(map(len, rows_read)) < 12
    drawn.clear()
    monkeypatch.setattr(Hypotheses, "first_alike", lambda self: [[s] * 4 for s in range(len(self.tokens))])
    every = risk_term(batch, model.perception, model.config.imitation, losses)
    assert float(term.total) == pytest.approx(float(every.total), rel=1e-4)
    assert_same(dict(enumerate(got)), dict(enumerate(torch.autograd.grad(every.total, trained))), 1e-3)


@torch.no_grad()
def test_losses_of_some_rows_are_theirs_in_the_batch(model):
    batch = make_batch(model, 3)
    features, lengths, _, _ = batch_features(model.perception, batch)
    heard, teacher = model.perception.modality_adapter.connect(features, lengths), model.teacher_hidden(batch)
    whole = model.answer_losses(batch, heard, [0, 1, 2], teacher=teacher)
    torch.testing.assert_close(model.answer_losses(batch, heard.rows([2, 0]), [2, 0], teacher=teacher), whole[[2, 0]])


def test_rows_of_a_cached_teacher_stay_with_their_examples(model):
    batch = make_batch(model, 3)
    counts = [len(e.response_ids) for e in batch["examples"]]
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    batch |= {"teacher_ids": owners[:, None], "teacher_log_probs": -owners[:, None].float()}
    own, hidden = of_rows(batch, owners[:, None].float(), [2, 0])
    expected = [2] * counts[2] + [0] * counts[0]
    assert own["teacher_ids"][:, 0].tolist() == expected and hidden[:, 0].tolist() == expected
    assert [e.id for e in own["examples"]] == [batch["examples"][row].id for row in (2, 0)]


def test_the_term_is_divided_by_utterances(tiny_llm, tiny_whisper, monkeypatch):
    """A step in one batch and in two gives the same gradient."""
    model = MTBISALM(config(tiny_llm, tiny_whisper))
    batch = make_batch(model, 4)
    connector = model.perception.modality_adapter
    written = type(connector)._write

    def without_chance(self, features, sizes, temperature=None):
        """Samples that do not depend on the batch."""
        tokens, states = written(self, features, sizes)
        return [own[: len(own) // 2] if temperature else own for own in tokens], states

    monkeypatch.setattr(type(connector), "_write", without_chance)
    logged = {}
    whole = gradients(model, [batch])
    parts = split(batch, [1, 3])
    counts = {k: sum(term_counts(p["examples"], connector)[k] for p in parts) for k in KINDS}
    assert_same(gradients(model, [{**p, WINDOW_COUNTS: counts} for p in parts]), whole, 1e-3)
    model.train()
    model.log = lambda *a, **k: None
    model.log_dict = lambda values, **k: logged.update(values)
    model.training_step(batch, 0)
    assert 0 < float(logged["risk"]) < 50


@pytest.mark.parametrize(
    ("imitation", "connector", "message"),
    [
        ({"w_kl": 0.0, "teacher": "none"}, DECODER, "w_ce or w_kl must be above 0"),
        ({"risk_samples": 1}, DECODER, "risk_samples=1 at least 2"),
        ({"risk_temperature": 0.0}, DECODER, "risk_temperature=0.0 positive"),
        ({"w_risk": -1.0}, DECODER, "w_risk=-1.0 must be >= 0"),
        ({}, "nemo_mtbi.modules.connectors.StackMLPConnector", "w_risk=1.0 needs a connector that writes text"),
        ({}, "nemo_mtbi.modules.connectors.CTCCompressConnector", "w_risk=1.0 needs a connector that writes text"),
    ],
)
def test_impossible_settings_are_named_before_any_weight_is_loaded(
    imitation, connector, message, tmp_path, tiny_whisper
):
    cfg = config(str(tmp_path / "nothing"), tiny_whisper, connector, **imitation)
    with pytest.raises(ConfigError, match=message):
        MTBISALM(cfg)


def test_nothing_to_learn_is_refused(tiny_llm, tiny_whisper):
    frozen = [r"llm\..+", r"embed_tokens\..+", r"perception\..+"]
    with pytest.raises(ConfigError, match="w_risk=1.0 trains what a connector writes"):
        MTBISALM({**config(tiny_llm, tiny_whisper), "freeze_params": frozen})
