"""Training data from object storage: a real S3 server of this machine, through Lhotse's own readers."""

import pytest
import torch
from lhotse import CutSet
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.conversation import read_mtbi
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.errors import DataError
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.generate import TargetGenerator

moto_server = pytest.importorskip("moto.server", reason="needs moto: make test-all installs it")
boto3 = pytest.importorskip("boto3")
pytestmark = [pytest.mark.functional, pytest.mark.slow]


@pytest.fixture
def bucket(monkeypatch):
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    own = boto3.resource("s3").Bucket("corpus")
    own.create()
    yield own
    server.stop()


@pytest.mark.parametrize("cached", [False, True])
def test_shar_in_a_bucket_gives_the_batches_of_its_folder(bucket, manifest, tiny_config, tiny_llm, tmp_path, cached):
    encoder = FrozenEncoder(OmegaConf.create({k: v for k, v in tiny_config.items() if k != "imitation"}))
    if cached:
        cache_features(encoder, manifest)
    settings = {"dtype": "float32", "prompt_format": "chatml", "filters": ["empty"], "max_new_tokens": 4, "top_k": 4}
    folders = {"output_dir": str(tmp_path / "targets"), "shar_dir": str(tmp_path / "shar"), "shar_size": 2}
    TargetGenerator(
        TargetsConfig({"train": str(manifest)}, llm=tiny_llm, task_names=["repeat"], **settings, **folders)
    ).run()
    folder = tmp_path / "shar" / "train"
    fields: dict[str, str] = {}
    for file in sorted(f for f in folder.iterdir() if f.suffix != ".idx"):  # Lhotse 2 writes indexes beside archives
        bucket.upload_file(str(file), f"train/{file.name}")
        name, number, suffix = file.name.split(".", 2)
        assert number in ("000000", "000001")
        fields[name] = f"s3://corpus/train/{name}.{{000000..000001}}.{suffix}"
    dataset = MTBIDataset(
        AutoTokenizer(tiny_llm, use_fast=True),
        "chatml",
        cached_features=cached,
        encoder_key=encoder.key,
        teacher_temperature=1.0,
    )

    def batch(path):
        entry = {"audio_locator_tag": "<|audio|>", "force_finite": True, "shar_path": path}
        items = list(read_mtbi(OmegaConf.create(entry))[0])
        return dataset[CutSet(sorted(items, key=lambda c: c.id))]

    here, there = batch(str(folder)), batch(fields)
    assert len(there["examples"]) == 3 and [e.id for e in there["examples"]] == [e.id for e in here["examples"]]
    for key in ("teacher_ids", "teacher_log_probs", "encoder_features" if cached else "audios"):
        assert torch.equal(here[key], there[key]), key
    lost = fields | {"cuts": fields["cuts"].replace("cuts.", "nowhere.")}
    with pytest.raises(DataError, match=r"s3://corpus/train/nowhere"):
        batch(lost)
