"""NeMo's own parts in our places: an ASR encoder from a .nemo file, NeMo's adapter, its forced alignment, and LoRA."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_mtbi.data.alignment import NeMoCTCAligner, PocketSphinxAligner, Unalignable, build_aligner
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.export.archive import save_directory, save_nemo, save_trainable
from nemo_mtbi.export.round_trip import max_abs_logit_difference
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.training.run_directory import RunDirectory

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def nemo_asr(tmp_path_factory) -> str:
    """A one-layer Conformer CTC model with random weights, saved as NeMo saves it."""
    from nemo.collections.asr.models import EncDecCTCModel

    labels = list(" abcdefghijklmnopqrstuvwxyz'")
    config = OmegaConf.create({
        "sample_rate": 16000, "labels": labels,
        "preprocessor": {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", "sample_rate": 16000,
                         "features": 16, "window_size": 0.025, "window_stride": 0.01, "dither": 0.0},
        "encoder": {"_target_": "nemo.collections.asr.modules.ConformerEncoder", "feat_in": 16, "n_layers": 1, "d_model": 16,
                    "n_heads": 2, "subsampling_factor": 4, "subsampling_conv_channels": 16, "conv_kernel_size": 5},
        "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": 16, "num_classes": len(labels),
                    "vocabulary": labels},
    })  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("asr") / "tiny.nemo"
    EncDecCTCModel(cfg=config).save_to(str(path))
    return str(path)


ADAPTERS = {
    "ours": {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": 2, "hidden_dim": 16},
    "nemo": {"_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector", "d_model": 16},
}


@pytest.mark.parametrize("adapter", ["ours", "nemo"])
def test_nemo_encoder_with_our_connector_and_nemos(tiny_config, nemo_asr, tmp_path, adapter):
    from .test_model import gradients, make_batch

    config = {
        **copy.deepcopy(tiny_config),
        "pretrained_asr": nemo_asr,
        "perception": {"modality_adapter": ADAPTERS[adapter]},
    }
    if adapter == "nemo":
        config["freeze_params"] = [r"^embed_tokens\..+$", r"^llm\..+$", r"^perception\.encoder.+$"]
    model = MTBISALM(config)
    assert model.frame_seconds == pytest.approx(0.04)
    grads = gradients(model, [make_batch(model, 3)])
    assert grads and all(torch.isfinite(g).all() for g in grads.values())
    again = MTBISALM.restore_from(save_nemo(model, tmp_path / "m.nemo"))
    assert max_abs_logit_difference(model, again) < 1e-5


@pytest.mark.parity
def test_export_with_nemo_parts_opens_in_stock_salm(tiny_config, nemo_asr, tmp_path):
    """The directory that we write, read by NeMo's own SALM.from_pretrained: the same logits."""
    from nemo.collections.speechlm2.models.salm import SALM

    config = {
        **copy.deepcopy(tiny_config),
        "pretrained_asr": nemo_asr,
        "perception": {"modality_adapter": ADAPTERS["nemo"]},
    }
    ours = MTBISALM(config).eval()
    stock = SALM.from_pretrained(str(save_directory(ours, tmp_path / "hf"))).eval()
    audio, length = 0.1 * torch.randn(1, 20000), torch.tensor([20000])
    pieces, _ = ours._prompt_pieces([[ours.user_turn("Repeat this.")]])
    with torch.no_grad():
        inputs, mask = ours.generation_inputs(pieces, audio, length)
        expected = ours.head().logits(ours.hidden(inputs)[:, -1])
        features, counts = stock.perception(input_signal=audio, input_signal_length=length)
        ids = [torch.tensor([p for p in pieces[0][0]]), torch.tensor([p for p in pieces[0][2]])]
        rows = [stock.embed_tokens(ids[0]), features[0, : counts[0]], stock.embed_tokens(ids[1])]
        got = stock(torch.cat(rows)[None])["logits"][:, -1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert mask.all()
    # The configuration class of NeMo's vLLM plugin, from its file: importing the package would need vLLM.
    import nemo.collections.speechlm2 as package

    file = Path(package.__file__).parent / "vllm" / "salm" / "config.py"
    spec = importlib.util.spec_from_file_location("vllm_plugin_config", file)
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    served = plugin.NeMoSpeechLMConfig(**json.loads((tmp_path / "hf" / "config.json").read_text()))
    assert served.llm_architectures == ["LlamaForCausalLM"] and served.perception["modality_adapter"]


def test_whispers_decoder_needs_whispers_encoder(tiny_config, nemo_asr):
    adapter = {"_target_": "nemo_mtbi.modules.attention_decoder.WhisperDecoderConnector"}
    config = {**copy.deepcopy(tiny_config), "pretrained_asr": nemo_asr, "perception": {"modality_adapter": adapter}}
    with pytest.raises(ConfigError, match="needs a Whisper model as model.pretrained_asr"):
        MTBISALM(config)


def test_any_salm_is_a_system_of_the_benchmark(tiny_config, nemo_asr, tmp_path):
    """A stock SALM answers the benchmark's questions; an unreadable recording is left out."""
    import soundfile
    from lhotse import CutSet

    from nemo_mtbi.data.sources import utterance_cut
    from nemo_mtbi.evaluation.benchmark import Predictions
    from nemo_mtbi.evaluation.systems import Questions, SALMSystem
    from nemo_mtbi.targets.record import TARGETS_FIELD, Target

    config = {
        **copy.deepcopy(tiny_config),
        "pretrained_asr": nemo_asr,
        "perception": {"modality_adapter": ADAPTERS["nemo"]},
    }
    ours = MTBISALM(config).eval()
    system = SALMSystem(str(save_directory(ours, tmp_path / "hf")))
    target = Target("", "qa", "qa-0", "What is it?", "a tone", [300, 2]).to_dict()
    cuts = []
    for name in ("good", "bad"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
        cuts.append(utterance_cut(name, tmp_path / f"{name}.wav", "beep", None, "en", {TARGETS_FIELD: [target]}))
    (tmp_path / "bad.wav").write_bytes(b"")
    questions = Questions(ours, CutSet.from_cuts(cuts), cached_features=False)
    predictions = Predictions(tmp_path / "salm", "key", lambda c: ["a", "b"], lambda c: 4, 2)
    (record,) = predictions.predict("set", ours, system, questions).values()
    assert record["utterance"] == "good" and isinstance(record["answer"], str)
    assert record["choice"] is None and "agreed" not in record


def test_nemo_forced_alignment_gives_times_for_every_word(nemo_asr):
    aligner = build_aligner(nemo_asr)
    assert isinstance(aligner, NeMoCTCAligner)
    samples = (0.1 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    words = aligner.align(samples, "one two three")
    assert [w.text for w in words] == ["one", "two", "three"]
    times = [t for w in words for t in (w.start_seconds, w.end_seconds)]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 2.1
    with pytest.raises(Unalignable):
        aligner.align(samples[:1600], "one two three four five six seven eight nine ten eleven twelve")


def test_pocketsphinx_says_why_it_cannot_align():
    aligner = PocketSphinxAligner()
    with pytest.raises(Unalignable, match="dictionary"):
        aligner.align(np.zeros(16000, np.float32), "xqzzy brrtl")
    with pytest.raises(Unalignable):
        aligner.align(
            np.zeros(800, np.float32), "a sentence that is far too long for so little audio, as anyone can see"
        )


def test_lora_trains_teaches_without_itself_and_exports_whole_alone_or_merged(tiny_config, tmp_path):
    from .test_model import gradients, make_batch

    torch.manual_seed(0)
    lora = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    model = MTBISALM(
        {**copy.deepcopy(tiny_config), "lora": lora, "interleaving": {"probability": 1.0, "text_share": 1.0}}
    )
    assert model.prefixes is None  # the prompts' keys and values change with the adapters
    batch = make_batch(model, 3)
    assert any("lora_" in n for n in gradients(model, [batch]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    assert float(model.imitation(batch, model.student(batch, interleave=True)).kl) > 1e-3
    run = RunDirectory(tmp_path)
    run.save_weights(model, "imitation")
    assert any("lora_B" in n for n in model.trainable_names())
    again = MTBISALM.restore_from(save_nemo(model, tmp_path / "lora.nemo"))
    assert max_abs_logit_difference(model, again) < 1e-5
    trainable = save_trainable(model, tmp_path / "trainable", "imitation")
    assert sorted(f.name for f in trainable.rglob("*") if f.is_file()) == [
        "README.md",
        "model.json",
        "trained.safetensors",
    ]
    assert max_abs_logit_difference(model, MTBISALM.restore_from(trainable)) < 1e-5
    model.merge_lora()
    merged = MTBISALM.restore_from(save_directory(model, tmp_path / "merged"))
    assert not any("lora" in n for n in merged.state_dict())
    assert max_abs_logit_difference(again, merged) < 1e-4  # one product instead of two: rounding
    with pytest.raises(ConfigError, match="no LoRA"):
        merged.merge_lora()
