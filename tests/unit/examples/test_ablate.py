"""Ablation variants as command lines."""

import importlib
import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_mtbi.cli import CONF
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.examples._overrides import overrides
from nemo_mtbi.examples.ablate import check_tasks, finished, held, subset, tasks_of, train_values

pytestmark = pytest.mark.unit


def test_ablation_variants_as_command_lines(tmp_path):
    targets = [{"id": f"c{i}", "custom": {"targets": [{"task": "repeat"}, {"task": "about"}]}} for i in range(200)]
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(t) + "\n" for t in targets))
    assert tasks_of(manifest) == {"repeat", "about"}
    half, quarter = (subset(manifest, tmp_path / "data", share) for share in (0.5, 0.25))
    assert set(quarter.read_text().splitlines()) < set(half.read_text().splitlines())
    assert 0.4 < len(half.read_text().splitlines()) / 200 < 0.6
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose(
            "ablate",
            [
                f"output_dir={tmp_path}",
                "warm_start=w@alignment",
                "cuts={a: b}",
                f"targets={{train: {manifest}, validation: v}}",
            ],
        )
        importlib.import_module("nemo_mtbi.examples.train")
        for name, variant in cfg.variants.items():
            values = train_values(cfg, OmegaConf.to_container(variant), tmp_path / name, 3)
            own = compose("train", overrides(values))
            assert (
                own.seed == 3
                and own.trainer.max_steps == 150
                and own.init_from == (None if name == "no_warm_start" else "w@alignment")
            )
            if name == "continuation_only":
                assert own.data.train_ds.input_cfg[0].tasks == ["continuation"]
            if name == "data_1_4":
                assert own.data.train_ds.input_cfg[0].cuts_path == str(quarter)
    run = tmp_path / "full"
    same = {"targets": "a", "validation": "b"}
    assert not finished(run, ["a=0"], same) and not finished(run, ["a=1"], same)  # nothing was trained with the first
    (run / "imitation" / "checkpoints").mkdir(parents=True)
    (run / "imitation" / "checkpoints" / "mtbi-step=50-last.ckpt").touch()
    assert not finished(run, ["a=1"], same)
    with pytest.raises(ConfigError, match="other settings"):
        finished(run, ["a=2"], same)
    with pytest.raises(ConfigError, match="another file of its targets"):
        finished(run, ["a=1"], same | {"targets": "c"})


def test_a_variant_may_have_targets_of_its_own(tmp_path):
    """One task asked of every cut: with the tasks of ``full`` each cut has two of four."""

    def written(name, tasks):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": t, "custom": {"targets": [{"task": t}]}}) + "\n" for t in tasks))
        return str(path)

    every, repeat = written("train.jsonl", ["repeat", "about"]), written("repeat.jsonl", ["repeat"])
    cfg = OmegaConf.create(
        {"targets": {"train": every, "validation": every}, "output_dir": str(tmp_path), "warm_start": None}
        | {"train": {}, "benchmark": {"trained_tasks": ["about", "repeat"]}}
    )
    own = {"tasks": ["repeat"], "targets": repeat, "data_share": 1.0}
    source = train_values(cfg, own, tmp_path, 0)["data.train_ds.input_cfg"][0]
    assert source["cuts_path"].startswith(str(tmp_path / "data" / "repeat")) and source["tasks"] == ["repeat"]
    assert held(cfg, own) == {"repeat"} and held(cfg, {}) == {"repeat", "about"}
    assert check_tasks(cfg, {"repeat_only": own}) == ["about", "repeat"]
    assert check_tasks(cfg, {"a": {"tasks": None, "targets": None}}) == ["about", "repeat"]
    with pytest.raises(ConfigError, match=r"variants.a: tasks about, but .*repeat.jsonl holds targets of repeat"):
        check_tasks(cfg, {"a": {"tasks": ["about"], "targets": repeat}})
    transcripts = written("transcripts.jsonl", ["transcription"])
    check_tasks(
        cfg, {"asr": {"tasks": ["transcription"], "targets": transcripts}}
    )  # the benchmark does not ask a control
    cfg.benchmark.trained_tasks = ["repeat"]
    with pytest.raises(ConfigError, match="benchmark.trained_tasks is repeat: the columns"):
        check_tasks(cfg, {"full": {}})
    cfg.benchmark.trained_tasks = None
    assert check_tasks(cfg, {"full": {}}) == ["about", "repeat"]  # what the benchmark is told
    cfg.benchmark.unseen_tasks = ["reply", "about"]
    with pytest.raises(ConfigError, match="hold about, which benchmark.unseen_tasks"):  # before anything is trained
        check_tasks(cfg, {"full": {}})
    cfg.benchmark.unseen_tasks = None
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"id": "a"}\n')
    with pytest.raises(ConfigError, match=r"variants.full: tasks \(all\), but .*empty.jsonl holds targets of no task"):
        check_tasks(cfg, {"full": {"targets": str(empty)}})
    cfg.benchmark.trained_tasks = ["repeat", "about", "title"]
    with pytest.raises(ConfigError, match="Name what is trained"):
        check_tasks(cfg, {"full": {}})


def test_recordings_in_which_nothing_is_said_are_no_task(tmp_path):
    manifest = tmp_path / "train.jsonl"
    lines = [{"id": task, "custom": {"targets": [{"task": task}]}} for task in ("repeat", "no_speech")]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for trained in (["repeat"], None):
        cfg = OmegaConf.create({"targets": {"train": str(manifest)}, "benchmark": {"trained_tasks": trained}})
        assert check_tasks(cfg, {"full": {}}) == ["repeat"]


def test_what_holds_for_all_variants_may_add_to_their_source(tmp_path):
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("")
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        own = [f"output_dir={tmp_path}", "cuts={a: b}", f"targets={{train: {manifest}, validation: v}}"]
        cfg = compose("ablate", own)
        OmegaConf.set_struct(cfg, False)
        cfg.train["+data.train_ds.input_cfg.0.perturb_speed"] = [0.9, 1.1]
        values = train_values(cfg, {"tasks": ["repeat"]}, tmp_path / "x", 0)
        entry = compose("train", overrides(values)).data.train_ds.input_cfg[0]
    assert entry.perturb_speed == [0.9, 1.1] and entry.tasks == ["repeat"] and entry.cuts_path == str(manifest)
