"""Minimum risk over the alternatives of a description, against plain PyTorch; and what it is for."""

import copy

import pytest
import torch

from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.data.interleaving import InterleavingPolicy
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models.objective import KINDS, WINDOW_COUNTS, risk_term, term_counts
from nemo_mtbi.models.speech import batch_features
from nemo_mtbi.modules.connectors.running import task_numbers
from tests.helpers import assert_same, build, gradients, make_batch, split, two_channel

pytestmark = pytest.mark.unit
BUILT = []  # one model, of which every test has a copy
TEXT = " The gender is {female|male}. It is {calm|loud|flat}."
FREEZE = [r"llm\..+", r"embed_tokens\..+", r"perception\.(encoder|modality_adapter\.(?!acoustic\.)).+"]


@pytest.fixture
def model(tiny_config):
    if not BUILT:
        model = build(
            two_channel(tiny_config, acoustic_prompt=TEXT),
            freeze_params=FREEZE,
            imitation={"w_ce": 0.0, "w_risk": 1.0, "risk_samples": 3},
            interleaving={"probability": 0.0},
        )
        model.perception.modality_adapter.begin_imitation()
        torch.manual_seed(0)
        torch.nn.init.normal_(model.perception.modality_adapter.acoustic.project.weight, std=0.05)
        BUILT.append(model)
    return copy.deepcopy(BUILT[0])


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3, 6])
def test_descriptions_differ_by_one_choice(model, count):
    connector = model.eval().perception.modality_adapter
    features, lengths, _, _ = batch_features(model.perception, make_batch(model, 8))
    found = connector.hypotheses(features, lengths, count, 1.0)
    own = connector.connect(features, lengths)
    torch.testing.assert_close(found.speech[0].embeddings, own.embeddings)
    assert found.choices.shape == (count, 8, 2)
    changed = found.choices[1:] != found.choices[0]
    assert bool((changed.sum(-1) == 1).all())
    assert count == 2 or bool(changed.any(0).all())  # each of the choices takes its turn
    assert bool((found.choices >= 0).all()) and int(found.choices[..., 0].max()) < 2 and int(found.choices.max()) < 3
    for reading in found.speech[1:]:
        assert bool((reading.embeddings != own.embeddings).flatten(1).any(1).all())


@torch.no_grad()
def test_all_alternatives_are_drawn(model):
    acoustic = model.perception.modality_adapter.acoustic
    logits = torch.zeros(200, 2, 3).masked_fill(acoustic.impossible, -torch.inf)
    tasks = torch.zeros(200, dtype=torch.long)
    found = acoustic.neighbours(logits, 2, tasks)[1]
    assert {tuple(row) for row in found.tolist()} == {(1, 0), (0, 1), (0, 2)}
    every = acoustic.neighbours(logits, 5, tasks)[1:]  # a second turn has the other alternative
    assert all({(1, 0), (0, 1), (0, 2)} == set(map(tuple, every[:, row].tolist())) for row in range(200))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_value_and_gradient_are_the_plain_ones(model, count):
    acoustic = model.perception.modality_adapter.acoustic
    logits = torch.randn(4, 2, 3).masked_fill(acoustic.impossible, -torch.inf).requires_grad_()
    tasks = torch.tensor([7, 7, 8, 9])
    acoustic.influence.sums[7] = torch.tensor([3.0, 1.0])
    acoustic.influence.counts[7] = torch.tensor([4.0, 2.0])
    means = torch.tensor([[3.25 / 4.25, 1.25 / 2.25]] * 2 + [[1.0, 1.0]] * 2)
    chances = 0.9 * means / means.sum(1, keepdim=True) + 0.05
    choices, risks = acoustic.neighbours(logits.detach(), count, tasks), torch.rand(4, count)
    plain, differences = 0.0, torch.zeros(256, 2)
    for row in range(4):
        for s in range(1, count):
            [c] = (choices[s, row] != choices[0, row]).nonzero().flatten().tolist()
            a, b = logits[row, c, choices[0, row, c]], logits[row, c, choices[s, row, c]]
            better, worse = (a, b) if risks[row, 0] < risks[row, s] else (b, a)
            stands_for = (1, 2)[c] / (chances[row, c] * (count - 1))  # other alternatives over how many are drawn
            difference = (risks[row, s] - risks[row, 0]).abs()
            differences[tasks[row], c] += difference
            plain = plain + stands_for * difference * torch.log1p((worse - better).exp())
    differences[7] += torch.tensor([3.0, 1.0])
    loss = acoustic.risk_loss(logits, choices, risks, tasks)
    torch.testing.assert_close(acoustic.influence.sums, differences)
    assert float(acoustic.influence.counts.sum()) == 4 * (count - 1) + 6
    assert float(loss) == pytest.approx(float(risks[:, 0].sum()), rel=1e-5)
    (got,), (expected,) = torch.autograd.grad(loss, logits), torch.autograd.grad(plain, logits)
    torch.testing.assert_close(got, expected)


def test_what_a_task_asks_about_is_changed_more_often_and_means_the_same(model):
    """The expected weight of every alternative is 1, whatever the chances."""
    acoustic, rows = model.perception.modality_adapter.acoustic, 20000
    acoustic.influence.sums[3], acoustic.influence.counts[3] = torch.tensor([8.0, 0.5]), torch.tensor([8.0, 8.0])
    tasks = torch.full((rows,), 3)
    z = torch.zeros(rows, 2, 3).masked_fill(acoustic.impossible, -torch.inf)
    for count in (2, 4):
        choices = acoustic.neighbours(z, count, tasks)
        changed = (choices[1:] != choices[0]).float().mean((0, 1))
        assert changed.tolist() == pytest.approx(acoustic.influence.chances(tasks)[0].tolist(), abs=0.02)
        assert changed[0] > 4 * changed[1]
        own = z.clone().requires_grad_()
        risks = torch.zeros(rows, count)
        risks[:, 1:] = 1.0  # whatever is changed makes it worse by 1
        before = acoustic.influence.sums.clone(), acoustic.influence.counts.clone()
        acoustic.risk_loss(own, choices, risks, tasks).backward()
        acoustic.influence.sums.copy_(before[0])
        acoustic.influence.counts.copy_(before[1])
        # of each of the other alternatives, the slope of softplus at 0
        assert own.grad.mean(0).tolist() == [
            pytest.approx([-0.5, 0.5, 0.0], abs=0.05),
            pytest.approx([-1.0, 0.5, 0.5], abs=0.1),
        ]


def test_rows_without_a_risk_say_nothing_of_influence(model):
    acoustic = model.perception.modality_adapter.acoustic
    z = torch.zeros(2, 2, 3).masked_fill(acoustic.impossible, -torch.inf)
    tasks = torch.tensor(task_numbers(["voice_age", "repeat"]))
    choices = acoustic.neighbours(z, 3, tasks)
    acoustic.risk_loss(z, choices, torch.tensor([[0.5, 0.7, 0.5], [0.0, 0.0, 0.0]]), tasks)
    assert acoustic.influence.counts[tasks].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert acoustic.half().influence.counts.dtype == torch.float32


def test_the_students_own_pass_is_the_first_reading(model, monkeypatch):
    """The same loss and gradient as where the chosen description is read again."""
    model.config.imitation.w_kl, model.config.imitation.w_ce = 0.0, 1.0
    batch, rows_read = make_batch(model, 4), []
    batch["audio_lens"] -= torch.tensor([0, 1600, 3200, 4800])
    read = type(model).answer_losses

    def counted(self, batch, heard, rows, teacher=None):
        rows_read.append(rows)
        return read(self, batch, heard, rows, teacher)

    monkeypatch.setattr(type(model), "answer_losses", counted)
    again = copy.deepcopy(model)
    torch.manual_seed(0)
    reused = gradients(model, [batch])
    assert rows_read == [[0, 1, 2, 3]] * 2
    rows_read.clear()
    monkeypatch.setattr("nemo_mtbi.models.mtbi_salm.losses_of_speech", lambda *a: None)
    torch.manual_seed(0)
    assert_same(reused, gradients(again, [batch]), 1e-4)
    assert rows_read == [[0, 1, 2, 3]] * 3
    rows_read.clear()
    monkeypatch.undo()
    monkeypatch.setattr(type(model), "answer_losses", counted)
    model.interleaving = InterleavingPolicy(probability=1.0, text_share=1.0)  # the student reads another prompt
    gradients(model, [batch])
    assert rows_read[0] == [0, 1, 2, 3]


def test_a_sure_mistake_is_corrected_and_what_does_not_matter_stays(model):
    """Of 8 recordings, each is to choose the alternative with the lower risk; the other choice has no influence."""
    acoustic = model.perception.modality_adapter.acoustic
    z = torch.zeros(8, 2, 3)
    z[:, 0, 1] = 3.0  # all are sure of "male"
    z = z.masked_fill(acoustic.impossible, -torch.inf).requires_grad_()
    right, optimizer = torch.arange(8) % 2, torch.optim.SGD([z], 1.0)
    for _ in range(30):
        choices = acoustic.neighbours(z.detach(), 3, torch.zeros(8, dtype=torch.long))
        risks = (choices[..., 0] != right).float().t()
        optimizer.zero_grad()
        acoustic.risk_loss(z, choices, risks, torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
    assert torch.equal(z[:, 0].argmax(-1), right)
    assert bool((z[:, 1] == 0).all())


def test_only_the_offset_learns_from_kl(model):
    model.config.imitation.w_risk = 0.0  # the term; the connector still leaves its choices to it
    grads = gradients(model, [make_batch(model, 3)])
    assert {name.rpartition(".acoustic.")[2] for name, g in grads.items() if float(g.abs().sum()) > 0} == {"offset"}
    model.config.imitation.w_risk = 1.0
    batch = make_batch(model, 3)
    batch["audio_lens"] -= torch.tensor([0, 3200, 6400])  # one tempo would have no slope
    grads = gradients(model, [batch])
    assert all(float(g.abs().sum()) > 0 for g in grads.values()) and len(grads) > 3


def test_a_step_does_not_depend_on_how_it_is_cut(model, monkeypatch):
    """Descriptions are drawn for a batch, so here the next alternative takes each turn."""
    acoustic, connector = model.perception.modality_adapter.acoustic, model.perception.modality_adapter

    def neighbours(logits, count, tasks):
        best = logits.argmax(-1)
        sizes = (~acoustic.impossible).sum(-1)
        eye = torch.eye(len(sizes), dtype=torch.long)
        return torch.stack([best, *((best + eye[turn]) % sizes for turn in range(count - 1))])

    monkeypatch.setattr(acoustic, "neighbours", neighbours)
    acoustic.standardized._passes = acoustic.tempo_standardized._passes = 10**6  # it depends on the cut
    monkeypatch.setattr(acoustic.influence, "add", lambda *a: None)  # likewise
    batch = make_batch(model, 4)
    whole = gradients(model, [batch])
    parts = split(batch, [1, 3])
    counts = {k: sum(term_counts(p["examples"], connector)[k] for p in parts) for k in KINDS}
    assert_same(gradients(model, [{**p, WINDOW_COUNTS: counts} for p in parts]), whole, 1e-3)


def test_utterances_of_several_windows_add_no_risk(model):
    rows = {"encoder_features": torch.randn(3, 60, 64), "encoder_feature_lens": torch.tensor([60, 40, 50])}
    batch = {**rows, "windows": Windows([0, 0, 1], [0, 60, 0]), "examples": make_batch(model, 2)["examples"]}
    heard, risks = [], [0.5, 0.5, 0.5]

    def answer_losses(speech, rows):
        heard.append(speech)
        assert rows == [1]  # not the long one
        return torch.tensor([risks[len(heard) - 1]])

    term = risk_term(batch, model.perception, model.config.imitation, answer_losses)
    assert float(term.total) == pytest.approx(0.5) and [len(speech.lengths) for speech in heard] == [1, 1, 1]
    trained = [p for p in model.perception.modality_adapter.acoustic.parameters() if p.requires_grad]
    found = torch.autograd.grad(term.total, trained, allow_unused=True)
    assert all(g is None or float(g.abs().max()) == 0 for g in found)


def test_cached_text_is_not_written_again(model, monkeypatch):
    connector = model.eval().perception.modality_adapter
    features, lengths, _, _ = batch_features(model.perception, make_batch(model, 2))
    monkeypatch.setattr(type(connector), "_write", lambda *a, **k: pytest.fail("written again"))
    found = connector.hypotheses(features, lengths, 3, 1.0, None, [[5], [5, 6, 7]])
    assert found.written[:, 1].tolist() == [len(connector.tokenizer.decode(own).split()) for own in ([5], [5, 6, 7])]


@pytest.mark.parametrize(
    ("freeze", "by_text"),
    [(FREEZE[:2] + [r"perception\.encoder\..+"], True), (FREEZE, False)],
)
def test_what_is_written_comes_first(tiny_config, freeze, by_text):
    config = two_channel(tiny_config, acoustic_prompt=TEXT)
    connector = build(config, freeze_params=freeze, imitation={"w_risk": 1.0}).perception.modality_adapter
    connector.begin_imitation()
    assert connector.learns_by_risk and connector._chooses_by_risk is not by_text


def test_nothing_to_learn_is_refused(tiny_config):
    config = two_channel(tiny_config, acoustic_prompt=TEXT)
    frozen = [*FREEZE, r"perception\.modality_adapter\.acoustic\.(?!offset).+"]
    with pytest.raises(ConfigError, match="w_risk=1.0 trains what a connector writes"):
        build(config, freeze_params=frozen, imitation={"w_risk": 1.0})
