"""Audio beyond the encoder's window: the same positions in training, from the cache, in use and in an export."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.utils import fastcopy
from omegaconf import OmegaConf

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.data.audio_windows import Windows
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.feature_cache import FEATURES_FIELD, load_array, windows_of
from nemo_mtbi.data.interleaving import SpeechSpan
from nemo_mtbi.data.perturbation import perturbed
from nemo_mtbi.data.time_marks import with_time_marks
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.models.exported import open_speech_llm
from nemo_mtbi.models.hearing import HeldPositions, hear
from nemo_mtbi.models.speech import batch_features, connect, first_examples
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings
from nemo_mtbi.modules.connectors.windows import concatenated, whole_utterances
from nemo_mtbi.modules.fusion import Fusion
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from tests.helpers import build

pytestmark = pytest.mark.unit
CONNECTORS = "nemo_mtbi.modules.connectors."
ADAPTERS = {
    "dense": {"_target_": f"{CONNECTORS}ConvBottleneckConnector", "layers": 2, "bottleneck_dim": 16},
    "stack": {"_target_": f"{CONNECTORS}StackMLPConnector", "factor": 4, "hidden_dim": 16},
    "ctc": {"_target_": f"{CONNECTORS}CTCCompressConnector", "vocab_size": 9, "d_model": 16, "layers": 1, "heads": 2},
    "decoder": {"_target_": f"{CONNECTORS}WhisperDecoderConnector"},
    "two_channel": {"_target_": f"{CONNECTORS}TwoChannelConnector"},
}
SECONDS = (71.3, 4.0, 30.0)


@pytest.fixture(scope="module")
def audios():
    generator = np.random.default_rng(0)
    return [(0.1 * generator.standard_normal(round(s * 16_000))).astype(np.float32) for s in SECONDS]


def long_model(tiny_config, name):
    perception = {"modality_adapter": copy.deepcopy(ADAPTERS[name]), "input_length": "own"}
    model = build(tiny_config, perception=perception, prompt_format="chat_template")
    if name == "ctc":
        model.set_ctc_vocabulary(list(range(300, 309)))
    if name == "two_channel":
        model.perception.modality_adapter.begin_imitation()
    return model.eval()


def same(found, expected, tolerance=1e-5):
    assert found.lengths.tolist() == expected.lengths.tolist()
    torch.testing.assert_close(found.centers, expected.centers)
    torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_training_and_use_read_the_same_positions(tiny_config, audios, tmp_path, monkeypatch, name):
    model = long_model(tiny_config, name)
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(a) for a in audios], batch_first=True)
    batch = {"audios": padded, "audio_lens": torch.tensor([len(a) for a in audios])}
    trained = connect(model.perception, *batch_features(model.perception, batch))
    assert batch["windows"].owners.count(0) >= 3 and batch["encoder_features"].shape[1] <= 1500
    assert (trained.lengths[0] > trained.lengths[1]) and float(trained.centers[0].max()) > 50 * 60
    progress = []
    used = hear(model.perception, [[a] for a in audios], torch.device("cpu"), progress.append)
    assert used.seconds == pytest.approx(SECONDS, abs=1e-3) and progress == [pytest.approx(sum(SECONDS), abs=1e-3)]
    same(used.speech, trained)
    monkeypatch.setattr("nemo_mtbi.models.hearing.PASS_SECONDS", 35.0)  # in parts
    blocks = [np.array_split(a, 7) for a in audios]
    same(hear(model.perception, blocks, torch.device("cpu"), progress.append).speech, trained)
    assert len(progress) > 3 and progress[1:] == sorted(progress[1:])
    light = open_speech_llm(save_directory(model, tmp_path / "hf"))
    same(light.listen(batch["audios"], batch["audio_lens"]).speech, trained)


@pytest.mark.parametrize("name", ["dense", "two_channel"])
def test_long_audio_holds_no_more_than_its_share_of_positions(tiny_config, audios, monkeypatch, name):
    model, held = long_model(tiny_config, name), []
    model.perception.fusion = Fusion(max_positions=30)
    blocks, cpu = [[a] for a in audios], torch.device("cpu")
    monkeypatch.setattr("nemo_mtbi.models.hearing.PASS_SECONDS", 35.0)
    whole = HeldPositions.whole

    def counted(self):
        held.append([sum(int(speech.lengths.sum()) for speech, _ in self.parts), list(self.counts)])
        return whole(self)

    monkeypatch.setattr(HeldPositions, "whole", counted)
    expected = hear(model.perception, blocks, cpu, marks_seconds=10.0)
    monkeypatch.setattr("nemo_mtbi.modules.fusion.HELD", max(held[0][1]))  # just enough: nothing changes
    same(hear(model.perception, blocks, cpu, marks_seconds=10.0).speech, expected.speech)
    monkeypatch.setattr("nemo_mtbi.modules.fusion.HELD", 240)
    found = hear(model.perception, blocks, cpu, marks_seconds=10.0)
    monkeypatch.setattr("nemo_mtbi.modules.fusion.HELD", 10**6)
    unbound = hear(model.perception, blocks, cpu, marks_seconds=10.0)
    same(unbound.speech, expected.speech)
    text = 2 * max(0, int(unbound.speech.lengths[0]) - 30)  # of two channels, written tokens are not merged
    assert held[0][0] == sum(held[0][1]) and held[2][0] < held[0][0]
    assert held[2][0] <= sum(min(240 + text, count) for count in held[0][1]) + len(audios)
    assert found.speech.lengths.tolist() == expected.speech.lengths.tolist()
    for speech in (found.speech, expected.speech):
        rows = zip(speech.centers, speech.lengths, strict=True)
        assert all(bool((row[:size].diff() > 0).all()) for row, size in rows) or name == "two_channel"
    mass = [float(heard.speech.content[0].sum()) for heard in (found, expected)]
    assert mass[0] == pytest.approx(mass[1], rel=1e-4)


def test_the_cache_holds_the_same_windows(tiny_config, audios, tmp_path):
    model = long_model(tiny_config, "dense")
    cuts = []
    for i, samples in enumerate(audios):
        soundfile.write(tmp_path / f"{i}.wav", samples, 16_000, subtype="FLOAT")
        cuts.append(Recording.from_file(tmp_path / f"{i}.wav").to_cut())
    manifest = tmp_path / "cuts.jsonl"
    CutSet.from_cuts(cuts).to_file(manifest)
    config = {k: v for k, v in tiny_config.items() if k != "imitation"}
    config["perception"] = {**config["perception"], "input_length": "own"}
    cache_features(FrozenEncoder(OmegaConf.create(config)), manifest, perturb_speed=[0.9])
    batch = {"audios": torch.from_numpy(audios[0])[None], "audio_lens": torch.tensor([len(audios[0])])}
    rows, lengths, windows, _ = batch_features(model.perception, batch)
    stored = list(CutSet.from_file(manifest))
    assert [windows_of(cut).frames for cut in stored] == [windows.begins, [0], [0]]
    found = load_array(stored[0], FEATURES_FIELD, None).tensor_split(windows.begins[1:])
    assert [len(f) for f in found] == lengths.tolist()
    for row, size, own in zip(rows, lengths, found, strict=True):
        torch.testing.assert_close(own.float(), row[:size].bfloat16().float(), rtol=2e-2, atol=2e-2)
    old = fastcopy(stored[0], custom={k: v for k, v in stored[0].custom.items() if not k.endswith("_windows")})
    with pytest.raises(DataError, match="made before long audio was cut at pauses"):
        windows_of(old)
    slow = perturbed(stored[0], 0.9)
    starts = windows_of(slow).rows
    assert len(starts) >= 3 and starts != windows.begins
    sizes = [len(part) for part in load_array(slow, FEATURES_FIELD, None).tensor_split(starts[1:])]
    assert max(sizes) <= 1500 and sum(sizes) == pytest.approx(50 * SECONDS[0] / 0.9, abs=3)


@torch.no_grad()
def test_cached_windows_begin_when_they_begin(tiny_config, audios, tmp_path, monkeypatch):
    """Of an encoder that gives a frame more than a window has time for, as those with causal convolutions do."""
    soundfile.write(tmp_path / "long.wav", audios[0], 16_000, subtype="FLOAT")
    manifest = tmp_path / "cuts.jsonl"
    CutSet.from_cuts([Recording.from_file(tmp_path / "long.wav").to_cut()]).to_file(manifest)
    config = {k: v for k, v in tiny_config.items() if k != "imitation"}
    encoder, encode = FrozenEncoder(OmegaConf.create(config)), FrozenEncoder.encode

    def one_more(self, audios, lengths):
        features, counts = encode(self, audios, lengths)
        return torch.nn.functional.pad(features, (0, 0, 0, 1)), counts + 1

    monkeypatch.setattr(FrozenEncoder, "encode", one_more)
    cache_features(encoder, manifest)
    [stored] = CutSet.from_file(manifest)
    batch = {"audios": torch.from_numpy(audios[0])[None], "audio_lens": torch.tensor([len(audios[0])])}
    _, lengths, windows, _ = batch_features(encoder.perception, batch)
    places = windows_of(stored)
    assert places.frames == windows.begins and places.rows == [b + i for i, b in enumerate(windows.begins)]
    rows = load_array(stored, FEATURES_FIELD, None).tensor_split(places.rows[1:])
    assert [len(row) for row in rows] == [size + 1 for size in lengths.tolist()]
    tokenizer = SimpleNamespace(tokenizer=None)
    dataset = SimpleNamespace(encoder_key=None, writing_key=None, tokenizer=tokenizer)
    batch = MTBIDataset._features(dataset, [SimpleNamespace(cut=stored)])
    assert batch["windows"].begins == windows.begins and len(batch["encoder_features"]) == len(rows)


@torch.no_grad()
def test_time_marks_stand_before_their_stretches(tiny_config, audios):
    model = long_model(tiny_config, "two_channel")
    model.limit_positions(20)
    heard = {every: (model.mark_times(every), model.listen([[a] for a in audios]))[1] for every in (None, 30.0)}
    pieces, _ = model.prompt_pieces([[model.user_turn("When?", 3)]])
    plain, _, _ = model.dialog_inputs([[model.user_turn("When?", 3)]], pieces, heard[30.0])
    decode = model.tokenizer.tokenizer.decode
    marked = with_time_marks(pieces, list(SECONDS), 30.0, lambda t: model.tokenizer.tokenizer.encode(t))
    spans = [p for p in marked[0] if isinstance(p, SpeechSpan)]
    before = [decode(marked[0][i - 1]) for i, p in enumerate(marked[0]) if isinstance(p, SpeechSpan)]
    assert [(s.audio, s.start_seconds) for s in spans] == [(0, 0), (0, 30), (0, 60), (1, 0), (2, 0)]
    assert [t.strip() for t in before] == ["[00:00]", "[00:30]", "[01:00]", "[00:00]", "[00:00]"]
    text = sum(len(p) for p in marked[0] if isinstance(p, list))
    assert plain.shape[1] == text + int(heard[30.0].speech.lengths.sum())  # no position is lost or doubled
    assert int(heard[30.0].speech.lengths[0]) >= int(heard[None].speech.lengths[0])
    model.mark_times(None)
    with pytest.raises(ConfigError, match="time_marks=0.5"):
        model.mark_times(0.5)


def test_a_gradient_reaches_every_window(tiny_config, audios):
    model = long_model(tiny_config, "dense")
    batch = {"audios": torch.from_numpy(audios[0])[None], "audio_lens": torch.tensor([len(audios[0])])}
    features, lengths, windows, _ = batch_features(model.perception, batch)
    features = features.clone().requires_grad_()
    connect(model.perception, features, lengths, windows).embeddings.square().sum().backward()
    assert all(float(features.grad[row].abs().sum()) > 0 for row in range(len(features)))


@torch.no_grad()
def test_the_first_examples_of_a_batch_keep_their_windows(tiny_config, audios):
    model = long_model(tiny_config, "dense")
    order = [1, 0, 2]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(audios[i]) for i in order], batch_first=True)
    batch = {"examples": order, "audios": padded, "audio_lens": torch.tensor([len(audios[i]) for i in order])}
    batch["teacher_ids"] = torch.zeros(9, 4)
    whole = connect(model.perception, *batch_features(model.perception, batch))
    few = first_examples(batch, 2)
    assert few["examples"] == [1, 0] and "teacher_ids" not in few and len(few["audios"]) == 2
    found = connect(model.perception, *batch_features(model.perception, few))
    assert found.lengths.tolist() == whole.lengths[:2].tolist()
    torch.testing.assert_close(found.embeddings, whole.embeddings[:2, : found.embeddings.shape[1]])


def speech(lengths, labels, nothing):
    size = max(lengths)
    values = torch.arange(len(lengths) * size * 2, dtype=torch.float32).view(len(lengths), size, 2)
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return SpeechEmbeddings(
        values * mask[..., None],
        torch.tensor(lengths),
        torch.arange(size).float().expand(len(lengths), -1),
        labels=torch.tensor(labels),
        nothing_heard=torch.tensor(nothing),
    )


def test_what_is_silent_as_a_whole_says_so_once():
    given = speech([1, 2, 1], [[5, 0], [5, NO_TOKEN], [5, 0]], [True, True, True])
    joined = whole_utterances(given, Windows([0, 0, 0], [0, 10, 30]))
    assert joined.nothing_heard.tolist() == [True] and joined.labels.tolist() == [[5, NO_TOKEN]]


def test_silent_windows_say_nothing_unless_all_are_silent():
    given = speech([2, 1, 2, 2], [[5, 6], [7, 0], [8, NO_TOKEN], [9, NO_TOKEN]], [False, True, True, True])
    joined = whole_utterances(given, Windows([0, 0, 0, 1], [0, 10, 30, 0]))
    assert joined.lengths.tolist() == [3, 2] and joined.nothing_heard.tolist() == [False, True]
    assert joined.labels.tolist() == [[5, 6, NO_TOKEN], [9, NO_TOKEN, 0]]  # an acoustic position stays
    assert joined.centers.tolist() == [[0, 1, 31], [0, 1, 0]]
    assert joined.embeddings[0, 2].tolist() == given.embeddings[2, 1].tolist() and not joined.embeddings[1, 2].any()


def test_parts_are_rows_of_one():
    parts = [speech([2, 1], [[1, 2], [3, 0]], [False, True]), speech([3], [[4, 5, 6]], [False])]
    both = concatenated(parts)
    assert both.lengths.tolist() == [2, 1, 3] and both.embeddings.shape == (3, 3, 2)
    assert both.labels.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]] and both.content is None


def test_one_limit_leaves_the_models_other_one(tiny_config):
    perception = {"modality_adapter": copy.deepcopy(ADAPTERS["dense"]), "fusion": {"max_positions": 40}}
    model = build(tiny_config, perception=perception)
    model.listen_as(None, 3.0, None)
    assert (model.perception.fusion.max_positions, model.perception.fusion.per_second) == (40, 3.0)
    model.listen_as(20, None, None)
    assert (model.perception.fusion.max_positions, model.perception.fusion.per_second) == (20, None)
