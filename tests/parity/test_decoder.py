"""Greedy decoding with continuous refill against Transformers' ``generate``, prompt by prompt, in fp32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_mtbi.models.language_model import teacher_hidden_states
from nemo_mtbi.modules.causal_lm import output_head
from nemo_mtbi.targets.decoder import RefillDecoder, Request

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval().requires_grad_(False)


def requests(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 30, (count,), generator=g).tolist()
    budgets = torch.randint(1, 25, (count,), generator=g).tolist()
    return [
        Request(f"k{i}", torch.randint(10, 4000, (n,), generator=g).tolist(), b)
        for i, (n, b) in enumerate(zip(sizes, budgets, strict=True))
    ]


def stops_that_happen(llm, items):
    """Tokens that the random model does emit, so that answers end at different times."""
    out = [
        llm.generate(
            input_ids=torch.tensor([r.prompt_ids]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1
        )[0, len(r.prompt_ids) :]
        for r in items[:12]
    ]
    return {int(row[3]) for row in out}


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_same_text_as_transformers(llm, batch_size):
    items = requests(23)
    stop = stops_that_happen(llm, items)
    answers = {a.key: a for a in RefillDecoder(llm, stop, batch_size).run(items)}
    assert len(answers) == len(items)
    finished = 0
    for request in items:
        expected = llm.generate(
            input_ids=torch.tensor([request.prompt_ids]),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stop),
            pad_token_id=0,
        )[0, len(request.prompt_ids) :].tolist()
        answer = answers[request.key]
        assert answer.response_ids == expected
        assert answer.finished == (expected[-1] in stop)
        finished += answer.finished
    assert 0 < finished < len(items)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_equals_a_teacher_forced_pass(llm, temperature):
    items = requests(9, seed=1)
    answers = list(RefillDecoder(llm, {5}, 4, top_k=6, temperature=temperature).run(items))
    by_key = {r.key: r for r in items}
    prompts, responses = [by_key[a.key].prompt_ids for a in answers], [a.response_ids for a in answers]
    hidden = teacher_hidden_states(llm, llm.get_input_embeddings(), prompts, responses)
    expected, ids = (output_head(llm).logits(hidden) / temperature).log_softmax(-1).topk(6)
    got = torch.cat([a.top_log_probs for a in answers]).float()
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=5e-3)
    assert (torch.cat([a.top_ids for a in answers]) == ids).float().mean() > 0.95  # near ties may swap in float16
    greedy = torch.tensor([t for r in responses for t in r])
    assert (torch.cat([a.top_ids for a in answers])[:, 0] == greedy).all()


def test_no_request_is_no_answer(llm):
    assert list(RefillDecoder(llm, {5}, 4).run([])) == []
