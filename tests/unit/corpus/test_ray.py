"""Corpus steps on a real Ray cluster: a head and two more nodes, processes of this machine."""

import shutil
import threading
import time
from functools import partial

import pytest
from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi.corpus.execution import RAY, spread
from nemo_mtbi.corpus.ray_data import RayConfig
from nemo_mtbi.errors import ConfigError, DataError, MTBIError
from nemo_mtbi.preparation import cache_features as caching
from nemo_mtbi.preparation.prepare import Preparation
from nemo_mtbi.preparation.sources import SourceConfig
from nemo_mtbi.targets import workers
from tests.unit import preparation_helpers, targets_helpers
from tests.unit.corpus_helpers import doubled, dying_once, impossible

pytest.importorskip("ray", reason="needs Ray: pip install nemo-mtbi[ray]")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        own.add_node(num_cpus=1)
    yield own
    own.shutdown()


def test_results_errors_and_deaths(cluster, tmp_path):
    config = RayConfig(cluster.address, cpus=0.5)
    assert sorted(spread(partial(doubled, str(tmp_path)), range(50), RAY, 2, config, chunk=5)) == [*range(0, 100, 2)]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(DataError, match="-3 is negative"):
        list(spread(partial(doubled, str(tmp_path)), [1, 2, -3], RAY, 1, config))
    with pytest.raises(ConfigError, match="no such model"):
        list(spread(impossible, [1, 2], RAY, 1, config))
    with pytest.raises(MTBIError, match="A worker of the Ray cluster failed: TypeError: "):
        list(spread(partial(doubled, str(tmp_path)), ["a"], RAY, 1, config))
    found = sorted(spread(partial(dying_once, str(tmp_path)), range(20), RAY, 2, config))
    assert found == [*range(0, 40, 2)] and (tmp_path / "died").exists()


def test_a_node_dies_and_nothing_is_lost_or_doubled(cluster, tmp_path):
    doomed = cluster.add_node(num_cpus=2)

    def kill_soon():
        while len(list(tmp_path.iterdir())) < 4:
            time.sleep(0.05)
        time.sleep(0.3)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill_soon)
    killer.start()
    found = list(spread(partial(doubled, str(tmp_path)), range(300), RAY, 4, RayConfig(cluster.address)))
    killer.join()
    assert sorted(found) == [*range(0, 600, 2)]
    assert len(list(tmp_path.iterdir())) > 4  # its worker began again elsewhere


def test_what_no_node_has_is_refused(cluster):
    with pytest.raises(ConfigError, match=r"takes 64 CPU and 0 GPU \(ray.cpus, ray.gpus\), which no node has"):
        list(spread(partial(doubled, ""), [1], RAY, 1, RayConfig(cluster.address, cpus=64)))


def test_an_address_that_does_not_answer():
    with pytest.raises(ConfigError, match="no Ray cluster answers there"):
        list(spread(partial(doubled, ""), [1], RAY, 1, RayConfig("127.0.0.1:9")))


def test_prepare_writes_the_same_as_here(cluster, tmp_path):
    for i in range(70):
        preparation_helpers.tone(tmp_path / "audio" / f"{i}.wav", 0.5 + 0.01 * i)
    preparation_helpers.tone(tmp_path / "folder" / "a.wav").with_suffix(".txt").write_text("hello")
    rows = "".join(f"audio/{i}.wav\thello there\n" for i in range(70))
    (tmp_path / "t.tsv").write_text("path\ttranscript\n" + rows)
    written = {}
    for executor in ("local", RAY):
        source = SourceConfig("tsv", path=str(tmp_path / "t.tsv"))
        folder = SourceConfig("folder", path=str(tmp_path / "folder"))  # its entries are local functions
        config = preparation_helpers.config(tmp_path / executor, source, folder, executor=executor, workers=2)
        config.ray = RayConfig(cluster.address)
        written[executor] = {name: path.read_bytes() for name, path in Preparation(config).run().items()}
    assert written["local"] == written[RAY] and sum(map(len, written[RAY].values()))


def test_features_and_targets_are_the_same_as_here(cluster, tmp_path, manifest, tiny_config, tiny_llm, monkeypatch):
    monkeypatch.setattr(caching, "SHARD_CUTS", 1)
    model = OmegaConf.create({k: v for k, v in tiny_config.items() if k != "imitation"})
    cached, answered = {}, {}
    for executor in ("local", RAY):
        folder = tmp_path / executor
        folder.mkdir()
        own = shutil.copy(manifest, folder / "cuts.jsonl")
        report = caching.cache_features(
            model, own, executor=executor, workers=2 if executor == RAY else 1, ray=RayConfig(cluster.address)
        )
        assert report.encoded == 3
        cached[executor] = [c.load_custom("encoder_features").tolist() for c in CutSet.from_file(own)]
        cuts = targets_helpers.write_cuts(folder / "text.jsonl", 12)
        config = targets_helpers.config(folder, tiny_llm, cuts, shard_cuts=4, executor=executor, workers=2)
        config.ray = RayConfig(cluster.address)
        path = workers.run(config)["train"]
        answered[executor] = path.read_text().replace(str(folder), "")
    assert cached["local"] == cached[RAY]
    assert answered["local"] == answered[RAY] and answered[RAY].count("\n") == 12
