"""Cached features belong to one span of one audio; manifests and cuts of every kind are taken or refused by name."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording
from lhotse.audio import AudioLoadingError
from lhotse.cut import MultiCut

from nemo_mtbi.corpus.failures import raise_if_of_the_machine, sources_of
from nemo_mtbi.corpus.shards import plan_manifest
from nemo_mtbi.data.conversation import check_manifest
from nemo_mtbi.data.feature_cache import FEATURES_FIELD, features_key, load_array
from nemo_mtbi.data.perturbation import perturbed
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.io import jsonl
from nemo_mtbi.io.tables import read_table
from nemo_mtbi.preparation import cache_features as caching
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from tests.unit.preparation.test_cache_features import encoder_config

pytestmark = pytest.mark.unit


@pytest.fixture
def encoder(tiny_config):
    return FrozenEncoder(encoder_config(tiny_config))


def first(manifest):
    return next(iter(CutSet.from_file(manifest)))


@pytest.mark.parametrize(
    "change",
    [
        lambda cut: cut.truncate(duration=0.5),
        lambda cut: cut.truncate(offset=0.2),
        lambda cut: cut.perturb_speed(1.5, affix_id=False),
        lambda cut: cut.perturb_volume(2.0, affix_id=False),
        lambda cut: next(iter(CutSet.from_cuts([cut]).cut_into_windows(0.4))),
        lambda cut: cut.pad(duration=9.0),
        lambda cut: cut.append(cut.with_id("other")),
    ],
    ids=["shorter", "later", "faster", "louder", "window", "padded", "appended"],
)
def test_features_of_the_whole_are_not_those_of_a_part(manifest, encoder, change):
    cache_features(encoder, manifest)
    cut = first(manifest)
    assert len(load_array(cut, FEATURES_FIELD, encoder.key))
    with pytest.raises(DataError):
        load_array(change(cut), FEATURES_FIELD, encoder.key)


def test_our_own_speeds_have_features_of_theirs(manifest, encoder):
    cache_features(encoder, manifest, perturb_speed=[0.9])
    cut = first(manifest)
    slow = perturbed(cut.resample(8000), 0.9)
    assert len(load_array(slow, FEATURES_FIELD, encoder.key)) > len(load_array(cut, FEATURES_FIELD, encoder.key))
    with pytest.raises(DataError, match="are of"):
        load_array(perturbed(cut.truncate(duration=0.5), 0.9), FEATURES_FIELD, encoder.key)


def test_channels_of_multicuts_have_keys_of_their_own(tmp_path):
    soundfile.write(tmp_path / "four.wav", np.random.default_rng(0).standard_normal((8000, 4)), 16000)
    recording = Recording.from_file(tmp_path / "four.wav")
    keys = {
        features_key(MultiCut(id="m", start=0, duration=0.5, channel=channels, recording=recording), "e")
        for channels in ([0, 1], [2, 3], [0, 1, 2, 3])
    }
    assert len(keys) == 3


@pytest.mark.parametrize("name", ["cuts.json", "cuts.yaml", "cuts.jsonl.zst"])
def test_a_manifest_of_another_kind_stays_as_it_is(manifest, encoder, name):
    other = manifest.with_name(name)
    other.write_bytes(manifest.read_bytes())
    with pytest.raises(ConfigError, match="manifests of lines"):
        cache_features(encoder, other)
    assert other.read_bytes() == manifest.read_bytes()


def test_what_a_link_points_to_gets_the_features(manifest, encoder, tmp_path):
    link = tmp_path / "links" / "mine.jsonl"
    link.parent.mkdir()
    link.symlink_to(manifest)
    cache_features(encoder, link)
    assert link.is_symlink() and FEATURES_FIELD in first(manifest).custom


def test_cuts_that_cannot_have_features_cost_the_others_nothing(manifest, encoder):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["supervisions"][0]["text"] = "half a character \ud83d"
    without = {**rows[1], "id": "none"}
    del without["recording"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows, without]))
    report = cache_features(encoder, manifest, perturb_speed=[0.9])
    assert report.skipped == 1 and len(manifest.read_text().splitlines()) == len(rows)
    assert json.loads(manifest.read_text().splitlines()[0])["supervisions"][0]["text"] == "half a character \ud83d"
    left_out = jsonl.read(manifest.with_suffix(".features") / "left_out.jsonl")
    assert [(r["id"], r["reason"]) for r in left_out] == [("none", "has no recording")]


def test_blank_lines_and_empty_archives(manifest, tmp_path):
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([lines[0], "", *lines[1:], "", ""]))
    shards = plan_manifest("m", str(manifest), tmp_path / "plan", 2)
    assert [cut.id for shard in shards for cut in shard.cuts()] == [json.loads(line)["id"] for line in lines]
    jsonl_gz = tmp_path / "empty.jsonl.gz"
    with caching.jsonl.replacing(jsonl_gz, "part"):
        pass
    with pytest.raises(DataError, match="is empty"):
        check_manifest(str(jsonl_gz))
    with pytest.raises(DataError, match="nothing in it"):
        plan_manifest("e", str(jsonl_gz), tmp_path / "other", 2)


def test_tables_with_a_mark_and_quotes_and_from_a_pipe(tmp_path):
    rows = '"path","text"\r\n"a.wav","hello, you"\r\n'
    (tmp_path / "t.csv").write_bytes(("\ufeff" + rows).encode())
    [row] = read_table(tmp_path / "t.csv", {"path", "text"})
    assert row.cells == {"path": "a.wav", "text": "hello, you"}
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(b"path\ttext\na.wav\thello\n")
    [row] = read_table(Path(f"/dev/fd/{reading}"), {"path", "text"})
    os.close(reading)
    assert row.cells["text"] == "hello"


@pytest.mark.parametrize("number", [107, 116, 24, 12], ids=["ENOTCONN", "ESTALE", "EMFILE", "ENOMEM"])
def test_what_lhotse_says_of_a_lost_mount(number):
    said = f"Reading audio from 'a.wav' failed. Details:\n * OSError: [Errno {number}] no luck: 'a.wav'"
    with pytest.raises(OSError, match=f"Errno {number}"):
        raise_if_of_the_machine(AudioLoadingError(said))
    raise_if_of_the_machine(AudioLoadingError("[Errno 2] No such file or directory"))


def test_too_many_open_files_leave_the_manifest_as_it_was(manifest, encoder, monkeypatch):
    """The real error, of the recording's own file."""
    cut, before, held = first(manifest), manifest.read_text(), []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with pytest.raises(OSError):
            while True:
                held.append(open(manifest, "rb"))
        try:
            cut.load_audio()
            raised = None
        except Exception as error:
            raised = error
        with pytest.raises(OSError, match="Too many open files"):
            raise_if_of_the_machine(raised, sources_of(cut))
    finally:
        for stream in held:
            stream.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert manifest.read_text() == before
