"""Measures of voices, labels from them and from metadata, and the page about them."""

import json
from collections import Counter

import librosa
import numpy as np
import pytest
import soundfile
from lhotse import CutSet, SupervisionSegment

from nemo_mtbi.data.description import DESCRIPTION_FIELD
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.describe import DescribeConfig, Describer, Tally, load_attributes, read_speakers
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig
from nemo_mtbi.preparation.sources import SourceConfig
from nemo_mtbi.preparation.voice_measures import MEASURES, measure

pytestmark = pytest.mark.unit
RATE = 16_000


def voice(hertz, seconds=2.0, level=0.1, noise=0.0, words=((0.2, 0.6), (1.2, 1.8))):
    """A harmonic tone where words are, over noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hertz, time.shape)) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 6))
    gate = np.any([(time >= a) & (time < b) for a, b in words], axis=0)
    return (level * tone * gate + noise * np.random.default_rng(0).standard_normal(len(time))).astype(np.float32)


@pytest.mark.parametrize("hertz", [110.0, 220.0, 300.0])
def test_pitch(hertz):
    found = measure(voice(hertz, words=((0.0, 2.0),)), RATE, [], "la")
    assert found["pitch_hz"] == pytest.approx(hertz, rel=0.02) and found["pitch_range_semitones"] < 0.5


def test_range_of_the_pitch():
    glide = 150 * 2 ** (np.linspace(0, 1, 2 * RATE))  # an octave; the 10th to the 90th percentile of it
    assert measure(voice(glide, words=((0, 2),)), RATE, [], "la")["pitch_range_semitones"] == pytest.approx(
        9.6, abs=0.8
    )


def test_rate_pauses_and_fillers_come_from_the_words():
    words = [(0.2, 0.6), (0.7, 1.0), (1.5, 1.8), (1.81, 2.2)]
    found = measure(voice(120.0, 2.5), RATE, words, "Um well, uh yes hum")
    assert found["words_per_second"] == 2.0 and found["pauses"] == 1 and found["fillers"] == 2
    assert found["pause_share"] == pytest.approx(0.25) and found["seconds"] == 2.5
    assert not {"words_per_second", "pauses"} & set(measure(voice(120.0, 2.0), RATE, [], "one two three"))
    for times in ([(0.2, 0.4)], []):
        assert "words_per_second" not in measure(voice(120.0), RATE, times, "one")


@pytest.mark.parametrize("ratio_db", [0.0, 10.0, 25.0])
def test_noise(ratio_db):
    words = [(0.2, 0.6), (1.2, 1.8)]
    clean = voice(150.0)
    inside = np.concatenate([clean[round(a * RATE) : round(b * RATE)] for a, b in words])
    power = np.sqrt(np.mean(inside**2) * 10 ** (-ratio_db / 10))
    found = measure(voice(150.0, noise=float(power)), RATE, words, "a b")
    assert found["snr_db"] == pytest.approx(10 * np.log10(10 ** (ratio_db / 10) + 1), abs=1.0)
    louder = measure(2 * voice(150.0, noise=float(power)), RATE, words, "a b")
    assert louder["level_db"] - found["level_db"] == pytest.approx(6.02, abs=0.05)


@pytest.mark.parametrize("samples", [np.zeros(RATE, np.float32), np.zeros(3, np.float32), np.ones(500, np.float32)])
def test_what_cannot_be_measured_is_left_out(samples):
    found = measure(samples, RATE, [], "")
    assert set(found) <= set(MEASURES) and "pitch_hz" not in found and "words_per_second" not in found
    assert all(np.isfinite(value) for value in found.values())


def test_the_packages_rules():
    rules = load_attributes()
    assert list(rules).index("pitch") > max(list(rules).index(name) for name in ("age", "gender"))  # it depends on them
    pitch, gender, age = rules["pitch"], rules["gender"], rules["age"]
    assert [age.label(years, {}) for years in (6, "12.9", 13, 59, 60)] == [
        "child",
        "child",
        "teenager",
        "adult",
        "senior",
    ]
    assert [gender.label(v, {}) for v in ("m", "Female", "WOMAN ", None, "", "?")] == ["male", "female", "female"] + [
        None
    ] * 3
    assert pitch.label(200, {"gender": "female"}) == "medium" and pitch.label(200, {"gender": "male"}) == "high"
    assert pitch.label(200, {"gender": "female", "age": "child"}) == "low" and pitch.label(200, {}) == "medium"
    with pytest.raises(DataError, match="gender: 'x9' is none of male, female"):
        gender.label("x9", {})
    assert age.label(" Adult ", {}) == "adult" and age.label("senior", {}) == "senior"  # as some columns have it
    with pytest.raises(DataError, match="age: 'old' is no number"):
        age.label("old", {})
    for odd in (-1, 999, "1e9"):
        with pytest.raises(DataError, match="is not from 0 to 120"):
            age.label(odd, {})
    assert age.label(float("nan"), {}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {measure: loudness_lufs, labels: [x, y], cuts: [1]}", "no measure 'loudness_lufs'; there are seconds"),
        ("a: {measure: seconds, labels: [x, y], cuts: [2, 1]}", "2 labels need 1 ascending cuts"),
        ("a: {measure: seconds, labels: [x, y, z], cuts: [2, 1]}", "3 labels need 2 ascending cuts"),
        ("a: {measure: seconds}", "needs labels and cuts"),
        ("a: {measure: seconds, field: age, labels: [x]}", "give field or measure"),
        ("a: {field: age, labels: [x, y], by: [b], cuts: {c: [1]}}", "needs those attributes"),
        ("a: {colour: red}", "TypeError"),
        ("a: {field: age, plausible: {x: [1, 2]}}", "x needs a measure"),
        (
            "a: {measure: seconds, labels: [s, l], by: [b], cuts: {x: [1]}, plausible: {x: [2, 1]}}\nb: {field: b}",
            "x needs a lowest and a highest number",
        ),
        (
            "a: {field: x, labels: [l], by: [b], cuts: {other: []}}\n"
            "b: {field: y, labels: [l], by: [a], cuts: {other: []}}",
            "depend on each other",
        ),
        ("a: [", "while parsing"),
        ("a: {field: x, values: {female: female}}", "'female' has 'female'; give a list of spellings"),
        ("a: {field: x, values: {yes: [m]}}", "True has"),
        ("a: {field: x, values: [male, female]}", "no mapping of labels"),
        ("a: {measure: seconds, labels: low, cuts: [1]}", "labels is 'low'"),
        ("a: {measure: seconds, labels: [x, y], cuts: ['5']}", "lists of numbers"),
        ("a: {measure: seconds, labels: [x, y], cuts: 5}", "lists of numbers"),
        ("a: {measure: seconds, labels: [x, y], cuts: [5], plausible: [60, 200]}", "plausible is"),
        ("a: {field: age, labels: [x, y], cuts: [5], within: [9, 1]}", "within is"),
        ("a: {field: x, unless: {b: [y]}}", "unless: b has no labels y"),
        ("a: {field: x, unless: {b: [z]}}\nb: {field: b, values: {y: []}}", "unless: b has no labels z"),
        ("a: {field: x, unless: {b: y}}\nb: {field: b, values: {y: []}}", "unless is"),
        ("a: {field: x, unless: [b]}", "unless is"),
        ("a: {field: x, unless: {b: []}}\nb: {field: b, values: {y: []}}", "unless: b has no labels"),
        ("a: {field: x, unless: {b: [y]}}\nb: {field: b, labels: 5}", "b: labels is 5"),
        ("a: {field: x, unless: {b: [y]}}\nb: {field: b, values: 5}", "b: values is 5"),
    ],
)
def test_impossible_rules_are_named(tmp_path, text, message):
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_attributes(file)
    assert str(file) in str(error.value)
    with pytest.raises(ConfigError, match="nothing.yaml"):
        load_attributes(tmp_path / "nothing.yaml")


def test_a_table_of_speakers(tmp_path):
    (tmp_path / "s.tsv").write_text("speaker\tgender\tage\n1\tf\t30\n2\tm\t\n1\tf\t30\n")
    assert read_speakers(str(tmp_path / "s.tsv")) == {"1": {"gender": "f", "age": "30"}, "2": {"gender": "m"}}
    (tmp_path / "t.tsv").write_text("speaker\tgender\n1\tf\n1\tm\n")
    with pytest.raises(DataError, match="line 3: speaker 1 has other values"):
        read_speakers(str(tmp_path / "t.tsv"))


def test_contradicting_and_odd_metadata_is_counted(tmp_path):
    describer = Describer(DescribeConfig(enabled=True))

    def cut(name, gender, age, speaker="a"):
        own = {"age": age, "voice": {"pitch_hz": 150.0} if speaker == "a" else {}}
        supervision = SupervisionSegment(name, name, 0, 1, text="x", speaker=speaker, gender=gender, custom=own)
        return {"id": name, "supervisions": [supervision.to_dict()]}

    cuts = [cut("1", "m", 20), cut("2", "f", 20), cut("3", "f", "twenty", "b"), cut("4", None, None, None)]
    tally, contradicting = Tally(), describer.contradictions(cuts)
    for own in cuts:
        describer.rewrite(own, contradicting, tally)
    report = {"described": describer.report(tally)}
    labels = [c["supervisions"][0]["custom"][DESCRIPTION_FIELD] for c in cuts]
    adult = {"age": "adult", "pitch": "medium"}  # of a voice of which no gender is known, not high for a man
    assert labels == [adult, adult, {"gender": "female"}, {}]
    problems = report["described"]["problems"]
    assert problems == {"gender: speaker a has several": 2, "age: 'twenty' is no number": 1}
    assert report["described"]["missing"]["gender"] == 1 and report["described"]["attributes"]["age"] == {"adult": 2}


def test_a_voice_that_is_not_what_the_corpus_says_has_neither_age_nor_gender():
    describer = Describer(DescribeConfig(enabled=True))

    def cut(name, gender, age, hertz, speaker):
        own = {"age": age, "voice": {"pitch_hz": hertz}}
        return {
            "id": name,
            "supervisions": [
                SupervisionSegment(name, name, 0, 1, text="x", speaker=speaker, gender=gender, custom=own).to_dict()
            ],
        }

    cuts = [cut(f"a{i}", "m", 30, hertz, "a") for i, hertz in enumerate((230.0, 246.0, 100.0, 250.0))]
    cuts += [cut(f"b{i}", "m", 8, 246.0, "b") for i in range(4)]  # a child
    cuts += [cut(f"c{i}", "m", 30, 246.0, "c") for i in range(2)]  # too few to tell
    cuts += [cut(f"d{i}", "f", 30, 200.0, "d") for i in range(4)]
    tally, contradicting = Tally(), describer.contradictions(cuts)
    assert set(contradicting) == {"a"} and set(contradicting["a"]) == {"age", "gender"}
    for own in cuts:
        describer.rewrite(own, contradicting, tally)
    labels = {c["id"]: c["supervisions"][0]["custom"][DESCRIPTION_FIELD] for c in cuts}
    assert labels["a0"] == {"pitch": "high"} and labels["c0"]["gender"] == "male" and labels["b0"]["age"] == "child"
    reason = "speaker a has a median pitch_hz of 238, which is not male"
    assert tally.problems == {f"age: {reason}": 4, f"gender: {reason}": 4}


@pytest.mark.parametrize(
    ("age", "expected"), [(8, None), ("child", None), (15, "male"), (40, "male"), (None, "male"), ("odd", "male")]
)
def test_nothing_is_said_of_a_childs_gender(age, expected):
    describer, missing = Describer(DescribeConfig(enabled=True)), Counter()
    supervision = {"id": "a", "gender": "m", "custom": {"age": age}}
    assert describer.describe(supervision, missing, Counter()).get("gender") == expected
    assert missing["gender"] == (expected is None)
    assert describer.report(Tally())["rules"]["gender"]["unless"] == {"age": ["child"]}


def test_labels_keep_their_order_whatever_is_left_unsaid():
    """Prompts draw attributes by it."""
    describer, custom = Describer(DescribeConfig(enabled=True)), {"age": 40, "voice": {"pitch_hz": 120.0}}
    supervision = {"id": "a", "speaker": "s", "gender": "m", "custom": custom}
    found = describer.describe(supervision, Counter(), Counter())
    assert list(found.items()) == [("gender", "male"), ("age", "adult"), ("pitch", "medium")]
    problems = Counter()
    found = describer.describe(supervision, Counter(), problems, {"gender": "has several"})
    assert found == {"age": "adult", "pitch": "low"} and problems == {"gender: speaker s has several": 1}


@pytest.fixture
def corpus(tmp_path):
    rows = ["path\ttranscript\tspeaker\tgender\tage"]
    for i, (hertz, gender, age) in enumerate([(110, "m", "40"), (200, "F", "8"), (205, "f", "")]):
        soundfile.write(tmp_path / f"{i}.wav", voice(float(hertz)), RATE)
        rows.append(f"{i}.wav\tyes no\t{i}\t{gender}\t{age}")
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def prepared(folder, out="out", **options):
    source = SourceConfig("tsv", str(folder / "t.tsv"), metadata=["gender", "age"])
    config = PrepareConfig(str(folder / out), [source], aligner="none", **options)
    config.split.shares = {"train": 1.0}
    written = Preparation(config).run()
    return list(CutSet.from_file(written["train"])), json.loads((folder / out / "report.json").read_text())


def test_prepare_describes_and_reports(corpus):
    cuts, report = prepared(corpus, describe=DescribeConfig(enabled=True))
    labels = [c.supervisions[0].custom[DESCRIPTION_FIELD] for c in sorted(cuts, key=lambda c: c.id)]
    assert [d.get("gender") for d in labels] == ["male", None, "female"]  # the second is a child
    assert [d.get("age") for d in labels] == ["adult", "child", None]
    assert [d["pitch"] for d in labels] == ["medium", "low", "medium"]
    assert all(c.supervisions[0].custom["voice"]["seconds"] == 2 for c in cuts)
    assert report["described"]["missing"]["age"] == 1
    labels = ["child", "teenager", "adult", "senior"]
    assert report["described"]["rules"]["age"] == {"from": "age", "labels": labels, "cuts": [13, 18, 60]}
    page = (corpus / "out" / "voices.html").read_text()
    assert "data:image/png" in page and page.count("<audio") >= 3 and "pitch: low" in page


def test_changed_rules_measure_nothing_again(corpus, monkeypatch):
    cuts, _ = prepared(corpus, describe=DescribeConfig(enabled=True))
    rules = corpus / "rules.yaml"
    rules.write_text("length: {measure: seconds, labels: [short, long], cuts: [1.5]}\n")
    monkeypatch.setattr(librosa, "pyin", lambda *a, **k: pytest.fail("measured again"))
    again, report = prepared(corpus, describe=DescribeConfig(enabled=True, attributes=str(rules)))
    assert [c.supervisions[0].custom[DESCRIPTION_FIELD] for c in again] == [{"length": "long"}] * 3
    assert report["described"]["attributes"] == {"length": {"long": 3}} and len(cuts) == 3


def test_without_descriptions_nothing_changes(corpus):
    cuts, report = prepared(corpus)
    assert "described" not in report and not (corpus / "out" / "voices.html").exists()
    assert [c.supervisions[0].gender for c in sorted(cuts, key=lambda c: c.id)] == ["m", "F", "f"]
    assert Counter((c.supervisions[0].custom or {}).get("age") for c in cuts) == {"40": 1, "8": 1, None: 1}


def test_padding_with_digital_silence_is_no_quiet_background():
    samples = voice(150.0, noise=0.05)
    padded = np.concatenate([np.zeros(RATE, np.float32), samples, np.zeros(RATE, np.float32)])
    words = [(0.2, 0.6), (1.2, 1.8)]
    alone = measure(samples, RATE, words, "a b")["snr_db"]
    assert measure(padded, RATE, [(a + 1, b + 1) for a, b in words], "a b")["snr_db"] == pytest.approx(alone, abs=0.1)
    assert measure(padded, RATE, [], "a b")["snr_db"] < 15
    assert "snr_db" not in measure(voice(150.0), RATE, words, "a b")  # zeros alone between words tell nothing


def test_speech_without_a_gap_tells_no_noise():
    assert "snr_db" not in measure(voice(150.0, 1.0, words=((0, 1),)), RATE, [(0.0, 1.0)], "a")


def test_pitch_is_that_of_the_voice_before_noise():
    clean = voice(220.0, words=((0, 2),))
    noisy = clean + np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    assert "pitch_hz" not in measure(noisy, RATE, [(0.0, 2.0)], "a")
    assert measure(noisy, RATE, [(0.0, 2.0)], "a", clean)["pitch_hz"] == pytest.approx(220, rel=0.02)
