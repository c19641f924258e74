"""The connector on Whisper's decoder, against Transformers' Whisper, a plain cross-entropy and the text LLM."""

import copy
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.modeling_outputs import BaseModelOutput

from nemo_mtbi.checkpoints.archive import save_nemo
from nemo_mtbi.checkpoints.round_trip import max_abs_logit_difference
from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.data.example import plan_batch
from nemo_mtbi.evaluation.asr import WhisperASR
from nemo_mtbi.evaluation.systems import text_hidden
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.objective import term_counts
from nemo_mtbi.models.speech import connect, transcribe
from tests.helpers import gradients, make_batch

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(config):
    return MTBISALM(copy.deepcopy(config)).eval()


@pytest.fixture
def connector(model):
    """The tiny connector with residuals that are not zero, as after training; its decoder likes some words."""
    connector = copy.deepcopy(model.perception.modality_adapter)
    torch.manual_seed(1)
    torch.nn.init.normal_(connector.residual.weight)
    return connector


@pytest.fixture(scope="module")
def config(tiny_llm, tiny_whisper):
    return {
        "pretrained_llm": tiny_llm,
        "pretrained_asr": tiny_whisper,
        "prompt_format": "chatml",
        "perception": {
            "input_length": "own",
            "modality_adapter": {"_target_": TARGET, "dropout": 0.0, "alternatives": 8},
        },
        "imitation": {"teacher": "online"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }


TARGET = "nemo_mtbi.modules.connectors.whisper_decoder.WhisperDecoderConnector"


@torch.no_grad()
@pytest.mark.parity
def test_greedy_tokens_are_transformers(model, tiny_whisper):
    whisper = WhisperForConditionalGeneration.from_pretrained(tiny_whisper).eval()
    connector = model.perception.modality_adapter
    features = torch.randn(2, 1500, 32, generator=torch.Generator().manual_seed(0))
    tokens, states = connector._write(features, torch.tensor([1500, 1500]))
    ids = whisper.generate(
        encoder_outputs=BaseModelOutput(features),
        generation_config=whisper.generation_config,
        max_new_tokens=30,
        min_length=0,
    )
    text = WhisperTokenizer.from_pretrained(tiny_whisper)
    for row, own in zip(ids.tolist(), tokens, strict=True):
        given = [i for i in row if i not in text.all_special_ids]
        assert len(given) > 3 and own[: len(given)] == given
    forced = connector._forced_states(features, torch.tensor([1500, 1500]), tokens)
    torch.testing.assert_close(forced, states, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_published_in_half_precision(config, tiny_whisper, tmp_path, model):
    """As those of Whisper large-v3 are: connector and cascade compute in float32."""
    WhisperForConditionalGeneration.from_pretrained(tiny_whisper, dtype=torch.float16).save_pretrained(tmp_path)
    for file in Path(tiny_whisper).iterdir():
        if not (tmp_path / file.name).exists() or file.name == "generation_config.json":
            shutil.copy(file, tmp_path)
    halved = MTBISALM(copy.deepcopy(config) | {"pretrained_asr": str(tmp_path)}).eval()
    ours, other = model.perception.modality_adapter, halved.perception.modality_adapter
    assert {p.dtype for p in halved.perception.parameters()} == {torch.float32}
    torch.testing.assert_close(other.silence, ours.silence, atol=5e-2, rtol=0)
    assert WhisperASR(str(tmp_path)).parts[0].dtype == torch.float32


@torch.no_grad()
def test_untrained_connector_is_the_text_llm_on_its_own_transcript(model):
    batch = make_batch(model, 3)
    student = model.student(batch, interleave=False)
    texts = model.perception.modality_adapter.transcribe(*model.encode(batch["audios"], batch["audio_lens"]))
    prompts = []
    for example, text in zip(batch["examples"], texts, strict=True):
        heard = model.tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, units = example.prompt_ids, example.units
        prompts.append(ids[: units[0].token_begin] + heard + ids[units[-1].token_end :])
    expected = text_hidden(model, prompts, [e.response_ids for e in batch["examples"]], batch["examples"])
    torch.testing.assert_close(student.hidden, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_do_not_depend_on_padding(connector):
    features = torch.randn(2, 770, 32, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([770, 70])
    batch = connector.connect(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = connector.connect(features[row : row + 1, :length], lengths[row : row + 1])
        count = int(batch.lengths[row])
        assert count == int(alone.lengths[0])
        torch.testing.assert_close(batch.embeddings[row, :count], alone.embeddings[0, :count], rtol=1e-3, atol=1e-4)
        assert (batch.centers[row, :count].diff() >= 0).all() and float(batch.centers[row, count - 1]) < length
    assert (batch.embeddings[1, int(batch.lengths[1]) :] == 0).all()


@torch.no_grad()
def test_windows_are_written_one_after_the_other(model):
    features = torch.randn(3, 700, 32, generator=torch.Generator().manual_seed(0))
    lengths, windows = torch.tensor([700, 640, 70]), Windows([0, 0, 1], [0, 700, 0])
    speech = connect(model.perception, features, lengths, windows)
    texts = transcribe(model.perception, features, lengths)
    assert transcribe(model.perception, features, lengths, windows) == [f"{texts[0]} {texts[1]}", texts[2]]
    tokenizer = model.tokenizer.tokenizer
    assert speech.labels[0, : int(speech.lengths[0])].tolist() == [
        token for text in (texts[0], " " + texts[1]) for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert (speech.centers[0].diff() >= 0).all() and 700 < float(speech.centers[0].max()) < 1340
    assert len(speech.lengths) == 2 and not speech.nothing_heard.any()


def test_each_llm_token_reads_the_whisper_token_that_wrote_its_last_byte(model):
    connector = model.perception.modality_adapter
    tokenizer, _ = connector._language_model
    own = connector.tokenizer.encode(" Unbelievably naïve cafés", add_special_tokens=False).ids
    pieces = connector._language_model_tokens(tokenizer, own, True)
    assert tokenizer.decode([t for t, _ in pieces]) == "Unbelievably naïve cafés"
    for index, (_, owner) in enumerate(pieces):
        written = connector.tokenizer.decode(own[: owner + 1]).strip()
        before = connector.tokenizer.decode(own[:owner]).strip()
        text = tokenizer.decode([t for t, _ in pieces[: index + 1]])
        assert len(before.encode()) < len(text.encode()) <= len(written.encode())
    assert connector._language_model_tokens(tokenizer, [], True) == []


def test_a_batch_without_a_usable_transcript_has_a_graph(connector):
    rows = torch.zeros(2, 800, 32), torch.tensor([800, 800]), ["too long"], Windows([0, 0], [0, 800])
    loss, count = connector.transcription_loss(None, *rows)
    loss.backward()
    assert (
        count == 0 and float(loss) == 0 and not any(p.grad.any() for p in connector.parameters() if p.grad is not None)
    )


def test_silence_is_read_as_nothing_heard(connector, monkeypatch):
    monkeypatch.setattr(connector, "_write", lambda f, s: ([[]] * len(s), torch.zeros(len(s), 1, 32)))
    with torch.no_grad():
        speech = connector.connect(torch.randn(2, 50, 32), torch.tensor([50, 30]))
    tokenizer, _ = connector._language_model
    assert tokenizer.decode(speech.labels[0]) == "..."


@torch.no_grad()
@pytest.mark.parametrize("kept_layers", [None, 1])
def test_silence_is_the_end_of_a_silent_window(tiny_whisper, config, kept_layers):
    model = MTBISALM(OmegaConf.merge(config, {"perception": {"encoder_layers": kept_layers}})).eval()
    connector = model.perception.modality_adapter
    whisper = WhisperForConditionalGeneration.from_pretrained(tiny_whisper).model.encoder.eval()
    mel = WhisperFeatureExtractor.from_pretrained(tiny_whisper)(
        np.zeros(480_000, np.float32), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    outputs = whisper(mel, output_hidden_states=True)
    expected = outputs.last_hidden_state if kept_layers is None else outputs.hidden_states[kept_layers]
    assert connector.silence.shape == (10, 32)
    torch.testing.assert_close(connector.silence, expected[0, -10:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_without_silence_hear_none(model):
    connector = copy.deepcopy(model.perception.modality_adapter)
    state = {name: value for name, value in connector.state_dict().items() if name != "silence"}
    connector.load_state_dict(state)
    assert connector.silence.shape == (0, 32)
    features, lengths = torch.randn(2, 50, 32), torch.tensor([50, 30])
    states, sizes = connector._encode(features, lengths)
    assert torch.equal(states, features) and torch.equal(sizes, lengths)


@torch.no_grad()
def test_no_speech_is_whispers_own_decision(connector, tiny_whisper):
    whisper = WhisperForConditionalGeneration.from_pretrained(tiny_whisper).eval()
    features, lengths = torch.randn(2, 50, 32), torch.tensor([50, 50])
    states, sizes = connector._encode(features, lengths)
    start = torch.full((2, 1), whisper.generation_config.decoder_start_token_id)
    logits = whisper(encoder_outputs=BaseModelOutput(states), decoder_input_ids=start).logits[:, -1]
    nothing = logits.log_softmax(-1)[:, connector.no_speech_id]
    hidden = connector._forced(states, sizes, [[], []])
    own, other = connector._no_speech_log_probs(hidden[:, 0])
    torch.testing.assert_close(own, nothing, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, torch.log1p(-nothing.exp()), rtol=1e-4, atol=1e-4)
    connector.no_speech_threshold = float(nothing.mean().exp())
    speech = connector.connect(features, lengths)
    silent = nothing.exp() > connector.no_speech_threshold
    assert speech.nothing_heard.tolist() == silent.tolist() and 0 < int(silent.sum()) < 2
    texts = connector.transcribe(features, lengths)
    assert [not t for t in texts] == silent.tolist()


def test_a_sure_mistake_about_silence_is_learned_from(connector):
    weight = connector.decoder.embed_tokens.weight.detach()
    own = weight[connector.no_speech_id]
    first = (2000 * own / own.square().sum())[None].requires_grad_()
    nothing, something = connector._no_speech_log_probs(first)
    assert float(nothing) == 0.0 and torch.isfinite(something).all()
    (gradient,) = torch.autograd.grad(-something.sum(), first)
    assert float((gradient[0] * own).sum()) > 0  # towards less of it


@pytest.mark.parametrize("streamed", [False, True])
def test_a_question_about_silence_gets_its_own_answer(config, streamed):
    model = MTBISALM(copy.deepcopy(config)).eval()
    connector, audio = model.perception.modality_adapter, 0.1 * torch.randn(8000)
    heard = model.chat(audio, "What?", max_new_tokens=4)
    connector.no_speech_threshold = 1e-12
    pieces = list(model.stream(audio, "What?", max_new_tokens=4)) if streamed else [model.chat(audio, "What?")]
    assert "".join(pieces) == "I did not hear any speech."
    model.config.nothing_heard_answer = None
    assert model.chat(audio, "What?", max_new_tokens=4) not in ("I did not hear any speech.", heard)


@pytest.mark.slow
def test_silent_rows_do_not_change_the_others(config, monkeypatch):
    model = MTBISALM(copy.deepcopy(config)).eval()
    connector = model.perception.modality_adapter
    audios, lengths = 0.1 * torch.randn(3, 8000), torch.tensor([8000] * 3)
    dialogs = [[model.user_turn(q)] for q in ("One?", "Two?", "Three?")]
    options = {"audios": audios, "audio_lens": lengths, "max_new_tokens": 5, "do_sample": False}
    decode = model.tokenizer.tokenizer.batch_decode
    expected = decode(model.generate(dialogs, **options), skip_special_tokens=True)
    real = connector.connect
    silent = torch.tensor([False, True, False])
    monkeypatch.setattr(connector, "connect", lambda *a: dataclasses.replace(real(*a), nothing_heard=silent))
    answers = decode(model.generate(dialogs, **options), skip_special_tokens=True)
    assert answers == [expected[0], "I did not hear any speech.", expected[2]]


def test_transcription_loss_is_a_plain_cross_entropy(connector):
    connector.train()
    features = torch.randn(4, 600, 32, generator=torch.Generator().manual_seed(0))
    lengths, transcripts = torch.tensor([600, 60, 40, 50]), ["too long", "one two", "three", ""]
    rows, windows = [0, 0, 1, 2, 3], Windows([0, 0, 1, 2, 3], [0, 600, 0, 0, 0])
    loss, count = connector.transcription_loss(None, features[rows], lengths[rows], transcripts, windows)
    expected, tokens = torch.zeros(()), 0
    for row in (1, 2, 3):  # the first one has two windows
        ids = [*connector.tokenizer.encode(" " + transcripts[row], add_special_tokens=False).ids, connector.eos_id]
        inputs = torch.tensor([connector.prompt_ids + ids[:-1]])
        hidden = connector.decoder(
            inputs,
            encoder_hidden_states=torch.cat([connector.silence, features[row, : lengths[row]]])[None],
            use_cache=False,
        ).last_hidden_state[0]
        nothing = (hidden[0] @ connector.decoder.embed_tokens.weight.t()).softmax(-1)[connector.no_speech_id]
        if not transcripts[row]:
            expected, tokens = expected - nothing.log(), tokens + 1
            continue
        logits = hidden[len(connector.prompt_ids) - 1 :] @ connector._output_weight().t()
        text = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        expected, tokens = expected + text - (1 - nothing).log(), tokens + len(ids) + 1
    assert count == tokens == connector.transcript_tokens(transcripts[1:])
    assert count == connector.transcript_tokens(transcripts, windows.alone)
    connector.window_seconds = 30.0
    examples = [
        SimpleNamespace(response_ids=[1], units=[], transcript=t, duration_seconds=s)
        for t, s in zip([*transcripts, "word " * 200], [31.0, 2.0, 2.0, 2.0, 30.0], strict=True)
    ]
    assert term_counts(examples, connector)["transcript_tokens"] == count  # neither long audio nor text it cannot hold
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(value, connector.decoder.layers[0].fc1.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)
    alone = features[[0, 0]], lengths[[0, 0]], transcripts[:1], Windows([0, 0], [0, 600])
    assert connector.transcription_loss(None, *alone)[1] == 0
    short, sizes, words = features[1:, :60], lengths[1:], transcripts[1:]
    again, _ = connector.transcription_loss(connector.connect(short, sizes), short, sizes, words)
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-4)


def test_the_straight_through_term_is_the_mean_embedding_of_likely_tokens(connector):
    states = torch.randn(2, 32, requires_grad=True)
    found = connector._likely_embeddings(states, torch.tensor([True, False]))
    for row in range(2):
        values, ids = (states[row] @ connector._output_weight().t() + connector.suppressed[row]).topk(8)
        mean = values.softmax(0) @ connector.piece_embeddings[ids]
        torch.testing.assert_close(found[row], mean, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert (states.grad.abs().sum(1) > 0).all()
    tokenizer, embed = connector._language_model
    word = connector.tokenizer.encode(" cat", add_special_tokens=False).ids
    expected = embed(torch.tensor(tokenizer(" cat", add_special_tokens=False)["input_ids"])).mean(0)
    torch.testing.assert_close(connector.piece_embeddings[word[0]], expected.detach())


def test_training_hears_what_evaluation_hears(config):
    """Dropout and time masks of the transcription loss change neither hypotheses nor the states that the LLM reads."""
    config = copy.deepcopy(config)
    config["perception"]["modality_adapter"] |= {"dropout": 0.5, "time_masks": 2}
    config["perception"]["encoder_layers"] = 0
    model = MTBISALM(config)
    connector, batch = model.perception.modality_adapter, make_batch(model, 3)
    features, lengths = model.encode(batch["audios"], batch["audio_lens"])
    clean = connector.eval().connect(features, lengths)
    trained = connector.train().connect(features, lengths)
    torch.testing.assert_close(trained.labels, clean.labels)
    torch.testing.assert_close(trained.embeddings, clean.embeddings, rtol=1e-4, atol=1e-5)
    assert connector.training and connector.decoder.training  # as it was
    losses = {float(connector.transcription_loss(None, features, lengths, ["one two"] * 3)[0]) for _ in range(3)}
    assert len(losses) == 3  # where dropout and masks belong


def test_kl_alone_reaches_every_trained_tensor_that_chooses_tokens(config):
    model = MTBISALM(
        copy.deepcopy(config) | {"imitation": {"teacher": "online", "w_ce": 0.0, "w_kl": 1.0, "w_ctc": 0.0}}
    )
    grads = gradients(model, [make_batch(model, 3)])
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (n not in grads or not grads[n].abs().sum() > 0)
    ]
    # residual.weight is zero at first, so nothing passes through it to its norm
    assert [n for n in without if not n.endswith(("norm.weight", "norm.bias")) or ".layers." in n] == []


def test_weights_of_the_old_form_compute_the_same(connector):
    """They have a gate (left out) and a residual five times smaller."""
    state = {k: v.clone() for k, v in connector.state_dict().items()}
    for name in ("residual.weight", "residual.bias"):
        state[name] /= 5.0
    other = copy.deepcopy(connector)
    other.load_state_dict(state | {"gate": torch.zeros(())})
    torch.testing.assert_close(other.residual.weight, connector.residual.weight)


def test_a_piece_in_the_middle_of_an_utterance_goes_on_after_a_space(connector):
    features, lengths = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([60])
    tokenizer, _ = connector._language_model
    with torch.no_grad():
        first, later = (connector.connect(features, lengths, [start]).labels[0] for start in (True, False))
    assert tokenizer.decode(later) == " " + tokenizer.decode(first)


def test_symbols_of_transcripts_can_be_written(model):
    connector = model.perception.modality_adapter
    for symbol in '":()':
        ids = connector.tokenizer.encode(symbol, add_special_tokens=False).ids
        assert len(ids) == 1 and torch.isfinite(connector.suppressed[1, ids[0]])


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_step_under_autocast_stays_near_fp32(config, dtype):
    model = MTBISALM(copy.deepcopy(config) | {"imitation": {"teacher": "online", "w_ctc": 0.3}})
    batch = make_batch(model, 3)
    expected = gradients(model, [batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = gradients(model, [batch])
    assert found.keys() == expected.keys()
    total, difference = (
        torch.stack([value.norm() for value in values]).norm()
        for values in (expected.values(), [found[n] - expected[n] for n in expected])
    )
    assert difference < (0.25 if dtype == torch.bfloat16 else 1e-4) * total


def test_gradients_of_the_llm_reach_the_decoder(config):
    model = MTBISALM(copy.deepcopy(config))
    grads = gradients(model, [make_batch(model, 3)])
    for name in ("residual.weight", "decoder.layers.0.encoder_attn.k_proj.weight", "decoder.layers.0.fc1.weight"):
        assert float(grads[f"perception.modality_adapter.{name}"].abs().sum()) > 0
    assert not any("embed_tokens" in name for name in grads)


def test_spans_follow_the_order_of_tokens(model):
    """Text and speech of one utterance: every position of the connector stands in exactly one span."""
    batch = make_batch(model, 2)
    policy = copy.deepcopy(model.interleaving)
    pieces = plan_batch(batch["examples"], policy, 0)
    student = model.student(batch, interleave=True)
    assert student.layout.lengths.min() > 0 and len(pieces) == 2
    assert (
        student.spoken.embeddings.centers.diff(dim=1)[0, : int(student.spoken.embeddings.lengths[0]) - 1] >= 0
    ).all()


def test_export_holds_decoder_and_tokenizer(model, tmp_path):
    other = MTBISALM.restore_from(save_nemo(model, tmp_path / "m.nemo"))
    assert max_abs_logit_difference(model, other) < 1e-5
    features, lengths = torch.randn(1, 40, 32), torch.tensor([40])
    ours, theirs = (m.perception.modality_adapter.transcribe(features, lengths) for m in (model, other))
    assert ours == theirs and ours[0]
