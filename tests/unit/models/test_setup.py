"""Configurations that cannot work are refused before any weight is loaded; LoRA and NeMo's own parts."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from nemo.collections.speechlm2.models.salm import SALM

from nemo_mtbi.checkpoints.archive import save_directory, save_nemo, save_trainable
from nemo_mtbi.checkpoints.round_trip import max_abs_logit_difference
from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.exported import open_speech_llm
from tests.helpers import build, gradients, make_batch
from tests.unit.nemo_helpers import ADAPTERS

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "change, message",
    [
        ({"llm_dtpye": "float32"}, "llm_dtpye"),
        ({"llm_dtype": "int8"}, "llm_dtype"),
        ({"speech_position": "middle"}, "speech_position"),
        ({"imitation": {"teacher": "none", "w_kl": 1.0}}, "teacher=online, cached or unfused"),
        ({"imitation": {"divergence": "l2"}}, "divergence"),
        ({"imitation": {"w_ce": 0.0, "w_kl": 0.0}}, "all 0"),
        ({"interleaving": {"probability": 2}}, "interleaving"),
        ({"pretrained_llm": None}, "pretrained_llm"),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, "sequence_parallel=true needs GPUs"),
    ],
)
def test_bad_configurations_are_refused_before_loading(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        MTBISALM({**tiny_config, "pretrained_asr": "/nowhere", **change})


@pytest.mark.parametrize("adapter", ["ours", "nemo"])
def test_nemo_encoder_with_our_connector_and_nemos(tiny_config, nemo_asr, tmp_path, adapter):

    config = {
        **copy.deepcopy(tiny_config),
        "pretrained_asr": nemo_asr,
        "perception": {"modality_adapter": ADAPTERS[adapter]},
    }
    if adapter == "nemo":
        config["freeze_params"] = [r"^embed_tokens\..+$", r"^llm\..+$", r"^perception\.encoder.+$"]
    model = MTBISALM(config)
    assert model.frame_seconds == pytest.approx(0.04)
    assert not model.perception.encoder.sync_max_audio_length  # ranks may have nothing to encode
    grads = gradients(model, [make_batch(model, 3)])
    assert grads and all(torch.isfinite(g).all() for g in grads.values())
    again = MTBISALM.restore_from(save_nemo(model, tmp_path / "m.nemo"))
    assert max_abs_logit_difference(model, again) < 1e-5


@pytest.mark.parity
def test_export_with_nemo_parts_opens_in_stock_salm(tiny_config, nemo_asr, tmp_path):
    """The directory that we write, read by NeMo's own SALM.from_pretrained: the same logits."""

    config = {
        **copy.deepcopy(tiny_config),
        "pretrained_asr": nemo_asr,
        "perception": {"modality_adapter": ADAPTERS["nemo"]},
    }
    ours = MTBISALM(config).eval()
    stock = SALM.from_pretrained(str(save_directory(ours, tmp_path / "hf"))).eval()
    audio, length = 0.1 * torch.randn(1, 20000), torch.tensor([20000])
    pieces, _ = ours.prompt_pieces([[ours.user_turn("Repeat this.")]])
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
    adapter = {"_target_": "nemo_mtbi.modules.connectors.whisper_decoder.WhisperDecoderConnector"}
    config = {**copy.deepcopy(tiny_config), "pretrained_asr": nemo_asr, "perception": {"modality_adapter": adapter}}
    with pytest.raises(ConfigError, match="needs a Whisper model as model.pretrained_asr"):
        MTBISALM(config)


def test_lora_trains_teaches_without_itself_and_exports_whole_alone_or_merged(tiny_config, tmp_path):

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
    record = json.loads((trainable / "model.json").read_text())
    record["model"]["trust_remote_code"] = True
    (trainable / "model.json").write_text(json.dumps(record))
    for opened in (MTBISALM.restore_from, open_speech_llm):
        with pytest.raises(CheckpointError, match="asks to run code"):
            opened(trainable)
    model.merge_lora()
    merged = MTBISALM.restore_from(save_directory(model, tmp_path / "merged"))
    assert not any("lora" in n for n in merged.state_dict())
    assert max_abs_logit_difference(again, merged) < 1e-4  # one product instead of two: rounding
    with pytest.raises(ConfigError, match="no LoRA"):
        merged.merge_lora()


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_lora_that_would_change_the_teacher_is_refused(tiny_config, init):
    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": init}
    with pytest.raises(ConfigError, match=f"init_lora_weights='{init}': use True, False, gaussian"):
        build(tiny_config, lora=lora)


def test_lora_of_the_output_layer_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="model.lora adapts lm_head"):
        build(tiny_config, lora={"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "lm_head"]})
