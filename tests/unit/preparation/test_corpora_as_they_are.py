"""What corpora hold that is no clean list of files: channels, shared recordings, repeated names, corrections."""

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from nemo_mtbi.corpus.failures import raise_if_of_the_machine
from nemo_mtbi.data.feature_cache import features_key
from nemo_mtbi.data.rendering import TimedWord
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.describe import all_words, load_attributes
from nemo_mtbi.preparation.noisy import NoiseConfig
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig, Sharing, SplitConfig
from nemo_mtbi.preparation.sources import Entry, SourceConfig, read_cuts, read_shar
from nemo_mtbi.preparation.voice_measures import measure
from nemo_mtbi.preparation.word_times import TextGrids, Unalignable
from tests.unit.preparation_helpers import text_grid

pytestmark = pytest.mark.unit
RATE = 16_000


def audio(path, seconds=1.0, channels=1, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * RATE), channels))
    soundfile.write(path, noise, RATE)
    return path


def prepared(tmp_path, *sources, **changes):
    config = PrepareConfig(str(tmp_path / "out"), list(sources), aligner="none", **changes)
    written = Preparation(config).run()
    return [cut for path in written.values() for cut in CutSet.from_file(path)]


def reasons(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())["skipped_reasons"]


def test_channels_of_one_recording_have_features_of_their_own(tmp_path):
    recording = Recording.from_file(audio(tmp_path / "call.wav", channels=2))
    caller, agent = recording.to_cut().to_mono()
    assert features_key(caller, "e") != features_key(agent, "e")
    alone = Recording.from_file(audio(tmp_path / "one.wav")).to_cut()
    assert features_key(alone, "e") == features_key(alone, "e")


def test_words_without_times_are_no_pauses_and_no_noise():
    """As of words that are not in PocketSphinx's dictionary."""
    rng = np.random.default_rng(0)
    words = [(0.1 + 0.3 * i, 0.35 + 0.3 * i) for i in range(10)]
    samples = 1e-4 * rng.standard_normal(round(3.3 * RATE)).astype(np.float32)
    for begin, end in words:
        samples[round(begin * RATE) : round(end * RATE)] += 0.1 * rng.standard_normal(round((end - begin) * RATE))
    text = " ".join("abcdefghij")
    whole = measure(samples, RATE, words, text)
    partly = measure(samples, RATE, [None if i in (0, 3, 4, 7, 9) else w for i, w in enumerate(words)], text)
    assert partly["words_per_second"] == pytest.approx(whole["words_per_second"], rel=0.1)
    assert partly["pauses"] == whole["pauses"] == 0
    assert partly["snr_db"] == pytest.approx(whole["snr_db"], abs=3) and whole["snr_db"] > 30


def test_text_grids_of_one_name_belong_to_their_folders(tmp_path):
    for speaker, word in (("s1", "hello"), ("s2", "goodbye")):
        text_grid(tmp_path / "grids" / speaker / "001.TextGrid", (word, 0.1, 0.5))
    grids = TextGrids(tmp_path / "grids")
    for speaker, word in (("s1", "hello"), ("s2", "goodbye")):
        cut = (
            Recording.from_file(audio(tmp_path / "wavs" / speaker / "001.wav")).to_cut().with_id(f"wavs-{speaker}-001")
        )
        assert [w.text for w in grids.words(cut)] == [word]
    elsewhere = Recording.from_file(audio(tmp_path / "flat" / "001.wav")).to_cut().with_id("x")
    with pytest.raises(Unalignable, match="several TextGrids"):
        grids.words(elsewhere)


def test_names_that_are_no_utf_8_and_texts_with_half_characters_are_skipped(tmp_path):
    folder = tmp_path / "corpus"
    for name in (b"caf\xe9", b"good"):
        path = os.path.join(os.fsencode(folder), name)
        audio(folder / "good.wav")
        if name != b"good":
            os.rename(os.fsencode(folder / "good.wav"), path + b".wav")
        with open(path + b".txt", "w") as file:
            file.write("hello")
    assert [cut.id for cut in prepared(tmp_path, SourceConfig("folder", str(folder)))] == ["corpus-good"]
    assert reasons(tmp_path) == {"its name is no UTF-8": 1}


def test_recordings_without_samples_are_skipped_and_reasons_are_counted_together(tmp_path):
    folder = tmp_path / "corpus"
    for i, data in enumerate([b"", b"", b"RIFFxxxx", b"RIFFxxxx"]):
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.wav").write_bytes(data)
        (folder / f"{i}.txt").write_text("hello")
    soundfile.write(folder / "4.wav", np.zeros(0), RATE)
    (folder / "4.txt").write_text("hello")
    with pytest.raises(DataError, match="No utterance is left: all 5"):
        prepared(tmp_path, SourceConfig("folder", str(folder)), min_seconds=0.0)
    assert len(reasons(tmp_path)) <= 3 and not any("corpus" in reason for reason in reasons(tmp_path))


def cuts_manifest(tmp_path, **changes):
    recording = Recording.from_file(audio(tmp_path / "a.wav"))
    cut = recording.to_cut()
    own = {"text": "one", "gender": "male", "alignment": {"word": [AlignmentItem("one", 0.0, 0.4)]}, **changes}
    cut.supervisions = [SupervisionSegment("a", recording.id, 0.0, 1.0, **own)]
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    return SourceConfig("cuts", str(tmp_path / "cuts.jsonl"))


def test_corrections_of_cuts_are_taken(tmp_path):
    [first] = prepared(tmp_path, cuts_manifest(tmp_path))
    changed = {"gender": "female", "alignment": {"word": [AlignmentItem("one", 0.5, 0.4)]}}
    [second] = prepared(tmp_path, cuts_manifest(tmp_path, **changed))
    assert (first.supervisions[0].gender, second.supervisions[0].gender) == ("male", "female")
    assert second.supervisions[0].alignment["word"][0].start == 0.5


def test_noise_of_other_settings_is_another_file(tmp_path):
    files = []
    for snr in ([0.0, 0.0], [30.0, 30.0], [0.0, 0.0]):
        [cut] = prepared(tmp_path, cuts_manifest(tmp_path), noise=NoiseConfig(1.0, snr))
        files.append((cut.recording.sources[0].source, float(np.square(cut.load_audio()).mean())))
    assert files[0] == files[2] != files[1]


def test_nobody_is_in_two_splits():
    pairs = [Entry(f"e{i}", lambda: None, f"s{i}", "t", others=(f"s{i + 1}",)) for i in range(0, 30, 2)]
    alone = [Entry(f"a{i}", lambda: None, f"s{i + 1}", "t") for i in range(0, 30, 2)]
    split, together = SplitConfig(shares={"train": 0.5, "held_out": 0.5}), Sharing(pairs + alone).roots()
    for pair, single in zip(pairs, alone, strict=True):
        assert split.assign(pair, together) == split.assign(single, together)
    assert {split.assign(e, together) for e in pairs} == {"train", "held_out"}
    chain = Sharing(
        [Entry("x", lambda: None, "b", others=("c",)), Entry("y", lambda: None, "c", others=("a",))]
    ).roots()
    assert set(chain.values()) == {"a"}


def test_a_fixed_split_holds_for_all_who_share_recordings():
    shared, alone = (
        Entry("x", lambda: None, "b", others=("c",)),
        Entry("y", lambda: None, "c"),
    )
    together = Sharing([shared, alone]).roots()
    split = SplitConfig(shares={"train": 1.0}, speakers={"c": "held_out"})
    assert {split.assign(entry, together) for entry in (shared, alone)} == {"held_out"}
    with pytest.raises(ConfigError, match="a recording is in one split"):
        SplitConfig(speakers={"b": "train", "c": "held_out"}).assign(shared, together)


def test_an_error_of_ours_is_no_broken_recording(tmp_path, monkeypatch):
    def broken(*_):
        raise TypeError("ours")

    monkeypatch.setattr("nemo_mtbi.preparation.prepare.with_noise", broken)
    with pytest.raises(TypeError, match="ours"):
        prepared(tmp_path, cuts_manifest(tmp_path))


def test_aligned_parts_of_a_transcript_without_spaces():
    timed = [TimedWord("\u4eca\u65e5", 0.1, 0.4), TimedWord("\u6674\u308c", 0.5, 0.9)]
    assert all_words("\u4eca\u65e5\u6674\u308c", timed) == timed
    assert [w.text for w in all_words("one two", [TimedWord("two", 0.5, 0.9)])] == ["one", "two"]
    found = measure(np.zeros(RATE, np.float32), RATE, [(0.5, 0.9), (0.1, 0.4)], "a b")
    assert found["words_per_second"] == pytest.approx(2 / 0.8, abs=1e-3) and found["pauses"] == 0


def test_manifests_of_the_user_stay(tmp_path):
    [cut] = prepared(tmp_path, cuts_manifest(tmp_path), split=SplitConfig(shares={"one": 1.0}))
    mine = tmp_path / "out" / "cuts.train_small.jsonl"
    mine.write_text(json.dumps(cut.to_dict()) + "\n")
    prepared(tmp_path, cuts_manifest(tmp_path), split=SplitConfig(shares={"two": 1.0}))
    assert mine.is_file() and not (tmp_path / "out" / "cuts.one.jsonl").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.ESTALE, "stale"), MemoryError()])
def test_a_full_disk_is_no_broken_recording(error):
    wrapped = RuntimeError("cannot read")
    wrapped.__cause__ = error
    with pytest.raises(type(error)):
        raise_if_of_the_machine(wrapped)
    raise_if_of_the_machine(OSError(errno.ENOENT, "gone"))


def test_silence_and_half_files_with_a_transcript_are_skipped(tmp_path):
    folder = tmp_path / "corpus"
    audio(folder / "good.wav", 2.0)
    soundfile.write(folder / "zeros.wav", np.zeros(RATE), RATE)
    data = audio(folder / "half.wav", 4.0).read_bytes()
    (folder / "half.wav").write_bytes(data[: len(data) // 2])
    piped = audio(folder / "piped.wav", 2.0).read_bytes()  # as SoX writes to a pipe
    place = piped.index(b"data") + 4
    (folder / "piped.wav").write_bytes(piped[:place] + (0x7FFFF000).to_bytes(4, "little") + piped[place + 4 :])
    soundfile.write(folder / "good.au", np.zeros(RATE), RATE)  # of the same name
    for name in ("good", "zeros", "half", "piped"):
        (folder / f"{name}.txt").write_text("turn on the lights")
    kept = [cut.id for cut in prepared(tmp_path, SourceConfig("folder", str(folder)))]
    assert kept == ["corpus-good", "corpus-piped"]
    assert reasons(tmp_path) == {
        "another audio file has the same name": 1,
        "all samples are zero, and there is a transcript": 1,
        "the WAV file is shorter than its header says": 1,
    }


def test_ids_of_a_nemo_manifest_stay_when_lines_are_added(tmp_path):
    rows = [{"audio_filepath": str(audio(tmp_path / f"{i}.wav")), "text": "hi", "duration": 1.0} for i in range(4)]
    manifest = tmp_path / "m.json"

    def ids(lines):
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {
            cut.recording.sources[0].source: cut.id for cut in prepared(tmp_path, SourceConfig("nemo", str(manifest)))
        }

    before = ids(rows[1:])
    after = ids(rows)
    assert len(after) == 4 and {k: after[k] for k in before} == before
    ids([*rows, rows[0]])  # as corpora that are drawn with replacement have it
    assert reasons(tmp_path) == {"another line is the same": 1}
    texts = [rows[0] | {"text": "hallo", "lang": "de"}, {k: v for k, v in rows[1].items() if k != "text"}]
    more = ids([rows[0], *texts, rows[1]])  # another text of the same audio, a line without text
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("cuts.*.jsonl")) == 3
    assert more[rows[1]["audio_filepath"]] == after[rows[1]["audio_filepath"]]


def test_speakers_of_two_corpora_may_have_one_name(tmp_path):
    for name, gender in (("a", "m"), ("b", "f")):
        audio(tmp_path / name / "x.wav")
        (tmp_path / name / "t.tsv").write_text(f"path\ttranscript\tspeaker\tgender\nx.wav\thello\t1\t{gender}\n")

    def sources(*prefixes):
        return [
            SourceConfig("tsv", str(tmp_path / n / "t.tsv"), n, metadata=["gender"], speaker_prefix=prefix)
            for n, prefix in zip("ab", prefixes, strict=True)
        ]

    def voices(*prefixes):
        config = PrepareConfig(str(tmp_path / "out"), sources(*prefixes), aligner="none")
        config.describe.enabled = True
        Preparation(config).run()
        cuts = [cut for path in (tmp_path / "out").glob("cuts.*.jsonl") for cut in CutSet.from_file(path)]
        own = [cut.supervisions[0] for cut in cuts]
        return {(s.speaker, s.custom["description"].get("gender")) for s in own}

    assert voices("", "") == {("1", None)}  # one who is said to be both
    assert voices("", "b-") == {("1", "male"), ("b-1", "female")}


def test_supervisions_in_any_order_are_read_in_order_of_time(tmp_path):
    cut = Recording.from_file(audio(tmp_path / "a.wav", 2.0)).to_cut().with_id("a")
    late, early = [SupervisionSegment(n, "a", t, 0.9, text=n) for n, t in (("late", 1.0), ("early", 0.0))]
    cut.supervisions = [late, early]
    CutSet.from_cuts([cut]).to_file(tmp_path / "c.jsonl")
    text_grid(tmp_path / "grids" / "a.TextGrid", ("early", 0.0, 0.8), ("late", 1.0, 1.8))
    source = SourceConfig("cuts", str(tmp_path / "c.jsonl"))
    config = PrepareConfig(str(tmp_path / "out"), [source], aligner=f"textgrids:{tmp_path / 'grids'}")
    config.split.shares = {"train": 1.0}
    [found] = CutSet.from_file(Preparation(config).run()["train"])
    assert [s.alignment["word"][0].symbol for s in found.supervisions] == ["early", "late"]


def test_a_shar_is_known_by_its_metadata_until_a_cut_is_prepared(tmp_path):
    cuts = [Recording.from_file(audio(tmp_path / f"{i}.wav", 2.0, seed=i)).to_cut().with_id(f"c{i}") for i in range(6)]
    for cut in cuts:
        cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0.0, 2.0, text="hello there")]
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", {"recording": "wav"}, shard_size=3)
    source = SourceConfig("shar", str(tmp_path / "shar"))
    entries = list(read_shar(source))
    assert [e.id for e in entries] == [f"c{i}" for i in range(6)] and len(pickle.dumps(entries[0])) < 1000
    for place in (4, 1, 2, 0):  # forward without beginning again, backward with
        assert np.array_equal(entries[place].load().load_audio(), cuts[place].load_audio())
    assert len(prepared(tmp_path, source)) == 6
    broken = tmp_path / "shar" / "recording.000001.tar"
    broken.write_bytes(broken.read_bytes()[:70_000])
    shutil.rmtree(tmp_path / "out")
    assert {cut.id for cut in prepared(tmp_path, source)} == {"c0", "c1", "c2", "c3"}
    assert sum(reasons(tmp_path).values()) == 2


def test_cuts_wait_in_memory_as_little_more_than_their_text(tmp_path):
    cut = Recording.from_file(audio(tmp_path / "a.wav", 9.0)).to_cut().with_id("a")
    words = [AlignmentItem(f"word{i}", i * 0.3, 0.25) for i in range(25)]
    cut.supervisions = [SupervisionSegment("a", "a", 0.0, 9.0, text="x", alignment={"word": words})]
    CutSet.from_cuts([cut]).to_file(tmp_path / "c.jsonl")
    [entry] = read_cuts(SourceConfig("cuts", str(tmp_path / "c.jsonl")))
    assert len(pickle.dumps(entry.load)) < 2_000 and entry.load().to_dict() == cut.to_dict()


def test_labels_of_common_voice():
    rules = load_attributes()
    assert [rules["gender"].label(v, {}) for v in ("male_masculine", "female_feminine")] == ["male", "female"]
    written = ("teens", "Twenties", "fourties", "25-34", "sixties", "65+")
    assert [rules["age"].label(v, {}) for v in written] == ["teenager", "adult", "adult", "adult", "senior", "senior"]


def test_a_csv_is_one_whatever_its_name_is(tmp_path):
    audio(tmp_path / "a.wav")
    for kind, name in (("tsv", "t.CSV"), ("csv", "t.txt")):
        (tmp_path / name).write_text('path,transcript\na.wav,"hello, there"\n')
        [cut] = prepared(tmp_path, SourceConfig(kind, str(tmp_path / name)))
        assert cut.supervisions[0].text == "hello, there"


def test_splits_in_a_table_name_files_of_the_output_alone(tmp_path):
    victim = tmp_path / "victim.jsonl"
    victim.write_text("mine")
    names = ["train", "x/../../../victim", "train/clean", ".hidden"]
    for number in range(len(names)):
        audio(tmp_path / f"{number}.wav", seed=number)
    rows = "".join(f"{number}.wav\thello\t{name}\n" for number, name in enumerate(names))
    (tmp_path / "t.tsv").write_text("path\ttranscript\tsplit\n" + rows)
    assert len(prepared(tmp_path, SourceConfig("tsv", str(tmp_path / "t.tsv"), split_column="split"))) == 1
    assert victim.read_text() == "mine" and len(reasons(tmp_path)) == 3
    assert all("letters, digits" in reason for reason in reasons(tmp_path))
    for split in (SplitConfig(shares={"../a": 1.0}), SplitConfig(speakers={"s": "a/b"})):
        with pytest.raises(ConfigError, match="names files"):
            prepared(tmp_path, SourceConfig("tsv", str(tmp_path / "t.tsv")), split=split)
