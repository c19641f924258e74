"""Answers by the real ``vllm.LLM``, where it is installed (``make test-vllm``)."""

import importlib.util

import pytest

from nemo_mtbi import registration as registration
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.targets.config import TargetsConfig, VLLMConfig
from nemo_mtbi.targets.generate import TargetGenerator, check_values
from nemo_mtbi.targets.workers import visible_gpus
from tests.unit.targets_helpers import write_cuts

pytestmark = pytest.mark.functional
HERE = importlib.util.find_spec("vllm") is not None
TEXTS = ["the train to rome leaves at noon", "my sister bought a red umbrella", "please turn off the light"]
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}


def values(tmp_path, smollm2):
    return {
        "cuts": {"train": write_cuts(tmp_path / "cuts.jsonl", 3, lambda i: TEXTS[i])},
        "llm": smollm2,
        "dtype": "float32",
        "max_new_tokens": 24,
        "task_names": ["about", "repeat"],
        "filters": ["empty"],
        "top_k": 8,
    }


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="needs vLLM: make test-vllm")
def test_vllm_gives_the_answers_and_the_teacher_of_the_hf_engine(tmp_path, smollm2):
    from nemo_mtbi.targets.vllm_engine import VLLMEngine

    given = values(tmp_path, smollm2)
    own = TargetGenerator(TargetsConfig(**given, output_dir=str(tmp_path / "hf")))
    asked = VLLMConfig(max_model_len=512, options=SMALL)
    other = TargetGenerator(TargetsConfig(**given, output_dir=str(tmp_path / "vllm"), engine="vllm", vllm=asked))
    own.run(), other.run()
    assert isinstance(other.engine.engine, VLLMEngine) and other.engine.context_tokens == 512
    pairs = zip(*(answers(tmp_path / name) for name in ("hf", "vllm")), strict=True)
    for (a, top_a), (b, top_b) in pairs:
        assert (a["response_ids"], a["response"], a["finished"]) == (b["response_ids"], b["response"], b["finished"])
        assert a["key"] != b["key"]  # answers of two engines are two answers
        for (ids, log_probs), (other_ids, other_log_probs) in zip(top_a, top_b, strict=True):
            both = dict(zip(ids, log_probs, strict=True))
            for token, value in zip(other_ids, other_log_probs, strict=True):
                assert both.get(token, log_probs[-1]) == pytest.approx(value, abs=0.02)
    with pytest.raises(ConfigError, match="vLLM cannot run .*vllm"):
        VLLMEngine(
            TargetsConfig(llm=smollm2, vllm=VLLMConfig(options={"no_such_option": 1})), tokenizer(smollm2), smollm2
        )


def tokenizer(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def answers(folder):
    """Each target of a manifest with its teacher: for every token (ids, log-probabilities)."""
    from lhotse import CutSet

    from nemo_mtbi.data.target import TARGETS_FIELD, TEACHER_IDS_FIELD, TEACHER_LOG_PROBS_FIELD

    for cut in CutSet.from_jsonl(folder / "train.jsonl"):
        ids, log_probs = cut.load_custom(TEACHER_IDS_FIELD), cut.load_custom(TEACHER_LOG_PROBS_FIELD)
        rows = [(i.tolist(), p.tolist()) for i, p in zip(ids, log_probs, strict=True)]
        for target in cut.custom[TARGETS_FIELD]:
            begin = target["teacher_begin"]
            yield target, rows[begin : begin + len(target["response_ids"])]


def test_what_vllm_cannot_do_is_said_before_any_weight(tmp_path, smollm2, monkeypatch):
    config = TargetsConfig(
        **values(tmp_path, smollm2), output_dir=str(tmp_path / "out"), engine="vllm", temperature=2.0
    )
    with pytest.raises(ConfigError, match="log-probabilities at 1 alone; use engine=hf"):
        check_values(config)
    if not HERE:
        with pytest.raises(ConfigError, match=r"pip install 'nemo-mtbi\[vllm\]'"):
            check_values(config)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(1, 2, 8) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_gpus(1, 2, 4) == {"CUDA_VISIBLE_DEVICES": "6,7"} and visible_gpus(0, 1, 0) == {}
    with pytest.raises(ConfigError, match="Worker 2 needs the GPUs 4 to 5, and there are 4"):
        visible_gpus(2, 2, 4)
