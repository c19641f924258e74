"""Fusion of similar neighbours against plain Python, its invariants, and the model around it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.data.example import plan_batch
from nemo_mtbi.data.interleaving import InterleavingPolicy, SpeechSpan
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models.exported import open_speech_llm
from nemo_mtbi.models.speech import connect, fused, span_cuts, speech_input
from nemo_mtbi.modules.connectors.acoustic import joined
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings, frame_mask
from nemo_mtbi.modules.fusion import Fusion, Positions, plan
from tests.helpers import assert_same, build, gradients, make_batch

pytestmark = pytest.mark.unit
CONNECTORS = "nemo_mtbi.modules.connectors."
DENSE = {"_target_": f"{CONNECTORS}ConvBottleneckConnector", "layers": 1}
CTC = {"_target_": f"{CONNECTORS}CTCCompressConnector", "vocab_size": 9, "d_model": 32, "heads": 4}
TWO = {"_target_": f"{CONNECTORS}TwoChannelConnector", "acoustic_strides": 1}


def speech(lengths, content=False, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    mask = frame_mask(torch.tensor(lengths), size)
    embeddings = torch.randn(len(lengths), size, width, generator=generator, dtype=torch.float64) * mask[..., None]
    centers = torch.arange(size, dtype=torch.float64).expand(len(lengths), -1) * 2 + 0.5
    own = torch.rand(len(lengths), size, generator=generator, dtype=torch.float64) * mask if content else None
    return SpeechEmbeddings(embeddings, torch.tensor(lengths), centers.clone(), content=own)


def plainly(rows, weights, budget):
    """The rounds of one utterance, position by position. -> embedding, weight, members of each."""
    items = [(row, weight, [i]) for i, (row, weight) in enumerate(zip(rows, weights, strict=True))]
    while len(items) > budget:
        count = min(len(items) - budget, len(items) // 2)
        alike = [
            float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=0))
            for (a, _, _), (b, _, _) in zip(items, items[1:], strict=False)
        ]
        chosen = set(sorted(range(len(alike)), key=lambda i: -alike[i])[:count])
        groups = [[items[0]]]
        for i, item in enumerate(items[1:]):
            groups[-1].append(item) if i in chosen else groups.append([item])
        items = []
        for group in groups:
            total = sum(weight for _, weight, _ in group)
            mean = sum(row * weight for row, weight, _ in group) / total
            items.append((mean, total, [m for _, _, members in group for m in members]))
    return items


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 30), st.booleans(), st.integers(0, 2**31 - 1)
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_plain_procedure(lengths, budget, content, seed):
    given_ = speech(lengths, content, seed)
    result = Fusion(budget)(given_, [1.0] * len(lengths))
    assert result.lengths.tolist() == [min(n, budget) for n in lengths]
    if max(lengths) <= budget:
        assert result is given_
        return
    for row, length in enumerate(lengths):
        rows = given_.embeddings[row, :length]
        weights = given_.content[row, :length] if content else rows.float().square().mean(-1).double()
        items = plainly(rows, weights.clamp_min(1e-6), budget)
        own = slice(0, len(items))
        torch.testing.assert_close(
            result.embeddings[row, own], torch.stack([i[0] for i in items]), rtol=1e-5, atol=1e-6
        )
        total = torch.stack([i[1] for i in items]).to(result.content)
        torch.testing.assert_close(result.content[row, own], total, rtol=1e-5, atol=1e-6)
        times = torch.stack([given_.centers[row, i[2]].mean() for i in items])
        torch.testing.assert_close(result.centers[row, own], times)
        assert not result.embeddings[row, len(items) :].any()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(1, 60), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_order_and_mass_are_kept_and_a_batch_is_its_rows(lengths, budget, seed):
    given_ = speech(lengths, True, seed)
    together = Fusion(budget)(given_, [1.0] * len(lengths))
    for row, length in enumerate(lengths):
        count = int(together.lengths[row])
        assert (together.centers[row, :count].diff() > 0).all()
        assert float(together.content[row].sum()) == pytest.approx(
            float(given_.content[row].clamp_min(1e-6)[:length].sum())
        )
        own = SpeechEmbeddings(
            given_.embeddings[row : row + 1, :length],
            given_.lengths[row : row + 1],
            given_.centers[row : row + 1, :length],
            content=given_.content[row : row + 1, :length],
        )
        alone = Fusion(budget)(own, [1.0])
        torch.testing.assert_close(alone.embeddings[0], together.embeddings[row, :count])


def test_gradients_reach_every_position():
    given_ = speech([37, 20])
    given_.embeddings.requires_grad_()
    Fusion(5)(given_, [1.0, 1.0]).embeddings.square().sum().backward()
    grad = given_.embeddings.grad.abs().sum(-1)
    assert (grad[0, :37] > 0).all() and (grad[1, :20] > 0).all() and not grad[1, 20:].any()


def test_budgets_by_seconds_and_drawn_ones():
    fusion = Fusion(50, per_second=2.5)
    assert fusion.budgets([1.0, 10.0, 100.0, 0.01]) == [3, 25, 50, 1]
    assert Fusion().budgets([1.0]) == [None]
    fusion = Fusion(100, sampled=[10, 20, None])
    drawn = []
    for step in range(60):
        fusion.draw(f"0/{step}")
        drawn.append(fusion.budgets([9.0])[0])
        again = Fusion(100, sampled=[10, 20, None])
        again.draw(f"0/{step}")
        assert again.drawn == fusion.drawn
    assert set(drawn) == {10, 20, None}
    assert fusion.eval().budgets([9.0]) == [100]


def test_text_positions_of_two_channels_stay():
    text, sound = speech([4, 2]), speech([30, 25], seed=1)
    text.labels = torch.arange(8).reshape(2, 4)
    both = joined(text, sound)
    fusable = both.labels == NO_TOKEN
    result = Fusion(10)(both, [1.0, 1.0], fusable)
    assert result.lengths.tolist() == [10, 10]
    torch.testing.assert_close(result.embeddings[0, :4], both.embeddings[0, :4])
    torch.testing.assert_close(result.embeddings[1, :2], both.embeddings[1, :2])
    assert Fusion(2)(both, [1.0, 1.0], fusable).lengths.tolist() == [5, 3]  # text and one acoustic position
    assert Fusion(2)(both, [1.0, 1.0], torch.zeros_like(fusable)) is both


def test_half_of_the_positions_at_most_go_in_a_round():
    assert plan([40, 9, 3], [39, 8, 2], [5, 9, None]) == [[20, 0, 0], [10, 0, 0], [5, 0, 0]]
    assert plan([4], [1], [1]) == [[1]] and plan([1], [0], [1]) == []


@pytest.mark.parametrize("adapter", [DENSE, CTC, TWO], ids=["dense", "ctc", "two_channel"])
def test_training_generation_and_export_read_the_same_positions(tiny_config, tmp_path, adapter):
    fusion = {"max_positions": 7, "sampled": [5, 9, None]}
    changes = {"perception": {"modality_adapter": copy.deepcopy(adapter), "fusion": fusion}}
    model = build(tiny_config, **changes, prompt_format="chat_template")
    if adapter is CTC:
        model.set_ctc_vocabulary(list(range(300, 309)))
    model.stage, batch = "imitation", make_batch(model, 2)
    if adapter is TWO:
        model.perception.modality_adapter.begin_imitation()
    assert all(g.isfinite().all() for g in gradients(model, [batch]).values())
    model.eval()
    light = open_speech_llm(save_directory(model, tmp_path / "hf"))
    audio, lens = batch["audios"], batch["audio_lens"]
    with torch.no_grad():
        heard = model.listen(audio, lens)
        mine, seconds = heard.speech, heard.seconds
        other = light.listen(audio, lens).speech
        features, lengths = model.encode(audio, lens)
        direct = fused(model.perception, connect(model.perception, features, lengths), seconds)
    assert mine.lengths.max() <= max(
        7, int(connect(model.perception, features, lengths).lengths.max()) * (adapter is TWO)
    )
    for got in (other, direct):
        torch.testing.assert_close(mine.embeddings, got.embeddings)
        torch.testing.assert_close(mine.centers, got.centers)


@pytest.mark.parametrize(
    ("fusion", "adapter", "message"),
    [
        ({"max_positions": 0}, DENSE, "max_positions=0: give whole numbers"),
        ({"max_positions": 2.5}, DENSE, "max_positions=2.5"),
        ({"max_positions": True}, DENSE, "max_positions=True"),
        ({"sampled": [100, -1]}, DENSE, "sampled=-1"),
        ({"per_second": 0}, DENSE, "per_second=0"),
        ({"sampled_per_second": [None, -2.0]}, DENSE, "sampled_per_second=-2.0"),
        ({"positions": 4}, DENSE, "known keys are max_positions, per_second, sampled, sampled_per_second"),
        ({"max_positions": 4}, {"_target_": f"{CONNECTORS}WhisperDecoderConnector"}, "has none that can be merged"),
    ],
)
def test_impossible_settings_are_named_before_weights_are_read(tiny_config, fusion, adapter, message):
    with pytest.raises(ConfigError, match=message):
        build(
            {**tiny_config, "pretrained_llm": "/not/there"}, perception={"modality_adapter": adapter, "fusion": fusion}
        )


def test_merged_positions_are_the_same_on_all_ranks():
    given_ = speech([12])
    left = Positions.of(given_, frame_mask(given_.lengths, 12), torch.ones(1, 11, dtype=torch.bool))
    seen = []
    first = left.merged([4], int(left.lengths[0]) - 4, lambda order: seen.append(order) or order)
    noisy = Positions(left.embeddings + 1e-3 * torch.randn_like(left.embeddings), *list(vars(left).values())[1:])
    assert noisy.merged([4], int(left.lengths[0]) - 4, lambda _: seen[0]).spans.tolist() == first.spans.tolist()


def test_long_audio_is_fused_in_parts_to_the_same(monkeypatch):
    given = speech([40, 7, 23], content=True)
    given.embeddings.requires_grad_()
    results = []
    for together in (8192, 3):
        monkeypatch.setattr("nemo_mtbi.modules.fusion.TOGETHER", together)
        fused = Fusion(max_positions=5)(given, [1.0, 1.0, 1.0])
        grads = torch.autograd.grad(fused.embeddings.square().sum(), given.embeddings)[0]
        results.append((fused.embeddings, fused.centers, fused.content, grads))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_nothing_is_merged_across_a_cut():
    given = speech([40, 7])
    cuts = torch.tensor([[20.5, 20.6, 33.0], [torch.inf] * 3], dtype=torch.float64)  # centers are 0.5, 2.5, ...
    fused = Fusion(max_positions=1)(given, [1.0, 1.0], cuts=cuts)
    assert fused.lengths.tolist() == [4, 1]  # a cut is where the next stretch begins
    assert fused.centers[0].tolist() == pytest.approx([9.5, 20.5, 27.5, 56.5])


def test_interleaved_words_and_fused_speech_do_not_mix(tiny_config):
    """Every position that the LLM gets lies, with all that was merged into it, in a span of speech."""
    fusion = {"max_positions": 3}
    model = build(tiny_config, perception={"modality_adapter": copy.deepcopy(DENSE), "fusion": fusion}).eval()
    batch = make_batch(model, 4)
    model.interleaving = InterleavingPolicy(probability=1.0, text_share=0.5, span_words=1.0)
    pieces = plan_batch(batch["examples"], model.interleaving, 0)
    assert any(len([p for p in row if isinstance(p, SpeechSpan)]) > 1 for row in pieces)
    found = speech_input(model.perception, batch, pieces, "embedding")
    frame = model.frame_seconds
    cuts = span_cuts(pieces, found.seconds, frame)
    for row, own in enumerate(cuts):
        count = int(found.embeddings.lengths[row])
        centers = found.embeddings.centers[row, :count].double()
        stretches = torch.searchsorted(torch.tensor(own, dtype=torch.float64), centers, right=True)
        whole = found.unfused.centers[row, : int(found.unfused.lengths[row])].double()
        present = torch.searchsorted(torch.tensor(own, dtype=torch.float64), whole, right=True).unique()
        assert stretches.unique().tolist() == present.tolist()  # no stretch of speech was lost to its neighbour


def test_a_budget_beyond_the_context_is_refused(tiny_config):
    context = 2048
    with pytest.raises(ConfigError, match=f"budget of {context} positions does not fit the LLM, whose context has"):
        build(tiny_config, perception={"modality_adapter": copy.deepcopy(DENSE), "fusion": {"sampled": [context]}})
    model = build(tiny_config, perception={"modality_adapter": copy.deepcopy(DENSE)})
    assert model.llm.config.max_position_embeddings == context
    with pytest.raises(ConfigError, match="does not fit"):
        model.limit_positions(context)
    model.limit_positions(None, per_second=2.0)
    assert model.perception.fusion.budgets([3.2]) == [7]


def test_rates_are_drawn_too():
    fusion = Fusion(per_second=9.0, sampled_per_second=[2.0, 4.0, None]).train()
    drawn = set()
    for step in range(40):
        fusion.draw(f"0/{step}")
        drawn.add(fusion.budgets([3.0])[0])
    assert drawn == {6, 12, None} and fusion.eval().budgets([3.0]) == [27]


def test_the_student_on_all_positions_teaches_it_on_few(tiny_config):
    """KL from plain logits, its gradient, and no gradient through the teacher."""
    fusion = {"max_positions": 6}
    changes = {"perception": {"modality_adapter": copy.deepcopy(DENSE), "fusion": fusion}}
    model = build(tiny_config, **changes, imitation={"teacher": "unfused", "w_ce": 0.0})
    batch = make_batch(model, 2)
    found = gradients(model, [batch])
    model.train()
    few = model.student(batch, interleave=True)
    whole, model.perception.fusion = model.perception.fusion, None
    teacher = model.student(batch, interleave=True).hidden.detach()
    model.perception.fusion = whole
    head = model.llm.lm_head
    student, target = (head(h).float().log_softmax(-1) for h in (few.hidden, teacher))
    kl = (target.exp() * (target - student)).sum() / len(target)
    assert float(kl) > 1e-3
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(kl, list(trained.values())), strict=True))
    assert_same(found, {n: expected[n] for n in found}, 1e-3)


def test_a_teacher_on_all_positions_needs_a_budget(tiny_config):
    with pytest.raises(ConfigError, match="teacher=unfused needs model.perception.fusion"):
        build(tiny_config, imitation={"teacher": "unfused"})
