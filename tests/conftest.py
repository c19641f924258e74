"""Fixtures shared by all tests.

Pretrained parts (converted once into the ordinary cache) and tiny models of their kind.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes on these cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real human speech kept beside the project by its developers; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}: this test reads the developers' shared speech")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> str:
    from nemo_mtbi.pretrained.offline import resolve_pretrained

    return resolve_pretrained("offline:smollm2-135m-instruct")


@pytest.fixture(scope="session")
def whisper() -> str:
    from nemo_mtbi.pretrained.offline import resolve_pretrained

    return resolve_pretrained("offline:whisper-tiny.en")


@pytest.fixture(scope="session")
def tiny_llm(smollm2, tmp_path_factory) -> str:
    """A two-layer Llama with random weights and SmolLM2's tokenizer: real code paths in milliseconds."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_llm")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_whisper(whisper, tmp_path_factory) -> str:
    """A one-layer Whisper with random weights and the real tokenizer and features."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_whisper")
    real = WhisperConfig.from_pretrained(whisper)
    config = WhisperConfig(
        vocab_size=real.vocab_size,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        bos_token_id=real.bos_token_id,
        eos_token_id=real.eos_token_id,
        pad_token_id=real.pad_token_id,
        decoder_start_token_id=real.decoder_start_token_id,
        max_target_positions=40,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(whisper, max_length=12)
    model.save_pretrained(folder)
    WhisperTokenizer.from_pretrained(whisper).save_pretrained(folder)
    WhisperFeatureExtractor.from_pretrained(whisper).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_config(tiny_llm, tiny_whisper) -> dict:
    """A model configuration over the tiny parts, in fp32, with the stacking connector."""
    return {
        "pretrained_llm": tiny_llm,
        "pretrained_asr": tiny_whisper,
        "prompt_format": "chatml",
        "perception": {
            "input_length": "own",
            "round_seconds": 1.0,
            "modality_adapter": {
                "_target_": "nemo_mtbi.modules.connectors.StackMLPConnector",
                "factor": 5,
                "hidden_dim": 32,
            },
        },
        "imitation": {"teacher": "online"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }


@pytest.fixture(scope="session")
def exported(tiny_llm, tiny_whisper, tmp_path_factory):
    config = {
        "pretrained_llm": tiny_llm,
        "pretrained_asr": tiny_whisper,
        "prompt_format": "chatml",
        "llm_dtype": "bfloat16",
        "perception": {
            "input_length": "own",
            "modality_adapter": {
                "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
                "vocab_size": 9,
                "d_model": 32,
                "heads": 4,
            },
        },
    }
    from nemo_mtbi.checkpoints.archive import save_directory, save_nemo
    from tests.helpers import build

    model = build(config)
    model.set_ctc_vocabulary(list(range(300, 309)))
    folder = tmp_path_factory.mktemp("export")
    return model, save_nemo(model, folder / "m.nemo"), save_directory(model, folder / "hf")
