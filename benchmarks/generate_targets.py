"""Answers per second of continuous refill against a fixed-batch loop padded to the longest, on the same prompts.

    python benchmarks/generate_targets.py [--quick] [--json FILE]

1,000 prompts of mixed length (task prompts of the library over everyday sentences), SmolLM2-135M, greedy, bf16; the
text is compared in fp32 by tests/parity/test_decoder.py. The fixed-batch loop is Transformers' ``generate`` over the
prompts in their given order, as the usual script does; its upper limit is one batch of equal lengths that runs to the
end.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results_file import finish

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="160 prompts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from nemo.collections.common.prompts import PromptFormatter
    from nemo.collections.common.tokenizers import AutoTokenizer

    from nemo_mtbi import registration as registration
    from nemo_mtbi.data.messages import user_message
    from nemo_mtbi.data.rendering import PromptRenderer, Spoken
    from nemo_mtbi.preparation.everyday import everyday_sentences
    from nemo_mtbi.pretrained.offline import resolve_pretrained
    from nemo_mtbi.process import tune
    from nemo_mtbi.targets.decoder import RefillDecoder, Request
    from nemo_mtbi.targets.engine import HFEngine
    from nemo_mtbi.tasks.library import load_library, render_template, select_tasks

    tune(2)
    name = "offline:smollm2-135m-instruct"
    tokenizer = AutoTokenizer(resolve_pretrained(name), use_fast=True)
    renderer = PromptRenderer(tokenizer, PromptFormatter.resolve("chatml"))
    tasks = [t for t in select_tasks(load_library(), None) if not t.prepare and not t.variables]
    rng = random.Random(0)
    requests = []
    for index, sentence in enumerate(everyday_sentences(160 if args.quick else 1000)):
        task = rng.choice(tasks)
        prompt = render_template(rng.choice(task.select("seen")).text, {"choices": task.choices})
        ids = renderer.render([user_message(prompt, Spoken(sentence), "after")]).ids
        requests.append(Request(str(index), ids, task.max_new_tokens))
    engine = HFEngine(name, "bfloat16", BATCH)
    llm: Any = engine.llm

    begin = time.perf_counter()
    answers = list(RefillDecoder(llm, engine.stop_ids, BATCH).run(requests))
    refill = time.perf_counter() - begin
    tokens = sum(len(a.response_ids) for a in answers)

    fixed = seconds_of_fixed_batches(llm, requests, engine.stop_ids)
    equal = torch.tensor([requests[0].prompt_ids[:30]] * BATCH)
    begin = time.perf_counter()
    llm.generate(
        input_ids=equal,
        attention_mask=torch.ones_like(equal),
        do_sample=False,
        max_new_tokens=24,
        min_new_tokens=24,
        pad_token_id=0,
    )
    limit = BATCH * 24 / (time.perf_counter() - begin)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "prompts": len(requests),
        "batch_size": BATCH,
        "response_tokens": tokens,
        "responses_per_s": {"refill": round(len(requests) / refill, 2), "fixed_batch": round(len(requests) / fixed, 2)},
        "responses_per_s_vs_fixed_batch": round(fixed / refill, 3),
        "tokens_per_s": {"refill": round(tokens / refill, 1), "generate_equal_lengths": round(limit, 1)},
    }
    finish(result, args.json)


def seconds_of_fixed_batches(llm: Any, requests: list[Any], stop_ids: set[int]) -> float:
    """Transformers' ``generate`` on batches in the given order."""
    begin = time.perf_counter()
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        width = max(len(r.prompt_ids) for r in batch)
        ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + r.prompt_ids for r in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch])
        llm.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(r.max_new_tokens for r in batch),
            eos_token_id=sorted(stop_ids),
            pad_token_id=0,
        )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
