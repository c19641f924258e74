"""Manifests and settings for the tests of target generation."""

from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording

from nemo_mtbi import registration as registration
from nemo_mtbi.targets.config import TargetsConfig


def write_cuts(path, count, text=lambda i: f"sentence number {i} is here"):
    cuts = [
        MonoCut(
            f"utt{i}",
            0,
            1.0,
            0,
            recording=dummy_recording(i),
            supervisions=[SupervisionSegment(f"utt{i}", f"dummy-recording-{i:04d}", 0, 1.0, text=text(i), speaker="s")],
        )
        for i in range(count)
    ]
    CutSet(cuts).to_file(path)
    return str(path)


def config(tmp_path, tiny_llm, cuts, **changes):
    values = {
        "cuts": {"train": cuts},
        "output_dir": str(tmp_path / "targets"),
        "llm": tiny_llm,
        "dtype": "float32",
        "batch_size": 8,
        "prompt_format": "chatml",
        "task_names": ["repeat", "about"],
        "filters": ["empty"],
        "top_k": 4,
    }
    return TargetsConfig(**{**values, **changes})
