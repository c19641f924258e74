"""The acoustic channel that is a text with choices: what the LLM reads of it, and which speech it stays with."""

import copy
import itertools
import re
from dataclasses import replace

import pytest
import torch

from nemo_mtbi.data.conversation import AcousticPositions
from nemo_mtbi.data.example import plan_batch, prompt_pieces
from nemo_mtbi.data.literal import literal_encoding
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.layout import lay_out_batch
from nemo_mtbi.models.speech import batch_features, connect
from nemo_mtbi.modules.connectors.acoustic import Standardization, statistics, tempo
from nemo_mtbi.modules.connectors.base import NO_TOKEN
from nemo_mtbi.modules.connectors.wordings import wordings
from nemo_mtbi.training.stages import require_text_channel
from tests.helpers import build, gradients, make_batch, two_channel

pytestmark = pytest.mark.unit
BUILT = []  # one model, of which every test has a copy
TEXT = " The gender is {female|male}. <|im_end|> It is {calm|loud|flat}."


@pytest.fixture
def config(tiny_config):
    return two_channel(tiny_config, acoustic_prompt=TEXT)


@pytest.fixture
def model(config):
    if not BUILT:
        BUILT.append(build(config).eval())
        BUILT[0].perception.modality_adapter.begin_imitation()
    return copy.deepcopy(BUILT[0])


def moved(model):
    torch.manual_seed(0)
    torch.nn.init.normal_(model.perception.modality_adapter.acoustic.project.weight, std=0.05)
    return model


def heard(model, batch):
    return model.perception.modality_adapter.connect(*model.encode(batch["audios"], batch["audio_lens"]))


def own_positions(model, speech, row):
    valid = int(speech.lengths[row])
    return speech.embeddings[row, :valid][speech.labels[row, :valid] == NO_TOKEN]


def written_out(text, *chosen):
    for alternative in chosen:
        text = re.sub(r"\{[^}]*\}", alternative, text, count=1)
    return text


@torch.no_grad()
def test_before_training_the_first_alternatives_stand_in_the_text(model):
    speech = heard(model, make_batch(model, 2))
    ids, _ = literal_encoding(model.tokenizer.tokenizer, written_out(TEXT, "female", "calm"))
    for row in range(2):
        torch.testing.assert_close(own_positions(model, speech, row), model.embed_tokens(torch.tensor(ids)))
    control = model.tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert control not in model.perception.modality_adapter.acoustic.prompt[:, 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("chosen", [("female", "loud"), ("male", "flat"), ("male", "calm")])
def test_what_a_voice_chooses_is_what_the_text_llm_reads(model, chosen):
    acoustic = model.perception.modality_adapter.acoustic
    alternatives = [["female", "male"], ["calm", "loud", "flat"]]
    bias = torch.zeros(acoustic.impossible.shape)
    for place, word in enumerate(chosen):
        bias[place, alternatives[place].index(word)] = 0.1
    acoustic.project.bias.copy_(bias.flatten())
    speech = heard(model, make_batch(model, 1))
    ids, _ = literal_encoding(model.tokenizer.tokenizer, written_out(TEXT, *chosen))
    torch.testing.assert_close(own_positions(model, speech, 0), model.embed_tokens(torch.tensor(ids)))


@pytest.fixture
def scored(model, monkeypatch):
    """The logits by which the alternatives are chosen, of one call after the other."""
    acoustic, seen = model.perception.modality_adapter.acoustic, []
    shares = acoustic.shares
    monkeypatch.setattr(acoustic, "shares", lambda logits, *rest: seen.append(logits) or shares(logits, *rest))
    return seen


@torch.no_grad()
def test_voices_are_told_apart_and_padding_is_not_heard(model, scored):
    connector = moved(model).perception.modality_adapter
    features = torch.randn(3, 400, 64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([400, 90, 33])
    batch = connector.connect(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = connector.connect(features[row : row + 1, :length], lengths[row : row + 1])
        valid = int(alone.lengths[0])
        torch.testing.assert_close(batch.embeddings[row, :valid], alone.embeddings[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(scored[-1][0], scored[0][row], atol=1e-4, rtol=1e-3)
    assert float((scored[0][0, 0] - scored[0][1, 0])[:2].abs().max()) > 1e-3


def test_statistics_are_those_of_torch():
    hidden = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    found = statistics(hidden, torch.tensor([7, 4]))
    for row, length in enumerate((7, 4)):
        own = hidden[row, :length]
        torch.testing.assert_close(found[row], torch.cat([own.mean(0), own.std(0, correction=0)]))


def test_tempo_counts_what_the_text_channel_wrote():
    found = tempo(torch.tensor([50, 200, 0]), torch.tensor([[4, 1], [39, 15], [0, 0]])).exp()
    torch.testing.assert_close(found, torch.tensor([[1.0, 5.0, 2.0], [4.0, 10.0, 4.0], [0.02, 50.0, 50.0]]))


@torch.no_grad()
def test_more_words_in_the_same_time_are_another_voice(model, scored):
    connector = moved(model).perception.modality_adapter
    features = torch.randn(1, 100, 64).expand(2, -1, -1)
    speech = connector.connect(features, torch.tensor([100, 100]), written=[[5], [5, 6, 7]])
    slow, fast = scored[0][:, 0, :2]
    assert float((slow - fast).abs().max()) > 1e-3
    texts = [connector.tokenizer.decode(own) for own in ([5], [5, 6, 7])]
    assert speech.words.tolist() == [len(text.split()) for text in texts]


def test_standardization_is_that_of_all_that_training_saw():
    values = 40 + 0.1 * torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    layer = Standardization(6)
    for part in values.split([1, 9, 20]):
        layer(part)
    expected = (values - values.mean(0)) / values.std(0, correction=0)
    torch.testing.assert_close(layer.eval()(values), expected, atol=2e-3, rtol=1e-3)
    read = Standardization(6)
    read.load_state_dict(layer.state_dict())
    assert read._passes == 3
    torch.testing.assert_close(read.eval()(values), layer(values), rtol=0, atol=0)
    before = layer(values)
    torch.testing.assert_close(layer.bfloat16()(values), before, rtol=0, atol=0)  # its mean would not survive


def test_use_and_validation_leave_the_standardization_alone():
    layer = Standardization(3)
    with torch.no_grad():
        layer(torch.randn(4, 3))
    layer.eval()(torch.randn(4, 3))
    assert layer._passes == 0
    values = torch.randn(4, 3)
    torch.testing.assert_close(layer(values), values)


def test_imitation_reaches_every_part_of_it(model):
    batch = make_batch(model, 3)
    batch["audio_lens"] -= torch.tensor([0, 3200, 6400])  # one tempo would have no slope
    grads = gradients(moved(model), [batch])
    acoustic = {n for n, _ in model.named_parameters() if ".acoustic." in n}
    assert acoustic and all(float(grads[n].norm()) > 0 for n in acoustic)


def test_a_choice_that_is_sure_learns_from_its_own_voices(model):
    """The gradient is that of the softmax at equal probabilities, also where the softmax has none left."""
    acoustic = model.perception.modality_adapter.acoustic.train()
    features, lengths, written = torch.randn(3, 40, 64), torch.tensor([40, 40, 30]), torch.tensor([[3, 2]] * 3)
    weights = torch.randn(3, *acoustic.impossible.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for sure in (0.0, 60.0):
        with torch.no_grad():
            acoustic.project.bias.zero_()[::3] = sure  # of the first alternative of each choice
        logits = acoustic.logits(features, lengths, written)
        values = acoustic.shares(logits)
        torch.testing.assert_close(values.detach(), logits.detach().softmax(-1), rtol=0, atol=0)
        (found[sure],) = torch.autograd.grad((weights * values).sum(), acoustic.project.bias)
    logits = torch.zeros(acoustic.impossible.shape, requires_grad=True)
    soft = logits.masked_fill(acoustic.impossible, -torch.inf).softmax(-1)
    (expected,) = torch.autograd.grad((weights.sum(0) * soft).sum(), logits)
    torch.testing.assert_close(found[0.0], expected.flatten())
    torch.testing.assert_close(found[60.0], expected.flatten())


def test_training_reads_a_mixture_and_use_the_most_likely(model):
    acoustic = model.perception.modality_adapter.acoustic
    probabilities = torch.tensor([[0.8, 0.2, 0.0], [0.5, 0.1, 0.4]])
    logits = probabilities.log().expand(2, -1, -1).clone().requires_grad_()
    sure = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).expand(2, -1, -1)
    assert torch.equal(acoustic.shares(logits), sure)
    acoustic.train()
    torch.testing.assert_close(acoustic.shares(logits), probabilities.expand(2, -1, -1))
    assert torch.equal(acoustic.shares(logits.detach()), sure)  # validation, or a channel that is frozen
    other = acoustic.shares(logits.detach(), lambda best: best + 1)  # what the first rank chose
    assert torch.equal(other, sure.roll(1, -1))


def test_a_constant_recording_has_a_gradient_too(model):
    connector = moved(model).perception.modality_adapter.train()
    connector.connect(torch.ones(1, 40, 64), torch.tensor([40])).embeddings.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in connector.acoustic.parameters())


@torch.no_grad()
@pytest.mark.parametrize("order", ["text_first", "acoustic_first"])
def test_it_stays_with_the_last_speech_of_the_utterance(config, order):
    config["perception"]["modality_adapter"]["order"] = order
    model = build(config).eval()
    connector = model.perception.modality_adapter
    connector.begin_imitation()
    batch = make_batch(model, 1)
    [example] = batch["examples"]
    speech = heard(model, batch)
    centers = connector.word_centers(speech, [example], model.frame_seconds)
    own = set((speech.labels[0] == NO_TOKEN).nonzero().flatten().tolist())
    assert len(example.units) >= 3

    def taken(plan):
        pieces = [prompt_pieces(example, 0, plan)]
        layout = lay_out_batch(
            pieces, [[1]], speech.lengths.tolist(), centers.tolist(), [example.duration_seconds], model.frame_seconds
        )
        positions = layout.index[0] - len(layout.text_ids)
        return positions[positions >= 0].tolist()

    units = len(example.units)
    assert taken([False] * units) == list(range(int(speech.lengths[0])))
    for spoken in ([0], [units - 1], [0, 2]):
        found = taken([unit not in spoken for unit in range(units)])
        assert own <= set(found) and len(found) == len(set(found))
        last = taken([unit != spoken[-1] for unit in range(units)])  # which has the description, wherever it stands
        assert found[len(found) - len(last) :] == last
    assert taken([True] * units) == []


@torch.no_grad()
def test_each_window_of_a_long_recording_is_described(model):
    connector = moved(model).perception.modality_adapter
    samples = 0.1 * torch.randn(1, 70 * 16_000, generator=torch.Generator().manual_seed(0))
    batch = {"audios": samples, "audio_lens": torch.tensor([samples.shape[1]])}
    speech = connect(model.perception, *batch_features(model.perception, batch))
    own = speech.labels[0, : int(speech.lengths[0])] == NO_TOKEN
    count, windows = connector.positions_per_window, batch["windows"]
    assert len(windows.owners) == 3 and int(own.sum()) == 3 * count
    expected = [begin - 1.0 for begin in windows.begins[1:]] + [torch.inf]  # with the end of its window, or of all
    assert speech.centers[0, : len(own)][own].tolist() == [end for end in expected for _ in range(count)]


def test_positions_of_a_recording():
    assert AcousticPositions(6.25)(3.0) == 19
    assert [AcousticPositions(0.0, 8, 30.0)(s) for s in (0.5, 30.0, 31.0, 61.0)] == [8, 8, 16, 32]  # of 20 s at least


@torch.no_grad()
def test_an_export_reads_the_same(model, tmp_path):
    read = MTBISALM.restore_from(moved(model).save_to(tmp_path / "model.nemo"))
    batch = make_batch(model, 2)
    torch.testing.assert_close(read.student({**batch}, False).hidden, model.student({**batch}, False).hidden)


@torch.no_grad()
def test_words_keep_their_times_under_autocast(config):
    config["perception"]["modality_adapter"]["order"] = "acoustic_first"
    model = build(config).eval()
    model.perception.modality_adapter.begin_imitation()
    with torch.autocast("cpu", torch.bfloat16):
        assert heard(model, make_batch(model, 2)).centers.dtype == torch.float32


def test_silence_is_known_as_such_with_the_channel_open(model):
    connector = model.perception.modality_adapter
    connector.no_speech_id, connector.no_speech_threshold = connector.eos_id, 1e-30  # whatever it hears
    speech = connector.connect(torch.randn(2, 40, 64), torch.tensor([40, 30]))
    assert speech.nothing_heard.tolist() == [True, True]


def test_a_broken_row_does_not_count():
    layer, whole = Standardization(3), torch.randn(5, 3)
    layer(torch.cat([whole, torch.tensor([[1.0, torch.nan, torch.inf]])]))
    other = Standardization(3)
    other(whole)
    torch.testing.assert_close(layer.eval()(whole), other.eval()(whole))


def test_weights_for_another_text_are_refused(model, config):
    state = model.perception.modality_adapter.state_dict()
    config["perception"]["modality_adapter"]["acoustic_prompt"] = TEXT.replace("flat", "bored")
    with pytest.raises(CheckpointError, match="acoustic_prompt"):
        build(config).perception.modality_adapter.load_state_dict(state)


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("perception", {"fusion": {"per_second": 2.0}}, "acoustic_prompt"),
        ("interleaving", {"level": "waveform", "probability": 0.5}, "acoustic_prompt"),
    ],
)
def test_what_it_cannot_do_is_refused(config, section, change, message):
    config[section] = {**config.get(section, {}), **change}
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_an_alignment_stage_that_would_train_nothing_is_refused(model, config):
    require_text_channel(model)
    frozen = [r"llm\..+", r"embed_tokens\..+", r"perception\.(encoder|modality_adapter\.(?!acoustic\.)).+"]
    with pytest.raises(ConfigError, match="alignment_stage.enabled=false"):
        require_text_channel(build(config, freeze_params=frozen))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "choices in braces"),
        ("The gender is female.", "choices in braces"),
        ("The gender is {female|male.", "choices in braces"),
        ("The gender is female|male}.", "choices in braces"),
        ("{ {a|b} | c}", "choices in braces"),
        ("It is {female}.", "two or more"),
        ("It is {}.", "two or more"),
        ("It is {female| }.", "none of them empty"),
        ("It is {female|male|male }.", "written twice"),
        ("{a|b}{c|d}", "share a token"),
        ({"female|male": None}, "in quotes"),
        (["It is", "{a|b}"], "in quotes"),
        (3, "in quotes"),
    ],
)
def test_a_text_without_good_choices_is_refused(config, text, message):
    config["perception"]["modality_adapter"]["acoustic_prompt"] = text
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize("ids", [[1, 2, 3], [[[1]], 2]])
def test_tokens_of_earlier_versions_are_refused(config, ids):
    config["perception"]["modality_adapter"]["acoustic_prompt_ids"] = ids
    with pytest.raises(ConfigError, match="trained again"):
        build(config)


class Spaceless:
    """A tokenizer without spaces, which reads small letters alone."""

    added_tokens_decoder, chat_template = {}, None

    def __call__(self, text, **options):
        letters = [(i, c) for i, c in enumerate(text.lower()) if c != " "]
        return {"input_ids": [ord(c) for _, c in letters], "offset_mapping": [(i, i + 1) for i, _ in letters]}


def test_other_tokenizers_have_choices_too():
    assert wordings(Spaceless(), "a {b|cd}") == [[[97]], [[10, 98], [99, 100]]]
    with pytest.raises(ConfigError, match="apart"):
        wordings(Spaceless(), "a {b|B}")


@torch.no_grad()
@pytest.mark.parametrize("order", ["text_first", "acoustic_first"])
def test_it_is_of_the_precision_that_the_step_has(config, order):
    config["perception"]["modality_adapter"]["order"] = order
    model = build(config).eval()
    model.perception.modality_adapter.begin_imitation()
    with torch.autocast("cpu", torch.bfloat16):
        assert heard(model, make_batch(model, 2)).embeddings.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text", ["{yes|no} {a|an|the}.", "Said {softly|loudly and long|with a sigh}", "{é|日本|😀}: x"]
)
def test_choices_are_what_the_alternatives_do_not_share(model, text):
    tokenizer = model.tokenizer.tokenizer
    pieces = wordings(tokenizer, text)
    assert all(len({len(ids) for ids in piece}) == 1 for piece in pieces)
    [space] = literal_encoding(tokenizer, " ")[0]
    options = [a.split("|") for a in re.findall(r"\{([^}]*)\}", text)]
    for indices in itertools.product(*(range(len(o)) for o in options)):
        chosen = iter(indices)
        ids = [i for piece in pieces for i in piece[next(chosen) if len(piece) > 1 else 0]]
        expected = literal_encoding(
            tokenizer, written_out(text, *(o[i] for o, i in zip(options, indices, strict=True)))
        )
        assert [i for i in ids if i != space] == [i for i in expected[0] if i != space]


OPENING = "The words of a recording:\n"


@pytest.fixture
def opened(tiny_config):
    config = two_channel(tiny_config, acoustic_prompt=f"{OPENING}{{words}}{TEXT}")
    model = build(config).eval()
    assert model.opening == []  # before imitation the LLM reads the words alone
    model.perception.modality_adapter.begin_imitation()
    return model


def read_before(model, pieces):
    """The text before the first speech."""
    place = next(i for i, piece in enumerate(pieces) if not isinstance(piece, list))
    return model.tokenizer.tokenizer.decode(list(itertools.chain(*pieces[:place])))


def test_an_opening_stands_before_the_words_in_training_and_in_use(opened, model):
    tokenizer = opened.tokenizer.tokenizer
    assert tokenizer.decode(opened.opening) == OPENING and model.opening == []
    assert opened.perception.modality_adapter.acoustic.prompt.tolist() == (
        model.perception.modality_adapter.acoustic.prompt.tolist()
    )
    [example] = make_batch(opened, 1)["examples"]
    [[*pieces]] = plan_batch([example], None, 0, opened.opening)
    assert read_before(opened, pieces).endswith(OPENING)
    words = [len(example.units) > 1, *[False] * (len(example.units) - 1)]
    given = prompt_pieces(example, 0, words, opened.opening)  # the first words as text: after the opening
    first = tokenizer.decode(example.prompt_ids[example.units[0].token_begin : example.units[0].token_end])
    assert read_before(opened, given).endswith(OPENING + first)
    turn = opened.user_turn("Who speaks?", audios=2)
    [used], audios = opened.prompt_pieces([[turn]])
    assert audios == 2 and read_before(opened, used).endswith("Who speaks?\n" + OPENING)
    second = used.index(next(p for p in used if not isinstance(p, list) and p.audio == 1))
    assert tokenizer.decode(used[second - 1]) == "\n" + OPENING


def test_the_answer_is_to_what_stands_there(opened, model):
    """The same as a prompt that holds the opening, for a model without one."""
    batch, written = make_batch(opened, 2), make_batch(model, 2)
    count = len(opened.opening)
    for i, example in enumerate(written["examples"]):
        begin = example.units[0].token_begin
        ids = [*example.prompt_ids[:begin], *opened.opening, *example.prompt_ids[begin:]]
        units = [replace(u, token_begin=u.token_begin + count, token_end=u.token_end + count) for u in example.units]
        written["examples"][i] = replace(example, prompt_ids=ids, units=units)
    with torch.no_grad():
        torch.testing.assert_close(opened.student(batch, True).hidden, model.student(written, True).hidden)


def test_positions_of_an_opening_count_in_batches(opened):
    connector = opened.perception.modality_adapter
    assert connector.positions_per_audio == len(opened.opening) > 0
    own = AcousticPositions(
        0.0, connector.positions_per_window, connector.window_seconds, connector.positions_per_audio
    )
    assert own(3.0) == connector.positions_per_window + len(opened.opening)


@pytest.mark.parametrize(
    "text",
    [
        "Words: {words}" + TEXT,  # the first word would share its token
        "{a|b}\n{words}" + TEXT,
        "One\n{words} two\n{words}" + TEXT,
        "One\n{words} without choices",
    ],
)
def test_an_opening_that_cannot_stand_there_is_refused(tiny_config, text):
    with pytest.raises(ConfigError, match="acoustic_prompt"):
        build(two_channel(tiny_config, acoustic_prompt=text))


def test_an_opening_needs_the_words_first(tiny_config):
    config = two_channel(tiny_config, acoustic_prompt=f"{OPENING}{{words}}{TEXT}", order="acoustic_first")
    with pytest.raises(ConfigError, match="text_first"):
        build(config)


def test_weights_for_another_opening_are_refused(opened, model, tiny_config):
    other = build(two_channel(tiny_config, acoustic_prompt=f"Words:\n{{words}}{TEXT}"))
    for target in (other, model):
        with pytest.raises(CheckpointError, match="another text"):
            target.load_state_dict(opened.state_dict())
    state = model.state_dict()
    del state["perception.modality_adapter.acoustic.opening"]  # of before there were openings
    model.perception.modality_adapter.upgrade_state(state, "perception.modality_adapter.")
    model.load_state_dict(state)


def test_tokens_of_a_prompt_come_with_those_of_its_opening(opened, tiny_config):
    ids = opened.cfg.perception.modality_adapter.acoustic_prompt_ids
    config = two_channel(tiny_config, acoustic_prompt=f"{OPENING}{{words}}{TEXT}", acoustic_prompt_ids=ids)
    with pytest.raises(ConfigError, match="acoustic_opening_ids"):
        build(config)
