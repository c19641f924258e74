"""Dense connectors that read several encoder layers."""

import copy

import pytest
import torch

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.models.exported import open_speech_llm
from nemo_mtbi.modules.connectors.dense import ConvBottleneckConnector, StackMLPConnector, normalized
from tests.helpers import build, make_batch

pytestmark = pytest.mark.unit


def test_layers_of_any_scale_count_alike():
    features = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    scaled = features * torch.tensor([100.0] * 4 + [1.0] * 4 + [0.01] * 4)
    for layer in range(3):
        own = slice(4 * layer, 4 * layer + 4)
        expected = (scaled[..., own] - scaled[..., own].mean(-1, keepdim=True)) / (
            scaled[..., own].var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
        torch.testing.assert_close(normalized(scaled, 3)[..., own], expected)
    assert normalized(features, 1) is features


@pytest.mark.parametrize(
    "make", [lambda n: StackMLPConnector(12, 8, 2, 16, n), lambda n: ConvBottleneckConnector(12, 8, 1, 16, n)]
)
def test_padding_never_reaches_an_utterance(make):
    torch.manual_seed(0)
    connector = make(3).eval()
    features = torch.randn(2, 9, 12)
    both = connector.connect(features, torch.tensor([9, 5]))
    features[1, 5:] = 1e3
    alone = connector.connect(features[1:, :5], torch.tensor([5]))
    again = connector.connect(features, torch.tensor([9, 5]))
    count = int(alone.lengths[0])
    torch.testing.assert_close(again.embeddings[1, :count], alone.embeddings[0, :count])
    torch.testing.assert_close(again.embeddings, both.embeddings)


def test_a_model_with_taps_normalizes_and_is_exported_so(tiny_config, tmp_path):
    perception = copy.deepcopy(tiny_config["perception"])
    model = build(tiny_config, perception={**perception, "encoder_taps": [1]}).eval()
    assert model.perception.modality_adapter.encoder_layers == 2
    batch = make_batch(model, 1)
    light = open_speech_llm(save_directory(model, tmp_path / "hf"))
    expected = model.listen(batch["audios"], batch["audio_lens"]).speech.embeddings
    torch.testing.assert_close(light.listen(batch["audios"], batch["audio_lens"]).speech.embeddings, expected)
