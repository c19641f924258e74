"""A frozen LLM spread over processes with Megatron-Core: memory, agreement, communication and step time against one
process.

    python benchmarks/tensor_parallel.py [--quick] [--json FILE]

The LLM has SmolLM2-135M's shape with 12 attention and 4 key/value heads (so that 2 and 4 ranks divide it), random
weights, fp32, read from safetensors; a step is forward and backward of 4 x 96 positions through the body, and the
fused CE + KL on 128 of them.

- ``llm_bytes_fraction``: bytes of the LLM's parameters on a rank over those of the whole LLM;
  ``load_peak_fraction``: growth of a rank's resident memory while it reads its shard, over the same growth for the
      whole LLM.
- ``max_rel_diff``: largest difference of the gradient with respect to the input embeddings, over its largest value.
- ``bytes_per_token``: all-reduced by a rank; ``theoretical_bytes_per_token``: 2 all-reduces a layer forward, 2
  backward, each of H values.
- ``step_vs_one_process``: with gloo over shared memory on the same two cores, so it can only be larger than 1 here.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from results_file import finish

LAYERS, HIDDEN, VOCABULARY, ROWS, POSITIONS, RESPONSE_ROWS = 30, 576, 49_152, 4, 96, 128


def step(llm: Any, shard: Any) -> tuple[torch.Tensor, float]:
    """-> gradient with respect to the embeddings, seconds."""
    from nemo_mtbi.losses.imitation import ImitationObjective, imitation_loss
    from nemo_mtbi.models.language_model import hidden_states
    from nemo_mtbi.modules.causal_lm import output_head

    g = torch.Generator().manual_seed(0)
    inputs = (0.1 * torch.randn(ROWS, POSITIONS, HIDDEN, generator=g)).requires_grad_()
    ids = torch.randint(VOCABULARY, (RESPONSE_ROWS,), generator=g)
    begin = time.perf_counter()
    hidden = hidden_states(llm, inputs).flatten(0, 1)[:RESPONSE_ROWS]
    head = output_head(llm) if shard is None else output_head(llm, shard)
    loss = imitation_loss(hidden, head, ids, ImitationObjective(), teacher_hidden=hidden.detach().roll(1, 0))
    loss.loss.backward()
    assert inputs.grad is not None
    return inputs.grad, time.perf_counter() - begin


def resident() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def warm_up(folder: str) -> None:
    """Import what building the LLM imports, so that code does not count as weights: a model of the same class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = dict(
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **tiny))


def worker(rank: int, size: int, port: int, folder: str, rounds: int, results: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_mtbi.parallel.launch import initialize
    from nemo_mtbi.parallel.loading import empty_llm, load_shards
    from nemo_mtbi.parallel.sharding import shard_llm

    torch.set_num_threads(max(1, 2 // size))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    initialize(size)
    warm_up(folder)
    before, shard = resident(), None
    if size == 1:
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    else:
        llm = empty_llm(AutoConfig.from_pretrained(folder), torch.float32).requires_grad_(False)
        shard = shard_llm(llm)
        load_shards(llm, folder, torch.device("cpu"))
    for parameter in llm.parameters():  # pages of a mapped file count when they are read
        parameter.sum()
    peak = resident() - before
    gradient, _ = step(llm, shard)
    seconds = [step(llm, shard)[1] for _ in range(rounds)]
    sent = [0]
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = torch.distributed.all_reduce = counting
    step(llm, shard)
    held = sum(p.numel() * p.element_size() for p in llm.parameters())
    results[rank] = (gradient, statistics.median(seconds), held, peak, sent[0])
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 ranks, 2 rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=48,
        tie_word_embeddings=True,
    )
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        LlamaForCausalLM(config).save_pretrained(folder)
        one: Any = None
        for size in (1, 2) if args.quick else (1, 2, 4):
            results = manager.dict()
            mp.spawn(worker, (size, 29600 + size, folder, 2 if args.quick else 5, results), nprocs=size)
            gradient, seconds, held, _, sent = results[0]
            one = one or results[0]
            tokens = ROWS * POSITIONS
            result[f"tp{size}"] = {
                "llm_bytes_fraction": round(held / one[2], 4),
                "load_peak_fraction": round(max(r[3] for r in results.values()) / one[3], 4),
                "max_rel_diff": float((gradient - one[0]).abs().max() / one[0].abs().max()),
                "bytes_per_token": round(sent / tokens),
                "theoretical_bytes_per_token": 0 if size == 1 else 4 * LAYERS * HIDDEN * 4,
                "seconds": round(seconds, 3),
                "step_vs_one_process": round(seconds / one[1], 3),
            }
            print(json.dumps({size: result[f"tp{size}"]}), flush=True)
    finish(result, args.json)


if __name__ == "__main__":
    main()
