"""One training step against NeMo's SALM, a plain CE + KL step, and the frozen LLM's own forward + backward.

    python benchmarks/train_step.py [--quick] [--packing] [--json FILE]

Same model (SmolLM2-135M and Whisper tiny.en shapes, a stacking connector), same batch, same response tokens: 8
utterances of 5 s, 111 positions, 24 response tokens. Variants take turns within one run; ratios are of medians.

Two processes take turns: one as NeMo leaves it, and one with our launchers' heap settings (``process.py``), which speed
up SALM too. ``examples_per_s_vs_salm_ce`` compares our defaults (heap settings, keys and values of prompt beginnings
kept, cached teacher) with SALM as its own launcher runs it; ``_same_heap`` gives SALM our heap, ``_all_positions`` no
kept prompts to us. ``packed_vs_padded`` is of a batch whose answers have 6 to 41 tokens, without and with packing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results_file import finish
from torch.nn.functional import cross_entropy

BATCH, SECONDS, PROMPT, RESPONSE, FACTOR = 8, 5.0, 38, 24, 5
REPLY = "reply: "
BEFORE, AFTER = 30, 8  # prompt tokens before and after the speech
POSITIONS = PROMPT + 50 + RESPONSE - 1
MEMORY_TOKENS, MEMORY_VOCABULARY, MEMORY_HIDDEN = 4096, 150_000, 576


def build(dtype: str) -> Any:
    from nemo_mtbi.models import MTBISALM

    return MTBISALM(
        {
            "pretrained_llm": "offline:smollm2-135m-instruct",
            "pretrained_asr": "offline:whisper-tiny.en",
            "prompt_format": "chatml",
            "llm_dtype": dtype,
            "encoder_dtype": "float32",
            "perception": {
                "input_length": "own",
                "round_seconds": 1.0,
                "modality_adapter": {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": FACTOR},
            },
            "interleaving": {"probability": 0.0},
            "imitation": {"teacher": "cached"},
        }
    )


def make_batch(model: Any, uneven: bool = False) -> dict[str, Any]:
    """The batch; ``uneven``: with answers of 6, 11, ... 41 tokens."""
    from nemo_mtbi.data.example import Example
    from nemo_mtbi.data.interleaving import Word, timeline

    g = torch.Generator().manual_seed(0)
    examples = []
    shared = torch.randint(100, 40_000, (BEFORE,), generator=g).tolist()
    for i in range(BATCH):
        spoken = torch.randint(100, 40_000, (14,), generator=g).tolist()
        ids = shared + spoken + torch.randint(100, 40_000, (AFTER,), generator=g).tolist()
        words = [Word(BEFORE + j, BEFORE + j + 1) for j in range(14)]
        answer = torch.randint(100, 40_000, (6 + 5 * i if uneven else RESPONSE,), generator=g).tolist()
        examples.append(Example(f"u{i}", 0, "t", "p", ids, timeline(words, SECONDS), answer, SECONDS, "x"))
    samples = round(SECONDS * model.sampling_rate)
    tokens = sum(len(e.response_ids) for e in examples)
    return {
        "examples": examples,
        "audios": 0.1 * torch.randn(BATCH, samples, generator=g),
        "audio_lens": torch.full((BATCH,), samples),
        "teacher_ids": torch.randint(100, 40_000, (tokens, 16), generator=g),
        "teacher_log_probs": torch.randn(tokens, 16, generator=g).log_softmax(-1) - 0.2,
    }


def variants(model: Any) -> dict[str, Callable[[], None]]:
    """Each runs one forward and backward pass."""
    from nemo.collections.speechlm2.models.salm import SALM

    from nemo_mtbi.models.language_model import PrefixStore, hidden_states

    model.train()
    model.llm.eval()
    model.log = model.log_dict = lambda *a, **k: None
    type(model).text_pad_id = property(lambda self: 0)  # SmolLM2's pad is its end-of-turn, which SALM would mask
    batch = make_batch(model)
    features, lengths = model.encode(batch["audios"], batch["audio_lens"])
    cached = {k: v for k, v in batch.items() if not k.startswith("audio")}
    known = {"encoder_features": features, "encoder_feature_lens": lengths}
    cached |= known
    uneven = {k: v for k, v in make_batch(model, uneven=True).items() if not k.startswith("audio")} | known
    salm_batch = {**batch, **salm_inputs(model, batch)}
    store = PrefixStore(4096)

    def ours(data: dict[str, Any], teacher: str, prefixes: Any, packs: bool = True) -> Callable[[], None]:
        def step() -> None:
            model.prefixes, model.config.imitation.teacher, model._packs = prefixes, teacher, packs
            model.training_step(data, 0)["loss"].backward()

        return step

    def salm_ce() -> None:
        SALM.training_step(model, salm_batch, 0)["loss"].backward()

    def plain_ce_kl() -> None:
        inputs = SALM.prepare_inputs(model, salm_batch)
        logits = SALM.forward(model, inputs["input_embeds"], inputs["attention_mask"])["logits"].float()
        targets = inputs["target_ids"]
        rows = targets != -100
        with torch.no_grad():
            ids = torch.tensor([e.prompt_ids + e.response_ids[:-1] for e in batch["examples"]])
            teacher = SALM.forward(model, model.embed_tokens(ids))["logits"].float()[:, -RESPONSE:].flatten(0, 1)
        student = logits[rows]
        kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum()
        ce = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
        (ce + kl).backward()

    inputs = pure_speech_inputs(model, batch, features, lengths)

    def llm_body() -> None:
        hidden_states(model.llm, inputs).sum().backward()

    return {
        "llm_body": llm_body,
        "salm_ce": salm_ce,
        "plain_ce_kl_online": plain_ce_kl,
        "ours_online_teacher": ours(batch, "online", None),
        "ours_online_teacher_kept_prompts": ours(batch, "online", store),
        "ours": ours(batch, "cached", None),
        "ours_kept_prompts": ours(batch, "cached", store),
        "ours_cached_features": ours(cached, "cached", None),
        "ours_cached_features_kept_prompts": ours(cached, "cached", store),
        "uneven_padded": ours(uneven, "cached", None, packs=False),
        "uneven_packed": ours(uneven, "cached", None),
        "uneven_padded_kept_prompts": ours(uneven, "cached", store, packs=False),
        "uneven_packed_kept_prompts": ours(uneven, "cached", store),
        "uneven_padded_online_teacher": ours(uneven, "online", store, packs=False),
        "uneven_packed_online_teacher": ours(uneven, "online", store),
    }


def pure_speech_inputs(
    model: Any, batch: dict[str, Any], features: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The LLM's input for a batch without interleaving."""
    from nemo_mtbi.data.example import plan_batch
    from nemo_mtbi.models.layout import build_inputs
    from nemo_mtbi.models.speech import connect

    examples = batch["examples"]
    responses, seconds = [e.response_ids for e in examples], [SECONDS] * BATCH
    speech = connect(model.perception, features, lengths)
    pieces = plan_batch(examples, None, 0, model.opening)
    inputs, _ = build_inputs(pieces, responses, speech, seconds, model.frame_seconds, model.embed_tokens)
    assert inputs.shape[1] == POSITIONS, inputs.shape
    return inputs.detach().requires_grad_()


def salm_inputs(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    tag = model.audio_locator_tag_id
    rows = [[*e.prompt_ids[:BEFORE], tag, *e.prompt_ids[-AFTER:], *e.response_ids] for e in batch["examples"]]
    mask = [[False] * (PROMPT + 1) + [True] * RESPONSE for _ in rows]
    return {"input_ids": torch.tensor(rows), "loss_mask": torch.tensor(mask)}


class Worker:
    """A process that holds a model and times its variants when asked."""

    def __init__(self, dtype: str, tuned: bool) -> None:
        command = [sys.executable, __file__, "--worker", dtype, *(["--tuned"] if tuned else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names: list[str] = json.loads(self._reply())

    def seconds(self, name: str) -> float:
        """Of one step of a variant."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(json.loads(self._reply()))

    def _reply(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(REPLY):
                return line.removeprefix(REPLY)
        raise SystemExit("a worker process died; its message is above")


def serve(dtype: str, tuned: bool) -> None:
    """The worker's side: variant names come in, seconds go out."""
    if tuned:
        from nemo_mtbi.process import tune

        tune(2)
    torch.set_num_threads(2)
    steps = variants(build(dtype))
    if not tuned:
        steps = {name: steps[name] for name in ("llm_body", "salm_ce", "plain_ce_kl_online")}
    print(REPLY + json.dumps(list(steps)), flush=True)
    for line in sys.stdin:
        step = steps[line.strip()]
        begin = time.perf_counter()
        step()
        print(REPLY + json.dumps(time.perf_counter() - begin), flush=True)


def measure(dtype: str, rounds: int, heaps: tuple[bool, ...] = (False, True), only: str = "") -> list[dict[str, float]]:
    """Median seconds of each variant with NeMo's and with our heap; all take turns, after one warm-up round.

    ``only``: variants whose names begin so.
    """
    workers = [Worker(dtype, tuned) for tuned in heaps]
    times: list[dict[str, list[float]]] = [{n: [] for n in w.names if n.startswith(only)} for w in workers]
    for index in range(rounds + 1):
        for worker, own in zip(workers, times, strict=True):
            for name in own:
                seconds = worker.seconds(name)
                if index:
                    own[name].append(seconds)
    for worker in workers:
        worker.process.terminate()
    return [{name: statistics.median(v) for name, v in own.items()} for own in times]


def packing_ratios(t: dict[str, float]) -> dict[str, float]:
    """Steps with packing over steps with padded rows, of uneven rows."""
    names = {"packed_vs_padded": "", "packed_vs_padded_kept_prompts": "_kept_prompts"}
    names |= {"packed_vs_padded_online_teacher": "_online_teacher"}
    return {ratio: t[f"uneven_padded{name}"] / t[f"uneven_packed{name}"] for ratio, name in names.items()}


def loss_peak(kind: str, tokens: int) -> float:
    """Peak memory (GiB) of the loss above its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--loss-peak", kind, "--tokens", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_loss_peak(kind: str, tokens: int) -> None:
    from nemo_mtbi.losses.imitation import Head, ImitationObjective, imitation_loss

    hidden = torch.randn(tokens, MEMORY_HIDDEN).requires_grad_()
    teacher, weight = torch.randn(tokens, MEMORY_HIDDEN), torch.randn(MEMORY_VOCABULARY, MEMORY_HIDDEN)
    ids = torch.randint(MEMORY_VOCABULARY, (tokens,))
    (hidden[:2] @ weight.t()).sum()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far (making the inputs) must not hide the loss's own
    before = memory_kib("VmRSS")
    if kind == "fused":
        imitation_loss(hidden, Head(weight), ids, ImitationObjective(), teacher_hidden=teacher).loss.backward()
    else:
        z, zt = hidden @ weight.t(), teacher @ weight.t()
        kl = (zt.softmax(-1) * (zt.log_softmax(-1) - z.log_softmax(-1))).sum()
        (cross_entropy(z, ids, reduction="sum") + kl).backward()
    print((memory_kib("VmHWM") - before) / 2**20)


def memory_kib(field: str) -> int:
    """A field of /proc/self/status: VmRSS (now) or VmHWM (peak)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, bf16 only, smaller memory test")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each variant")
    parser.add_argument("--packing", action="store_true", help="packed and padded rows alone, in float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loss-peak", choices=["fused", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loss_peak:
        print_loss_peak(args.loss_peak, args.tokens)
        return
    if args.worker:
        serve(args.worker, args.tuned)
        return
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__}
    if args.packing:
        (t,) = measure("float32", args.rounds, heaps=(True,), only="uneven")
        seconds = {k: round(v, 4) for k, v in t.items()}
        finish(result | {"seconds": seconds, **{k: round(v, 3) for k, v in packing_ratios(t).items()}}, args.json)
        return
    for dtype in ["bfloat16"] if args.quick else ["float32", "bfloat16"]:
        plain, t = measure(dtype, min(2, args.rounds) if args.quick else args.rounds)
        ratios = {
            "examples_per_s_vs_salm_ce": plain["salm_ce"] / t["ours_kept_prompts"],
            "examples_per_s_vs_salm_ce_cached_features": plain["salm_ce"] / t["ours_cached_features_kept_prompts"],
            "examples_per_s_vs_salm_ce_same_heap": t["salm_ce"] / t["ours_kept_prompts"],
            "examples_per_s_vs_salm_ce_same_heap_all_positions": t["salm_ce"] / t["ours"],
            "examples_per_s_vs_plain_ce_kl": plain["plain_ce_kl_online"] / t["ours_online_teacher_kept_prompts"],
            "examples_per_s_vs_plain_ce_kl_same_heap": t["plain_ce_kl_online"] / t["ours_online_teacher_kept_prompts"],
            "examples_per_s_vs_plain_ce_kl_same_heap_all_positions": t["plain_ce_kl_online"] / t["ours_online_teacher"],
            "step_vs_frozen_llm_limit": t["ours_cached_features"] / t["llm_body"],
            "step_vs_frozen_llm_limit_kept_prompts": t["ours_cached_features_kept_prompts"] / t["llm_body"],
            **packing_ratios(t),
            "salm_ce_vs_frozen_llm": plain["salm_ce"] / plain["llm_body"],
        }
        result[dtype] = {
            "seconds_nemo_heap": {k: round(v, 4) for k, v in plain.items()},
            "seconds": {k: round(v, 4) for k, v in t.items()},
            **{k: round(v, 3) for k, v in ratios.items()},
        }
    tokens = 512 if args.quick else MEMORY_TOKENS
    peaks = {kind: loss_peak(kind, tokens) for kind in ("fused", "plain")}
    result |= {
        "loss_memory": {
            "tokens": tokens,
            "vocabulary": MEMORY_VOCABULARY,
            "gib": {k: round(v, 3) for k, v in peaks.items()},
        },
        "loss_memory_vs_plain": round(peaks["fused"] / peaks["plain"], 4),
    }
    finish(result, args.json)


if __name__ == "__main__":
    main()
