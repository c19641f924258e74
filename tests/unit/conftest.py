"""Fixtures that several unit tests share."""

import json

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.preparation.sources import utterance_cut
from tests.unit.data_helpers import TARGETS


@pytest.fixture(scope="module")
def nemo_asr(tmp_path_factory) -> str:
    """A one-layer Conformer CTC model with random weights, saved as NeMo saves it."""
    from nemo.collections.asr.models import EncDecCTCModel

    labels = list(" abcdefghijklmnopqrstuvwxyz'")
    config = OmegaConf.create(
        {
            "sample_rate": 16000,
            "labels": labels,
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": 16000,
                "features": 16,
                "window_size": 0.025,
                "window_stride": 0.01,
                "dither": 0.0,
            },
            "encoder": {
                "_target_": "nemo.collections.asr.modules.ConformerEncoder",
                "feat_in": 16,
                "n_layers": 1,
                "d_model": 16,
                "n_heads": 2,
                "subsampling_factor": 4,
                "subsampling_conv_channels": 16,
                "conv_kernel_size": 5,
            },
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                "feat_in": 16,
                "num_classes": len(labels),
                "vocabulary": labels,
            },
        }
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("asr") / "tiny.nemo"
    EncDecCTCModel(cfg=config).save_to(str(path))
    return str(path)


@pytest.fixture
def manifest(tmp_path):
    """Three utterances with targets; the second one's audio is broken afterwards."""
    cuts = []
    for i, seconds in enumerate((1.0, 1.5, 2.2)):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(round(16000 * seconds)), 16000)
        cut = utterance_cut(
            f"utt{i}", path, "one two three", "s", "en", {"targets": [t.to_dict() for t in TARGETS[:2]]}
        )
        cuts.append(cut)
    CutSet(cuts).to_file(tmp_path / "cuts.jsonl")
    return tmp_path / "cuts.jsonl"


@pytest.fixture
def labels(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.ones(8000), 16000)
    rows = [("a.wav", {"size": "small", "milkType": "soy milk"}), ("b.wav", {"size": "large"})]
    lines = ["path\tslots", *(f"{path}\t{json.dumps(slots)}" for path, slots in rows)]
    (tmp_path / "labels.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path
