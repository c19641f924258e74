"""What reaches the LLM and the optimizer in a step: cut audio, parts at rest, adapters, clipped gradients, counts."""

import copy
import queue
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.objective import TRANSCRIPT_TOKENS, term_counts, transcript_terms
from nemo_mtbi.models.speech import cut_speech_spans
from nemo_mtbi.serving.batching import Batcher, _together
from nemo_mtbi.serving.request import Request
from nemo_mtbi.serving.sampling import Sampling
from nemo_mtbi.training.stages import tokens_in
from tests.helpers import build, gradients, make_batch

pytestmark = pytest.mark.unit
LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}


def test_waveforms_are_cut_at_their_spans():
    audios = torch.stack([torch.arange(100.0), 1000 + torch.arange(100.0)])
    batch = {"audios": audios, "audio_lens": torch.tensor([100, 80]), "windows": "of the whole"}
    pieces = [
        [[1, 2], SpeechSpan(0, 0.2, 0.5), [3], SpeechSpan(0, 0.7, float(9)), [4]],
        [SpeechSpan(1, 0.0, 0.3), [5], SpeechSpan(1, 0.9, 0.95)],  # the second begins behind the audio
    ]
    found, cut, seconds = cut_speech_spans(pieces, batch, 100)
    assert "windows" not in cut and cut["audio_lens"].tolist() == [30, 30, 30, 1]
    for row, begin in enumerate([20, 70, 1000]):
        assert cut["audios"][row].tolist() == [begin + i for i in range(30)]
    assert seconds == [0.3, 0.3, 0.3, 0.01]
    spans = [piece for row in found for piece in row if isinstance(piece, SpeechSpan)]
    assert spans == [SpeechSpan(i, 0.0, own) for i, own in enumerate(seconds)]
    assert [piece for row in found for piece in row if isinstance(piece, list)] == [[1, 2], [3], [4], [5]]


def adapted(tiny_config):
    """A model whose LoRA changes what its LLM says, and the same without."""
    plain = build(tiny_config).eval()
    model = build(tiny_config, lora=LORA).eval()
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model, plain


def test_the_text_llm_answers_without_adapters(tiny_config):
    model, plain = adapted(tiny_config)
    prompts = [list(range(100, 140)), list(range(300, 320))]
    own = plain.answer_text(prompts, 12)
    assert model.answer_text(prompts, 12) == own
    embedded = model.generation_inputs([[p] for p in prompts], None, None)
    assert model._greedy(*embedded, 12) != own  # they do change something


def test_the_server_asks_the_text_llm_without_adapters(tiny_config):
    """And not together with those that ask the speech LLM."""
    model, plain = adapted(tiny_config)

    def answered(of, text_llm):
        told = queue.Queue()
        dialog = [{"role": "user", "content": ["What is this?"]}]
        request = Request(dialog, [], 8, told.put, told.put, sampling=Sampling(text_llm=text_llm))
        Batcher(of)._answer([request])
        return request

    asked = {text_llm: answered(model, text_llm) for text_llm in (True, False)}
    assert asked[True].tokens == answered(plain, False).tokens != asked[False].tokens
    assert not _together(asked[True], asked[False]) and _together(asked[True], asked[True])


def test_frozen_parts_are_at_rest_whatever_lightning_does(tiny_config):
    model = build(tiny_config)
    for layer in model.llm.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.log = model.log_dict = lambda *_, **__: None
    losses = []
    for _ in range(2):
        model.train()
        losses.append(float(model.training_step(make_batch(model, 2), 0)["loss"]))
        assert not model.llm.training and not model.perception.encoder.training
        assert model.perception.modality_adapter.training
    assert losses[0] == losses[1]


@pytest.mark.parametrize("algorithm", ["norm", None])
def test_gradients_are_clipped_to_their_norm(tiny_config, algorithm):
    model = build(tiny_config)
    batch = make_batch(model, 3)
    before = gradients(model, [batch])
    norm = torch.cat([g.flatten() for g in before.values()]).norm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    limit = float(norm) / 10
    model._gradient_norm = norm
    model.configure_gradient_clipping(optimizer, limit, algorithm)
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert float(torch.cat([g.flatten() for g in after.values()]).norm()) == pytest.approx(limit, rel=1e-3)


def test_a_restart_goes_on_counting(tiny_config):
    """Bad steps on every rank; what was seen, a sum over ranks, on one."""
    model, checkpoint = build(tiny_config), {"state_dict": {}, "optimizer_states": []}
    checkpoint["state_dict"] = dict(model.state_dict())
    model.bad_steps = 3
    model.seen.counts = Counter(examples=7)
    model.on_save_checkpoint(checkpoint)
    for rank, seen in ((0, {"examples": 7}), (1, {})):
        other = build(tiny_config)
        other._trainer = SimpleNamespace(global_rank=rank)
        other.on_load_checkpoint(copy.deepcopy(checkpoint))
        assert other.bad_steps == 3 and dict(other.seen.counts) == seen


def test_the_answer_needs_a_place_in_the_context(tiny_config):
    model = build(tiny_config)
    context = model.llm.config.max_position_embeddings
    model.require_context(context - 1)
    with pytest.raises(DataError, match=f"take {context} positions"):
        model.require_context(context)


def test_an_utterance_of_exactly_a_window_is_counted(tiny_config, tiny_whisper):
    config = copy.deepcopy(tiny_config)
    config["perception"]["modality_adapter"] = {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector"}
    model = build(config)
    connector, batch = model.perception.modality_adapter, make_batch(model, 1)
    whole = connector.window_seconds
    counts = []
    for seconds in (1.0, whole, whole + 0.1):
        example = replace(batch["examples"][0], duration_seconds=seconds)
        counts.append(term_counts([example], connector)[TRANSCRIPT_TOKENS])
    assert counts[0] == counts[1] > counts[2] == 0


def test_a_vocabulary_of_another_llm_is_refused(tmp_path, tiny_llm):
    file = tmp_path / "ctc_tokens.json"
    jsonl.write_json(file, {"llm": "another", "tokens": [5, 6]})
    with pytest.raises(ConfigError, match="tokens of another LLM"):
        tokens_in(file, tiny_llm)


def test_ctc_reads_clean_frames_and_keeps_their_times(tiny_config):
    adapter = {"vocab_size": 5, "d_model": 32, "heads": 4, "dropout": 0.5, "time_masks": 2, "time_mask_frames": 10}
    config = copy.deepcopy(tiny_config)
    config["perception"]["modality_adapter"] = {
        "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
        **adapter,
    }
    model = MTBISALM(config)
    model.set_ctc_vocabulary([100, 101, 102, 103, 104])
    connector, batch = model.perception.modality_adapter, make_batch(model, 2)
    features, lengths = model.encode(batch["audios"], batch["audio_lens"])
    clean, trained = connector.eval().connect(features, lengths), connector.train().connect(features, lengths)
    torch.testing.assert_close(trained.embeddings, clean.embeddings)
    assert connector.training
    noisy = [connector.ctc(features, lengths)[0] for _ in range(2)]  # where dropout and masks belong
    assert not torch.equal(*noisy)
    # A frame that stands alone has the center that the convolutions give it.
    frames = connector.subsample(features, lengths)[1]
    count, factor = int(frames[0]), connector.subsampling_factor
    log_probs = torch.full((1, count, 6), -20.0)
    log_probs[0, :, 0] = 0.0
    log_probs[0, 3] = torch.tensor([-20.0, 0.0, *[-20.0] * 4])
    hidden = torch.zeros(1, count, 32)
    connector._frames, connector._ctc_log_probs = lambda *_: (hidden, frames[:1]), lambda _: log_probs
    found = connector.eval().connect(features[:1], lengths[:1])
    assert found.lengths.tolist() == [1]
    assert (
        float(found.centers[0, 0]) == float(connector.subsample.centers(count, features[:1])[0, 3]) == 3 * factor - 0.5
    )


def test_words_are_aligned_alike_in_both_stages(tiny_config):
    """A CTC connector may emit a token earlier or later than it is spoken; its place is that of its order."""
    config = copy.deepcopy(tiny_config)
    config["perception"]["modality_adapter"] = {
        "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
        **{"vocab_size": 5, "d_model": 32, "heads": 4},
    }
    model = MTBISALM(config).eval()
    batch = make_batch(model, 2)
    model.set_ctc_vocabulary(sorted({t for e in batch["examples"] for t in e.prompt_ids[3:7]})[:5])
    weights = SimpleNamespace(w_ctc=0.0, w_align=1.0)
    spoken = model.student(batch, interleave=True).spoken.unfused
    own = [model.perception, model.embed_tokens, weights]
    ([alone], [beside]) = (transcript_terms(batch, speech, *own) for speech in (None, spoken))
    torch.testing.assert_close(alone.total, beside.total)
    assert spoken.lengths.min() > 1  # there is something to put in order


def test_layers_that_are_not_trained_keep_their_statistics(nemo_asr, tiny_config):
    """A Conformer of which one layer is trained: its other layers' BatchNorm and dropout are at rest."""
    config = copy.deepcopy(tiny_config) | {
        "pretrained_asr": nemo_asr,
        "prevent_freeze_params": [r"^perception\.encoder\.layers\.0\.norm_out.+$"],
    }
    model = build(config)
    model.log = model.log_dict = lambda *_, **__: None
    batch, before = make_batch(model, 2), copy.deepcopy(dict(model.perception.encoder.named_buffers()))
    model.train()
    model.training_step(batch, 0)
    assert model.perception.encoder.training and model.perception.encoder.layers[0].norm_out.training
    norms = [m for m in model.perception.encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and not any(m.training for m in norms)
    torch.testing.assert_close(dict(model.perception.encoder.named_buffers()), before)


def test_a_frozen_connector_is_at_rest(tiny_config):
    config = copy.deepcopy(tiny_config) | {"lora": LORA, "imitation": {"teacher": "online", "w_ctc": 0.0}}
    config["freeze_params"] = [r"^embed_tokens\..+$", r"^llm\.(?!.*lora).+$", r"^perception\..+$"]
    model = build(config)
    model.log = model.log_dict = lambda *_, **__: None
    model.train()
    model.training_step(make_batch(model, 2), 0)
    assert not any(module.training for module in model.perception.modules())


def test_a_transcription_loss_that_trains_nothing_is_refused(tiny_config):
    config = copy.deepcopy(tiny_config) | {"lora": LORA, "imitation": {"teacher": "online", "w_ctc": 0.3}}
    config["perception"]["modality_adapter"] = {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector"}
    config["freeze_params"] = [r"^embed_tokens\..+$", r"^llm\.(?!.*lora).+$", r"^perception\..+$"]
    with pytest.raises(ConfigError, match=r"Set model.imitation.w_ctc=0"):
        build(config)
    config["imitation"]["w_ctc"] = 0.0
    model = build(config)
    own, count = model.perception.modality_adapter.transcription_loss(
        None, torch.zeros(1, 4, 64), torch.tensor([4]), ["word " * 10_000]
    )
    assert float(own) == count == 0


def test_waveforms_that_are_not_cut_give_words_their_positions(tiny_config):
    """With a probability of 0 both levels are the same step."""
    config = copy.deepcopy(tiny_config)
    config["perception"]["modality_adapter"] = {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector"}
    centers = []
    for level in ("embedding", "waveform"):
        model = build(config, interleaving={"level": level, "probability": 0.0}).eval()
        centers.append(model.student(make_batch(model, 2), interleave=True).spoken.unfused.centers)
    torch.testing.assert_close(*centers)


def test_a_batch_of_empty_answers_is_no_crash(tiny_config):
    for mean_over in ("tokens", "answers"):
        model = build(tiny_config, imitation={"mean_over": mean_over})
        model.log = model.log_dict = lambda *_, **__: None
        batch = make_batch(model, 2)
        batch["examples"] = [replace(example, response_ids=[]) for example in batch["examples"]]
        assert float(model.training_step(batch, 0)["loss"]) == 0


def test_several_answers_beside_one_to_silence(tiny_config, monkeypatch):
    model = build(tiny_config).eval()
    inputs, mask = model.generation_inputs([[[100, 101]], [[102, 103]], [[104, 105]]], None, None)
    options = {"max_new_tokens": 3, "num_return_sequences": 2, "num_beams": 2}
    whole = model._answers(inputs, mask, [False] * 3, **options)
    found = model._answers(inputs, mask, [False, True, False], **options)
    said = model.nothing_heard_ids()
    assert len(found) == 6 and found[2].tolist()[: len(said)] == found[3].tolist()[: len(said)] == said
    for row in (0, 1, 4, 5):
        assert found[row].tolist()[:3] == whole[row].tolist()
    with pytest.raises(DataError, match="return_dict_in_generate"):
        model._answers(inputs, mask, [False] * 3, return_dict_in_generate=True)
