"""An export opened without NeMo: it computes what MTBISALM computes, and what it cannot open goes to MTBISALM."""

import errno
import json
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nemo.collections.speechlm2.parts import hf_hub
from transformers import GenerationConfig

from nemo_mtbi.checkpoints import exported as files
from nemo_mtbi.checkpoints.archive import save_directory, save_nemo
from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.io.tensors import SINGLE
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.exported import ExportedSpeechLLM, open_speech_llm
from tests.helpers import build

pytestmark = pytest.mark.unit
CONNECTORS = "nemo_mtbi.modules.connectors."
ADAPTERS = {
    "stack": {"_target_": f"{CONNECTORS}StackMLPConnector", "factor": 5, "hidden_dim": 32},
    "bottleneck": {"_target_": f"{CONNECTORS}ConvBottleneckConnector", "layers": 1},
    "ctc": {"_target_": f"{CONNECTORS}CTCCompressConnector", "vocab_size": 9, "d_model": 32, "heads": 4},
    "decoder": {"_target_": f"{CONNECTORS}WhisperDecoderConnector"},
    "two_channel": {"_target_": f"{CONNECTORS}TwoChannelConnector", "acoustic_strides": 2},
    "description": {
        "_target_": f"{CONNECTORS}TwoChannelConnector",
        "acoustic_prompt": "A recording:\n{words} The gender is {female|male}.",
    },
}


def make(tiny_config, adapter, **changes):
    perception = {"modality_adapter": dict(ADAPTERS[adapter]), "input_length": "own"}
    model = build(tiny_config, **{"perception": perception, "prompt_format": "chat_template", **changes})
    if adapter == "ctc":
        model.set_ctc_vocabulary(list(range(300, 309)))
    model.perception.modality_adapter.begin_imitation()  # with what stands beside the words
    return model.eval()


def asked(model, prompt, samples):
    dialog = [[model.user_turn(prompt)]] * len(samples)
    pieces, _ = model.prompt_pieces(dialog)
    audio = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    with torch.no_grad():
        inputs, mask, silent = model.dialog_inputs(dialog, pieces, audio, torch.tensor([len(s) for s in samples]))
        return inputs, mask, silent, model.generate_from_embeddings(inputs, mask, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(("adapter", "dtype"), [*((a, "float32") for a in ADAPTERS), ("two_channel", "bfloat16")])
def test_answers_are_those_of_the_model_in_nemo(tiny_config, tmp_path, adapter, dtype):
    model = make(tiny_config, adapter, llm_dtype=dtype)
    folder = save_directory(model, tmp_path / "hf")
    light = open_speech_llm(folder)
    assert type(light) is ExportedSpeechLLM and not light.training
    assert {k: v.dtype for k, v in light.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    samples = [0.1 * torch.randn(n) for n in (20_000, 9_000)]
    for mine, other in zip(asked(light, "What is it?", samples), asked(model, "What is it?", samples), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert light.stop_ids() == model.stop_ids() and light.nothing_heard_ids() == model.nothing_heard_ids()


@pytest.fixture(scope="module")
def both(request, tmp_path_factory, tiny_llm, tiny_whisper):
    config = {"pretrained_llm": tiny_llm, "pretrained_asr": tiny_whisper}
    model = make(config, "stack")
    return open_speech_llm(save_nemo(model, tmp_path_factory.mktemp("light") / "m.nemo")), model


@given(st.lists(st.text(), min_size=1, max_size=3), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dialogs_are_rendered_alike(both, texts, system):
    def pieces(model):
        dialog = [{"role": "system", "content": ["Be short."]}] if system else []
        for text in texts:
            dialog += [model.user_turn(text), {"role": "assistant", "content": ["Yes. ", text]}]
        return model.prompt_pieces([[*dialog, model.user_turn(texts[0], audios=2)]])

    light, model = both
    assert pieces(light) == pieces(model)


def test_nemo_is_not_imported(both, tiny_config, tmp_path):
    folder = save_directory(make(tiny_config, "decoder"), tmp_path / "hf")
    code = (
        "import sys; from nemo_mtbi.models.exported import open_speech_llm; import numpy\n"
        f"m = open_speech_llm({str(folder)!r}); m.chat(numpy.zeros(16000, 'float32') + .1, 'What?', max_new_tokens=2)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'nemo', 'lightning', 'megatron', 'peft'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "changes", [{"prompt_format": "chatml"}, {"lora": {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}}]
)
def test_what_needs_nemo_is_opened_by_it(tiny_config, tmp_path, changes):
    assert isinstance(open_speech_llm(save_directory(make(tiny_config, "stack", **changes), tmp_path / "hf")), MTBISALM)


@pytest.mark.parametrize("target", ["os.system", "nemo_mtbi.modules.whisper.SimpleNamespace", "nemo_mtbi.modules.x.Y"])
def test_a_file_cannot_name_other_code(tiny_config, tmp_path, target):
    folder = save_directory(make(tiny_config, "stack"), tmp_path / "hf")
    config = json.loads((folder / files.CONFIG).read_text())
    config["perception"]["modality_adapter"]["_target_"] = target
    (folder / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=target if target.startswith("nemo_mtbi") else None):
        ExportedSpeechLLM(folder)


def test_missing_weights_and_wrong_paths_are_named(tiny_config, tmp_path):
    folder = save_directory(make(tiny_config, "stack"), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="There is no file"):
        open_speech_llm(tmp_path / "none.nemo")
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_speech_llm(folder)


def test_the_folder_of_the_llm_has_nemos_name():
    assert hf_hub.LLM_BACKBONE_DIR == files.LLM_BACKBONE_DIR


def test_the_llms_own_generation_config_goes_along(tiny_config, tiny_llm, tmp_path):
    """Its end tokens are those of the export too; a penalty of its own changes no greedy answer anywhere."""
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm, llm)
    own = GenerationConfig.from_pretrained(llm)
    own.eos_token_id, own.repetition_penalty = [2, 7], 1.9
    own.save_pretrained(llm)
    model, plain = make({**tiny_config, "pretrained_llm": str(llm)}, "stack"), make(tiny_config, "stack")
    folder = save_directory(model, tmp_path / "hf")
    samples = [0.1 * torch.randn(16_000)]
    expected = asked(plain, "What is it?", samples)[-1]
    for opened in (model, open_speech_llm(folder), MTBISALM.restore_from(folder)):
        assert set(opened.stop_ids()) >= {2, 7}
        answer = asked(opened, "What is it?", samples)[-1]
        end = next((i for i, t in enumerate(answer[0].tolist()) if t == 7), answer.shape[1])
        assert torch.equal(answer[0, :end], expected[0, :end])


def test_damaged_configuration_and_a_full_disk_are_told_apart(tiny_config, tmp_path, monkeypatch):
    folder = save_directory(make(tiny_config, "stack"), tmp_path / "hf")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        open_speech_llm(folder)
    archive = save_nemo(make(tiny_config, "stack"), tmp_path / "m.nemo")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(CheckpointError, match="does not fit into .*TMPDIR"):
        open_speech_llm(archive)
