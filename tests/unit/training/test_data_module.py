"""Each term of the loss is divided by its own count over the whole optimizer step; a resumed run draws what is next."""

import json
import pickle
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from lhotse import CutSet
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from nemo_mtbi import registration
from nemo_mtbi.checkpoints.run_directory import RunDirectory
from nemo_mtbi.data import cut_lines
from nemo_mtbi.data.rendering import PromptRenderer
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.examples import train as train  # registers the schema of its YAML
from nemo_mtbi.examples._launcher import CONF
from nemo_mtbi.models.objective import KINDS, WINDOW_COUNTS
from nemo_mtbi.modules.connectors.ctc_vocabulary import count_tokens
from nemo_mtbi.modules.perception import connector_of
from nemo_mtbi.preparation.sources import utterance_cut
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.generate import TargetGenerator
from nemo_mtbi.training import stages
from nemo_mtbi.training.data_module import WindowedLoader, data_module, enough
from nemo_mtbi.training.resume import Dealt, LaterBatches, spare_workers, with_sampler
from tests.helpers import assert_same, build, gradients, make_batch, split
from tests.unit.data_helpers import BUCKETS, TARGETS, begun_twice, training_loader

pytestmark = pytest.mark.unit
CTC = {
    "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
    "vocab_size": 60,
    "d_model": 32,
    "heads": 4,
    "dropout": 0.0,
}


@pytest.fixture
def model(tiny_config):
    tiny_config["perception"]["modality_adapter"] = CTC
    model = build(tiny_config, imitation={"w_ctc": 0.5, "w_align": 0.3})
    model.set_ctc_vocabulary(
        model.tokenizer.tokenizer("one two three four five six")["input_ids"] + list(range(300, 354))
    )
    return model


@pytest.mark.parametrize("sizes", [[8], [4, 4], [1, 2, 5]])
def test_terms_do_not_depend_on_how_a_step_is_cut(model, sizes):
    batch = make_batch(model, 8)
    expected = gradients(model, [batch])
    parts = list(WindowedLoader(split(batch, sizes), len(sizes), connector_of(model.perception)))
    assert len(parts) == len(sizes) and all(set(p[WINDOW_COUNTS]) == set(KINDS) for p in parts)
    assert_same(gradients(model, parts), expected)


def test_other_responses_leave_the_transcription_term_its_weight(model):
    """Once it was divided by response tokens: tasks with long answers trained recognition less."""

    def transcription_part(extra):
        batch = make_batch(model, 4)
        batch["examples"] = [replace(e, response_ids=e.response_ids + [7] * extra) for e in batch["examples"]]
        parts = []
        for w_ctc in (0.0, 1.0):
            model.config.imitation.w_ctc, model.config.imitation.w_align = w_ctc, 0.0
            parts.append(gradients(model, [batch]))
        return {n: parts[1][n] - parts[0].get(n, torch.zeros_like(parts[1][n])) for n in parts[1]}

    short, long = transcription_part(0), transcription_part(20)
    assert_same(long, short, 1e-3)


def ids_of_batches(manifest, model, step, count, workers, iterable, rank=0, ranks=1):
    """Ids of training batches from ``step`` on."""
    section = {"num_workers": workers, "force_iterable_dataset": iterable, "shuffle_buffer_size": 60, "batch_size": 2}
    entry = {"cuts_path": str(manifest), "seed": 7}
    loader = training_loader(model, entry, step, rank, ranks, shard_seed=7, **section)
    return [[e.id for e in batch["examples"]] for batch in islice(begun_twice(loader), count)]


@pytest.mark.parametrize(("workers", "iterable"), [(0, False), (2, False), (2, True)])
def test_a_resumed_run_goes_on_with_the_next_batch(many, model, workers, iterable):
    whole = ids_of_batches(many, model, 0, 9, workers, iterable)
    assert len({i for batch in whole for i in batch}) > 10  # workers draw differently
    assert ids_of_batches(many, model, 3, 6, workers, iterable) == whole[3:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_that_draw_have_parts_of_their_own(many, model, shuffle):
    """All workers of all ranks once walked through the same lines."""
    drawn = []
    for rank in range(2):
        section = {"num_workers": 2, "force_iterable_dataset": True, "batch_size": 2, "shuffle": shuffle}
        loader = training_loader(model, {"cuts_path": str(many)}, 0, rank, 2, shard_seed=7, **section)
        drawn += [e.id.split("/")[0] for batch in islice(iter(loader), 10) for e in batch["examples"]]
    assert len(drawn) == 40 == len(set(drawn))


@pytest.mark.parametrize("buckets", [False, True])
def test_a_batch_holds_as_many_positions_as_it_may(many, tiny_config, buckets):
    """What the LLM computes, counted where it is laid out; no example is lost for being long."""
    model, most = build(tiny_config), 150
    section = {"bucket_buffer_size": 40, "num_cuts_for_bins_estimate": 40, **BUCKETS, "use_bucketing": buckets}
    entry = {"cuts_path": str(many)}
    loader = training_loader(model, entry, shard_seed=7, batch_size=None, batch_tokens=most, **section)
    batches = list(islice(iter(loader), 40))
    with torch.no_grad():
        held = [sum(model.student(batch, interleave=False).layout.row_lengths) for batch in batches]
    assert max(held) <= most and sum(held) > 0.75 * most * len(held), held
    assert {e.id.split("/")[0] for batch in batches for e in batch["examples"]} == {f"utt{i}" for i in range(40)}


@pytest.mark.parametrize("speech_position", ["after", "before"])
def test_batches_are_drawn_without_tokenizing(many, tiny_llm, tiny_config, tmp_path, monkeypatch, speech_position):
    """By the positions that the targets know: the same batches and examples as by rendering every prompt, unless the
    targets are of another format."""
    settings = {"dtype": "float32", "prompt_format": "chatml", "filters": ["empty"], "max_new_tokens": 4}
    folder, names = str(tmp_path / "targets"), ["repeat", "about"]
    config = TargetsConfig({"train": str(many)}, folder, tiny_llm, task_names=names, speech_position=speech_position)
    written = TargetGenerator(replace(config, **settings)).run()["train"]
    model = build(tiny_config)
    model.config.speech_position = speech_position
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    targets = [t for row in rows for t in row["custom"]["targets"]]
    assert len(targets) > 60 and all(len(t["positions"]) == 3 for t in targets)

    def drawn(**without):
        for target in targets:
            target |= without
        written.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loader = training_loader(model, {"cuts_path": str(written)}, batch_size=None, batch_tokens=300)
        lengths = [c.total_length for batch in islice(iter(loader._source.sampler), 8) for c in batch]
        return lengths, [batch["examples"] for batch in islice(iter(loader), 8)]

    rendered, render = [], PromptRenderer.render
    monkeypatch.setattr(registration.PromptRenderer, "render", lambda *a: rendered.append(1) or render(*a))
    lengths, examples = drawn()
    count = sum(map(len, examples))
    assert len(rendered) <= count + 2  # in the loader, once each; and the data module's probe
    other = {t["rendering"] for t in targets}.pop().replace("chatml", "llama3")
    assert drawn(positions=[]) == (lengths, examples) and len(rendered) > 2 * count
    section = {"datasets": {"other": {"input_cfg": [{"type": "mtbi", "cuts_path": str(written)}], "max_tpt": 0.001}}}
    section = {"validation_ds": {**section, "batch_size": 2, "use_multimodal_sampling": True}}
    data = data_module(OmegaConf.create({"cached_features": False, **section}), model)
    data._get_dp_rank, data._get_world_size = lambda: 0, lambda: 1
    assert not list(data.val_dataloader().flattened[0])  # NeMo's filter finds the tokens, and no example so short
    model.references["llm"] = ""  # else the other format is refused
    assert drawn(positions=[7, 1, 2], rendering=other) == (lengths, examples)


def test_ranks_draw_their_own_share(many, model, monkeypatch):
    """Each as many cuts for its batches as one alone, not those of all; and each goes on where it stopped."""
    read = []
    parse = cut_lines.deserialize_item
    monkeypatch.setattr(cut_lines, "deserialize_item", lambda line: read.append(line["id"]) or parse(line))
    ids, read_by = [], []
    alone = ids_of_batches(many, model, 0, 20, 0, False)
    read.clear()
    for rank in range(4):
        whole = ids_of_batches(many, model, 0, 5, 0, False, rank, 4)
        assert ids_of_batches(many, model, 2, 3, 0, False, rank, 4) == whole[2:]
        ids.append(whole)
        read_by.append(len(set(read)))
        read.clear()
    assert all(count <= 12 for count in read_by)
    for step in range(5):  # without buckets the ranks' batches of a step are those of one rank in four micro-batches
        assert [own[step] for own in ids] == alone[4 * step : 4 * step + 4]


def test_workers_that_draw_must_be_there(many, model):
    with pytest.raises(ConfigError, match="num_workers to at least 1"):
        ids_of_batches(many, model, 0, 1, 0, True)


@pytest.fixture
def many(tmp_path):
    """Forty short utterances with targets."""
    cuts = []
    for i in range(40):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(3200), 16000)
        cuts.append(
            utterance_cut(f"utt{i}", path, "one two three", "s", "en", {"targets": [t.to_dict() for t in TARGETS]})
        )
    CutSet(cuts).to_file(tmp_path / "many.jsonl")
    return tmp_path / "many.jsonl"


def test_seeds_draw_other_tasks_and_the_same_validation_on_all_ranks(many, model):
    """A repeated experiment draws tasks, wordings and spans anew; a validation set of two manifests is not."""

    def asked(seed):
        loader = training_loader(model, {"cuts_path": str(many)}, seed=seed, batch_size=4)
        return {e.id.split("/")[0]: e.prompt_id for batch in islice(iter(loader), 10) for e in batch["examples"]}

    zero, one = asked(0), asked(1)
    assert zero.keys() == one.keys() and asked(0) == zero
    assert sum(zero[i] != one[i] for i in zero) > len(zero) / 3
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        own = compose("train", ["output_dir=x", "seed=3"])
    assert own.model.interleaving.seed == 3 == own.data.train_ds.seed
    entries = [{"type": "mtbi", "cuts_path": str(many)} for _ in range(2)]
    section = {"datasets": {"both": {"input_cfg": entries}}, "batch_size": 2, "use_multimodal_sampling": True}
    seen = []
    for rank in range(3):
        data = data_module(OmegaConf.create({"cached_features": False, "validation_ds": section}), model)
        data._get_dp_rank, data._get_world_size = lambda rank=rank: rank, lambda: 3
        own = list(data.val_dataloader().flattened[0])
        assert len(own) == 14  # of 40 batches
        seen += [e.id.split("/")[0] for batch in own if batch is not None for e in batch["examples"]]
    assert sorted(seen) == sorted(2 * [f"utt{i}" for i in range(40)])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_batch_goes_to_one_rank_and_all_have_as_many(ranks):
    for total in range(0, 20):
        whole = [[number] for number in range(total)]
        own = [list(Dealt(whole, rank, ranks)) for rank in range(ranks)]
        assert len(set(map(len, own))) == 1
        assert sorted(number for part in own for batch in part for number in batch) == list(range(total))


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, number):
        time.sleep(0.05)
        return number


def test_workers_outlive_the_sigterm_of_their_process_group():
    """As torchrun and SLURM send it; the step that is finished before the checkpoint needs their batches."""
    loader = DataLoader(Numbers(), sampler=range(40), batch_size=None, num_workers=2)
    spare_workers(loader)
    batches = iter(with_sampler(loader, range(40)))
    got = [next(batches)]
    for worker in batches._workers:
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # by another process than their parent
    got += list(batches)
    assert got == list(range(40))
    batches = iter(loader)
    assert next(batches) == 0
    for worker in batches._workers:
        worker.terminate()  # as their parent does when it ends
        worker.join(timeout=10)
        assert worker.exitcode == 0
    batches._workers_status = [False] * 2


def test_one_process_of_a_job_counts_the_transcripts(many, model, tmp_path, monkeypatch):
    """Ranks that start together on one file system: the first counts, the others read its file."""
    counted = []

    def slowly(transcripts, tokenizer):
        counted.append(1)
        time.sleep(0.3)
        return count_tokens(transcripts, tokenizer)

    monkeypatch.setattr(stages, "count_tokens", slowly)
    entry = {"type": "mtbi", "cuts_path": str(many)}
    cfg = OmegaConf.create({"model": model.cfg, "init_from": None, "data": {"train_ds": {"input_cfg": [entry]}}})
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(stages.ctc_tokens, cfg, model.config, RunDirectory(tmp_path / "run")) for _ in range(4)]
    results = [job.result() for job in jobs]
    assert len(counted) == 1 and all(r == results[0] for r in results) and len(results[0]) > 3


@pytest.mark.parametrize(
    ("given", "gpu", "workers"), [("auto", True, 4), ("auto", False, 0), (3, True, 3), (None, True, 0)]
)
def test_workers_read_beside_a_gpu(model, many, monkeypatch, given, gpu, workers):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    section = OmegaConf.create({"input_cfg": [{"type": "mtbi", "cuts_path": str(many)}], "num_workers": given})
    cfg = {"cached_features": False, "train_ds": section, "validation_ds": section}
    data = data_module(OmegaConf.create(cfg), model)
    assert data.cfg.train_ds.num_workers == data.cfg.validation_ds.num_workers == workers


@pytest.mark.parametrize("given", ["many", -1, 1.5, True])
def test_a_number_of_workers_that_is_none_is_refused(model, many, given):
    section = {"input_cfg": [{"type": "mtbi", "cuts_path": str(many)}], "num_workers": given}
    with pytest.raises(ConfigError, match="num_workers"):
        data_module(OmegaConf.create({"cached_features": False, "train_ds": section}), model)


def test_a_skipping_sampler_travels_to_spawned_workers():
    copy = pickle.loads(pickle.dumps(LaterBatches([1, 2, 3], 1)))
    assert list(copy) == [2, 3]


def test_the_vocabulary_of_another_run_is_only_read(many, model, tmp_path):
    other = tmp_path / "other"
    (other / "alignment").mkdir(parents=True)
    (other / "alignment" / "trained.safetensors").touch()
    (other / "ctc_tokens.json").write_text("[5, 6, 7]")
    entry = {"type": "mtbi", "cuts_path": str(many)}
    cfg = {"model": model.cfg, "init_from": str(other), "data": {"train_ds": {"input_cfg": [entry]}}}
    assert stages.ctc_tokens(OmegaConf.create(cfg), model.config, RunDirectory(tmp_path / "run")) == [5, 6, 7]
    assert {p.name for p in other.iterdir()} == {"alignment", "ctc_tokens.json"}


@pytest.mark.parametrize(("cuts", "batch", "expected"), [(3, 4, 32), (100, 4, 100), (900, 4, 400), (100, None, 128)])
def test_buffers_hold_what_small_data_can_fill(tmp_path, cuts, batch, expected):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text("{}\n" * (cuts // 3))
    files[1].write_text("{}\n" * (cuts - cuts // 3))
    entries = [{"type": "mtbi", "cuts_path": str(file)} for file in files]
    section = OmegaConf.create({"num_buckets": 8, "batch_size": batch, "input_cfg": entries})
    assert enough(section, 400) == expected
    section.input_cfg[0] = {"type": "mtbi", "shar_path": "/data/shar"}
    assert enough(section, 400) == 400
