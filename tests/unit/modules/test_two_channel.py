"""The two-channel connector: its text channel is the decoder connector's, its acoustic channel stands beside it."""

import pytest
import torch

from nemo_mtbi.data.example import prompt_pieces
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.layout import lay_out_batch
from nemo_mtbi.modules.connectors.acoustic import joined
from nemo_mtbi.modules.connectors.base import NO_TOKEN, SpeechEmbeddings
from tests.helpers import build, gradients, make_batch, two_channel

pytestmark = pytest.mark.unit
DECODER = "nemo_mtbi.modules.connectors.WhisperDecoderConnector"
TWO_CHANNEL = "nemo_mtbi.modules.connectors.TwoChannelConnector"


@pytest.fixture
def config(tiny_config):
    return two_channel(tiny_config, acoustic_strides=2)


@pytest.fixture
def model(config):
    return build(config).eval()


@torch.no_grad()
def test_before_imitation_the_llm_reads_what_the_decoder_connector_gives(model, config):
    config["perception"].pop("encoder_taps")
    config["perception"]["modality_adapter"] = {"_target_": DECODER, "dropout": 0.0}
    decoder = build(config).eval()
    batch = make_batch(model, 3)
    torch.testing.assert_close(model.student({**batch}, True).hidden, decoder.student({**batch}, True).hidden)
    model.perception.modality_adapter.begin_imitation()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.student({**batch}, True).hidden, decoder.student({**batch}, True).hidden)


def test_imitation_opens_the_channel_and_reaches_every_part_of_it(model):
    model.on_train_start()
    batch = make_batch(model, 3)
    grads = gradients(model, [batch])
    acoustic = {n for n, _ in model.named_parameters() if ".acoustic." in n}
    assert acoustic and all(float(grads[n].norm()) > 0 for n in acoustic)


def test_alignment_leaves_the_channel_closed(model):
    model.stage = "alignment"
    model.on_train_start()
    assert not model.perception.modality_adapter._open


def test_without_imitation_the_channel_stays_closed(model):
    """A control without CE and KL would otherwise be read through positions that nothing has trained."""
    model.config.imitation.w_ce = model.config.imitation.w_kl = 0.0
    model.on_train_start()
    assert not model.perception.modality_adapter._open


@torch.no_grad()
@pytest.mark.parametrize("order", ["text_first", "acoustic_first"])
def test_positions_do_not_depend_on_the_batch(config, order):
    config["perception"]["modality_adapter"]["order"] = order
    connector = build(config).eval().perception.modality_adapter
    connector.begin_imitation()
    features = torch.randn(3, 400, 64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([400, 90, 33])
    batch = connector.connect(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = connector.connect(features[row : row + 1, :length], lengths[row : row + 1])
        count = int(alone.lengths[0])
        assert int(batch.lengths[row]) == count
        for name in ("embeddings", "centers", "labels"):
            torch.testing.assert_close(
                getattr(batch, name)[row, :count], getattr(alone, name)[0, :count], atol=1e-4, rtol=1e-3
            )
        acoustic = (alone.labels[0] == NO_TOKEN).tolist()
        assert sum(acoustic) == -(-length // 4)
        assert acoustic == sorted(acoustic, reverse=order == "acoustic_first")


@torch.no_grad()
def test_a_span_takes_its_words_from_both_channels(model):
    connector = model.perception.modality_adapter
    connector.begin_imitation()
    batch = make_batch(model, 2)
    speech = connector.connect(*model.encode(batch["audios"], batch["audio_lens"]))
    centers = connector.word_centers(speech, batch["examples"], model.frame_seconds)
    taken = []
    example = batch["examples"][0]
    count = int(speech.lengths[0])
    for spoken in range(len(example.units)):
        plan = [unit != spoken for unit in range(len(example.units))]
        pieces = [prompt_pieces(example, 0, plan)]
        layout = lay_out_batch(
            pieces, [[1]], [count], [centers[0, :count].tolist()], [example.duration_seconds], model.frame_seconds
        )
        positions = layout.index[0] - len(layout.text_ids)
        own = positions[positions >= 0].tolist()
        unit = example.units[spoken]
        for position in own:
            if int(speech.labels[0, position]) == NO_TOKEN:
                time = (float(speech.centers[0, position]) + 0.5) * model.frame_seconds
                last = spoken == len(example.units) - 1
                assert unit.start_seconds <= time and (last or time < unit.end_seconds)
        taken += own
    assert sorted(taken) == list(range(count))  # every position once


def test_a_trained_decoder_connector_becomes_the_text_channel(model, config):
    connector = model.perception.modality_adapter
    state = {
        k: v + 1 for k, v in connector.state_dict().items() if not k.startswith("acoustic") and v.is_floating_point()
    }
    rest = {k: v for k, v in connector.state_dict().items() if k not in state and not k.startswith("acoustic")}
    connector.load_state_dict({**state, **rest})
    assert torch.equal(connector.state_dict()["residual.bias"], state["residual.bias"])


def test_export_keeps_the_open_channel(model, tmp_path):
    connector = model.perception.modality_adapter
    connector.begin_imitation()
    torch.nn.init.normal_(connector.residual.weight)
    read = MTBISALM.restore_from(model.save_to(tmp_path / "model.nemo"))
    assert read.perception.modality_adapter._open
    batch = make_batch(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(read.student({**batch}, False).hidden, model.student({**batch}, False).hidden)


def test_joined_is_concatenation_row_by_row():
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 2), (0, 4), (2, 0)]
    first, second = (
        SpeechEmbeddings(
            torch.randn(3, 4, 5, generator=generator), torch.tensor(n), torch.rand(3, 4, generator=generator)
        )
        for n in zip(*sizes, strict=True)
    )
    both = joined(first, second)
    for row, (a, b) in enumerate(sizes):
        expected = torch.cat([first.embeddings[row, :a], second.embeddings[row, :b]])
        torch.testing.assert_close(both.embeddings[row, : a + b], expected)
        assert int(both.lengths[row]) == a + b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_taps": [2]}, "encoder_taps"),
        ({"encoder_taps": [1, 1]}, "encoder_taps"),
        ({"modality_adapter": {"_target_": TWO_CHANNEL, "order": "sideways"}}, "text_first"),
    ],
)
def test_bad_settings(config, change, message):
    config["perception"].update(change)
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_an_encoder_that_is_no_whisper_is_refused_before_any_weight_is_loaded(config, tiny_llm):
    config["pretrained_asr"] = tiny_llm  # a directory, but of another kind
    config["pretrained_llm"] = "/nowhere"
    with pytest.raises(ConfigError, match="TwoChannelConnector needs a Whisper"):
        build(config)
