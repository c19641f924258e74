"""Exports: complete, readable, and refused where damaged, foreign or hostile."""

import copy
import io
import json
import os
import shutil
import stat
import tarfile
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoConfig

from nemo_mtbi.checkpoints.archive import exported_config, save_directory, save_nemo
from nemo_mtbi.checkpoints.card import model_card
from nemo_mtbi.checkpoints.round_trip import max_abs_logit_difference, require_same_logits
from nemo_mtbi.checkpoints.run_directory import RunDirectory, split_stage
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.evaluation.predictions import digest
from nemo_mtbi.io.tensors import INDEX, SINGLE, as_readable_as_others, save_tensors, weight_files
from nemo_mtbi.losses.vocabulary import VocabularyShard
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.exported import open_speech_llm
from nemo_mtbi.parallel.loading import empty_llm, load_shards
from nemo_mtbi.pretrained.fingerprint import fingerprint
from nemo_mtbi.pretrained.offline import of_one_layout

pytestmark = pytest.mark.unit


def test_exports_need_nothing_else_and_compute_the_same(exported):
    model, nemo, hf = exported
    for source in (nemo, hf):
        other = MTBISALM.restore_from(source)
        assert max_abs_logit_difference(model, other) < 1e-5
        assert other.perception.modality_adapter.vocabulary.token_ids == list(range(300, 309))
        assert other.encoder_key == model.encoder_key
        assert other.config.pretrained_llm == model.config.pretrained_llm
        assert exported_config(other) == exported_config(model)  # no places of this machine
    assert max_abs_logit_difference(model, MTBISALM.from_pretrained(str(hf))) < 1e-5
    assert not any(f.suffix in (".bin", ".pt", ".ckpt", ".pkl") for f in hf.rglob("*"))


def test_damaged_and_foreign_archives_are_refused(exported, tmp_path):
    _, nemo, hf = exported
    data = nemo.read_bytes()
    (tmp_path / "cut.nemo").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.nemo").write_text("hello")
    with tarfile.open(tmp_path / "asr.nemo", "w") as tar:
        tar.add(hf / "config.json", "model_config.yaml")
    for name, message in (
        ("cut", "damaged|truncated"),
        ("text", "damaged"),
        ("asr", "another kind"),
        ("none", "no file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            MTBISALM.restore_from(tmp_path / f"{name}.nemo")
    with pytest.raises(CheckpointError, match="not empty"):
        save_directory(exported[0], hf)


@pytest.mark.parametrize("name", ["../escape.txt", "/tmp/escape_mtbi.txt", "link", "inner", "hard", "device"])
def test_hostile_archives_write_nothing_outside(exported, tmp_path, name):
    _, nemo, _ = exported
    evil = tmp_path / "evil.nemo"
    with tarfile.open(nemo) as source, tarfile.open(evil, "w") as tar:
        for member in source.getmembers():
            tar.addfile(member, source.extractfile(member))
        info = tarfile.TarInfo(name)
        kinds = {"link": tarfile.SYMTYPE, "inner": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
        if name in kinds:  # a link within the folder too: a chain of them leads outside
            info.type, info.linkname = kinds[name], "/etc/passwd" if name == "link" else "model.safetensors"
            tar.addfile(info)
        else:
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(CheckpointError, match="unsafe"):
        MTBISALM.restore_from(evil)
    assert not (tmp_path / "escape.txt").exists()


def test_an_export_cannot_ask_for_remote_code(exported, tmp_path):
    shutil.copytree(exported[2], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        MTBISALM.restore_from(tmp_path / "hf")


@pytest.mark.parametrize("where", ["preprocessor", "encoder", "nested", "interpolated"])
@pytest.mark.parametrize(
    "target", ["nemo.collections.asr.parts.utils.manifest_utils.write_ctm", "os.system", "lightning.pytorch.Trainer"]
)
def test_an_export_cannot_call_what_is_no_module(exported, tmp_path, where, target):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    shutil.copytree(exported[2], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    call = {"_target_": target, "output_path": str(victim), "target_ctm": [[0, "evil"]]}
    if where == "nested":
        config["perception"]["encoder"]["extra"] = [{"more": call}]
    elif where == "interpolated":
        config["called"] = target
        config["perception"]["encoder"] = call | {"_target_": "${called}"}
    else:
        config["perception"][where] = call
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for opened in (MTBISALM.restore_from, MTBISALM.from_pretrained, open_speech_llm):
        with pytest.raises(CheckpointError, match="no module of nemo_mtbi|no interpolations"):
            opened(tmp_path / "hf")
    assert victim.read_text() == "mine"


MODEL = {
    "_target_": "nemo_mtbi.models.MTBISALM",
    "cfg": {"pretrained_llm": "LLM", "pretrained_asr": "ASR", "trust_remote_code": True, "perception": {}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec_augment": MODEL}, "trust_remote_code"),
        ({"spec_augment": {**MODEL, "cfg": {}}}, "no module of nemo_mtbi"),  # it would open what its file names
        ({"spec_augment": {"_target_": "nemo.collections.speechlm2.models.SALM"}}, "no module of nemo_mtbi"),
        ({"spec_augment": {"_target_": "nemo_mtbi.modules.perception.SALM"}}, "no module of nemo_mtbi"),
        ({"spec_augment": {"_target_": "torch.nn.Identity", "_recursive_": False}}, "holds _recursive_"),
        ({"encoder": {"layers": 2}}, "does not describe its perception.encoder"),
        ({"preprocessor": None}, "does not describe its perception.preprocessor"),
    ],
)
def test_an_export_holds_parts_of_models_alone(exported, tmp_path, change, message):
    """Whole models read files that the export's maker names, with the code that lies there."""
    shutil.copytree(exported[2], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["perception"] |= change
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    for opened in (MTBISALM.restore_from, MTBISALM.from_pretrained, open_speech_llm):
        with pytest.raises(CheckpointError, match=message):
            opened(tmp_path / "hf")


def test_a_difference_of_logits_fails_and_so_does_what_is_no_number():
    own = torch.tensor([[1.0, -20.0, 3.0]])
    assert require_same_logits(own, own + 0.1, "it") == pytest.approx(0.1, rel=1e-4)
    for other in (own + 0.3, own * torch.nan):
        with pytest.raises(CheckpointError, match="it: the logits differ by"):
            require_same_logits(own, other, "it")


def test_a_rank_has_no_whole_model_to_save(exported, tmp_path, monkeypatch):
    model, _, _ = exported
    monkeypatch.setattr(model, "vocabulary_shard", VocabularyShard(0, 8, object()))
    with pytest.raises(CheckpointError, match="spread over tensor-parallel ranks"):
        model.save_to(tmp_path / "part.nemo")
    assert not (tmp_path / "part.nemo").exists()


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "x" / "a.safetensors", {"k": "v"})
        (tmp_path / "x" / "b").touch(mode=0o600)
        as_readable_as_others(tmp_path / "x")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "x").iterdir()} == {0o644}
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"a.safetensors", "b"}


def test_save_pretrained_writes_what_from_pretrained_opens(exported, tmp_path):
    model, *_ = exported
    model.save_pretrained(tmp_path / "hf")
    assert {"config.json", "model.safetensors", "tokenizer.json", "llm_backbone"} <= {
        f.name for f in (tmp_path / "hf").iterdir()
    }
    again = MTBISALM.from_pretrained(tmp_path / "hf")
    assert max_abs_logit_difference(model, again) < 1e-5


@pytest.fixture
def in_files(exported, tmp_path):
    """An export whose weights are in several files."""
    return save_directory(exported[0], tmp_path / "files", max_shard_size="20KB")


def test_an_export_in_several_files_is_the_same_model(exported, in_files, tmp_path, tiny_llm):
    """By Transformers' index; opened with NeMo and without, from an archive too, and read by rank."""
    model = exported[0]
    parts = sorted(in_files.glob("*.safetensors"))
    assert len(parts) > 3 and not (in_files / SINGLE).exists()
    nemo = save_nemo(model, tmp_path / "m.nemo", max_shard_size="20KB")
    for source in (in_files, nemo):
        assert max_abs_logit_difference(model, MTBISALM.restore_from(source)) < 1e-5
        assert max_abs_logit_difference(model, open_speech_llm(source)) < 1e-5
    whole = {name: value for part in parts for name, value in load_file(part).items()}
    single = load_file(save_directory(model, tmp_path / "one") / SINGLE)
    assert single.keys() == whole.keys() and all(torch.equal(single[name], whole[name]) for name in whole)
    by_rank = empty_llm(AutoConfig.from_pretrained(in_files / "llm_backbone"), torch.float32)
    load_shards(by_rank, in_files, torch.device("cpu"))
    assert torch.equal(by_rank.model.embed_tokens.weight, model.embed_tokens.weight)
    assert digest(in_files) == digest(in_files) != digest(tmp_path / "one")


def test_damage_to_one_of_several_files_is_named(in_files, tmp_path):
    index = in_files / INDEX
    said = json.loads(index.read_text())
    first, last = sorted(in_files.glob("*.safetensors"))[0], sorted(in_files.glob("*.safetensors"))[-1]

    def broken(message, change):
        folder = tmp_path / message
        shutil.copytree(in_files, folder)
        change(folder)
        for opened in (MTBISALM.restore_from, open_speech_llm):
            with pytest.raises(CheckpointError, match=message):
                opened(folder)

    def mapped(**changes):
        return lambda folder: (folder / INDEX).write_text(json.dumps(said | changes))

    broken("truncated", lambda folder: (folder / first.name).write_bytes(first.read_bytes()[:-10]))
    broken("lacks a file of its weights", lambda folder: (folder / last.name).unlink())
    broken("says it has", lambda folder: (folder / last.name).write_bytes(first.read_bytes()))
    broken("is damaged", lambda folder: (folder / INDEX).write_text(index.read_text()[:50]))
    broken("has no weight_map", mapped(weight_map=[]))
    name = next(iter(said["weight_map"]))
    (tmp_path / "d.safetensors").mkdir()
    for file in ("../x.safetensors", "/etc/passwd", 7, "d.safetensors"):
        with pytest.raises(ValueError, match="no safetensors file beside it"):
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: file}}))
            weight_files(tmp_path)
    broken("brackets are too deep", lambda folder: (folder / INDEX).write_text("[" * 100_000))
    broken("of two exports", lambda folder: (folder / SINGLE).write_bytes(first.read_bytes()))
    del said["weight_map"][name]
    broken("lack 1 tensors", mapped())


def test_files_of_two_exports_are_told_apart(exported, in_files, tmp_path):
    """As an interrupted copy over an older export leaves them."""
    other = save_directory(exported[0], tmp_path / "other", max_shard_size="20KB")
    first, *_ = sorted(other.glob("*.safetensors"))
    shutil.copy(first, in_files)
    assert max_abs_logit_difference(exported[0], MTBISALM.restore_from(in_files)) < 1e-5  # it is not looked at
    shutil.copy(other / INDEX, in_files)
    with pytest.raises(CheckpointError, match="lacks a file of its weights"):
        MTBISALM.restore_from(in_files)


def test_an_upload_removes_former_files_of_weights(exported, monkeypatch):
    asked = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: asked.update(given) or "url")
    assert exported[0].push_to_hub("me/model", private=True) == "url"
    assert asked["delete_patterns"] == ["*.safetensors", "*.safetensors.index.json"]


def test_a_folder_without_weights_has_no_digest(tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        digest(tmp_path)


@pytest.mark.parametrize("size", ["50", "x GB", "", "0GB", "-1GB", 0, -1, None, [1], True, float("inf")])
def test_a_size_of_files_that_is_none_is_refused(exported, tmp_path, size):
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_directory(exported[0], tmp_path / "hf", max_shard_size=size)


def test_weights_of_another_size_are_named(exported, tmp_path):
    model, *_ = exported
    run = RunDirectory(tmp_path)
    state = model.trained_state()
    name = next(n for n, v in state.items() if v.ndim == 2)
    state[name] = state[name][:, :1].contiguous()
    save_tensors(state, run.weights("imitation"), {"references": json.dumps(model.references)})
    with pytest.raises(CheckpointError, match=f"does not fit the model: {name}"):
        run.load_weights(model, "imitation")


def test_a_finished_run_stays_as_it_is(exported, tmp_path):
    model, *_ = exported
    run, cfg = RunDirectory(tmp_path), {"prompt_format": "chatml", "perception": {"modality_adapter": {"layers": 2}}}
    assert not run.check_same_model(model, cfg)  # nothing is there
    run.save_config(model, cfg)
    assert run.check_same_model(model, cfg) and not run.check_same_model(model, cfg | {"prompt_format": "other"})
    run.save_weights(model, "imitation")
    assert run.check_same_model(model, cfg) and run.check_same_model(model, cfg | {"imitation": {"w_kl": 2.0}})
    before = {name: value.clone() for name, value in model.trained_state().items()}
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    save_tensors(zeros, run.weights("imitation"), {"references": json.dumps(model.references)})
    assert run.check_same_model(model, cfg)  # which looks, and loads nothing
    assert all(torch.equal(value, before[name]) for name, value in model.trained_state().items())
    with pytest.raises(ConfigError, match=r"another model\.prompt_format"):
        run.check_same_model(model, cfg | {"prompt_format": "other"})
    with pytest.raises(ConfigError, match=r"another model\.perception.modality_adapter.layers"):
        run.check_same_model(model, cfg | {"perception": {"modality_adapter": {"layers": 3}}})


def test_the_card_says_what_was_trained(exported):
    model, *_ = exported
    assert "| LLM (frozen) |" in model_card(model) and "speech encoder (frozen)" in model_card(model)
    model = copy.copy(model)
    model.references = model.references | {"llm": "x+lora"}
    assert "LLM (with merged LoRA adapters)" in model_card(model)


def test_offline_parts_have_one_fingerprint_whatever_has_written_them(tmp_path):
    found = set()
    for version in ("5.24.0", "5.9.1"):
        (tmp_path / "config.json").write_text(f'{{\n  "a": 1,\n  "transformers_version": "{version}"\n}}\n')
        of_one_layout(tmp_path)
        found.add(fingerprint(tmp_path))
    assert len(found) == 1


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n', '{"a": 1}', "[1]", None])
def test_the_card_passes_over_manifests_that_are_not_ours(exported, tmp_path, content):
    model, *_ = exported
    (tmp_path / "data.json").write_text(json.dumps({"train": [str(tmp_path / "cuts.jsonl")]}))
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert "Teacher: not recorded" in model_card(model, tmp_path)


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    run = tmp_path / "me@home" / "run"
    run.mkdir(parents=True)
    assert split_stage(str(run)) == (str(run), "") and split_stage(f"{run}@alignment") == (str(run), "alignment")
    assert split_stage("me@home/gone@untrained") == ("me@home/gone", "untrained")
    assert split_stage("me@home/gone") == ("me@home/gone", "")
    with pytest.raises(CheckpointError, match="'aligment' is no stage; there are untrained, alignment, imitation"):
        split_stage(f"{run}@aligment")
