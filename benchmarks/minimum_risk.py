"""KL alone, with and without minimum risk, on utterances that Whisper tiny.en mishears: which wrong words become right.

    python benchmarks/minimum_risk.py [--quick] [--json FILE]

8 LibriSpeech utterances of the package under white noise at 3 dB, SmolLM2-135M, Whisper's decoder as the connector,
w_ce = w_ctc = 0. The answer to "Repeat what was said, word for word." is the transcript; the teacher is online. The
same utterances are trained and counted on: what is shown is that the LLM's loss reaches the choice of words at all.
``wrong_words`` are substitutions, insertions and deletions after each number of steps.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from nemo.collections.common.prompts import PromptFormatter
from results_file import finish

from nemo_mtbi.data.audio import collate_waveforms, load_waveform
from nemo_mtbi.data.example import Example
from nemo_mtbi.data.interleaving import timeline
from nemo_mtbi.data.messages import user_message
from nemo_mtbi.data.rendering import PromptRenderer, Spoken
from nemo_mtbi.io.text import normalized
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.models.speech import encode, transcribe
from nemo_mtbi.preparation.sources import Entry, SourceConfig, read_tsv

UTTERANCES, SNR_DB, LEARNING_RATE = 8, 3.0, 5e-5
PROMPT = "Repeat what was said, word for word."


class OneStep:
    """What a training step reads of Lightning's trainer."""

    accumulate_grad_batches, global_step = 1, 0


def build(w_risk: float, samples: int) -> Any:
    return MTBISALM(
        {
            "pretrained_llm": "offline:smollm2-135m-instruct",
            "pretrained_asr": "offline:whisper-tiny.en",
            "perception": {
                "input_length": "own",
                "modality_adapter": {"_target_": "nemo_mtbi.modules.connectors.WhisperDecoderConnector"},
            },
            "imitation": {"teacher": "online", "w_ce": 0.0, "w_risk": w_risk, "risk_samples": samples},
            "interleaving": {"probability": 0.0},
        }
    )


def utterances() -> list[Entry]:
    table = SourceConfig("tsv", "pkg://nemo_mtbi/samples/librispeech/transcripts.tsv", split_column="split")
    entries = [e for e in read_tsv(table) if e.split == "train"]
    return [e for e in entries if e.load().duration < 6][::9][:UTTERANCES]


def make_batch(model: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    waves, examples = [], []
    renderer = PromptRenderer(model.tokenizer, PromptFormatter.resolve(model.cfg.prompt_format))
    tokenizer = model.tokenizer.tokenizer
    for entry in utterances():
        clean = load_waveform(entry.load().recording.sources[0].source, 16_000)
        noise = rng.standard_normal(len(clean)) * np.sqrt((clean**2).mean()) * 10 ** (-SNR_DB / 20)
        waves.append((clean + noise).astype(np.float32))
        seconds = len(clean) / 16_000
        prompt = renderer.render([user_message(PROMPT, Spoken(entry.text, (), seconds), "after")])
        answer = [*tokenizer(entry.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        units = timeline(prompt.spoken[-1], seconds)
        examples.append(Example(entry.id, 0, "repeat", "repeat", prompt.ids, units, answer, seconds, entry.text))
    audios, lengths = collate_waveforms(waves)
    return {"examples": examples, "audios": audios, "audio_lens": lengths}


@torch.no_grad()
def wrong_words(model: Any, batch: dict[str, Any]) -> dict[str, int]:
    model.eval()
    heard = transcribe(model.perception, *encode(model.perception, batch["audios"], batch["audio_lens"]))
    said = [normalized(e.transcript) for e in batch["examples"]]
    found = jiwer.process_words(said, [normalized(text) or "-" for text in heard or []])
    return {k: getattr(found, k) for k in ("substitutions", "insertions", "deletions")}


def learn(w_risk: float, steps: list[int], samples: int) -> dict[str, Any]:
    """Wrong words before and after each of ``steps``, and the seconds of a step."""
    model = build(w_risk, samples)
    batch = make_batch(model)
    model.log = model.log_dict = lambda *_, **__: None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    counts, seconds = {0: wrong_words(model, batch)}, 0.0
    for step in range(max(steps)):
        begin = time.perf_counter()
        torch.manual_seed(step)
        model.train()
        model._trainer = OneStep
        optimizer.zero_grad()
        model.training_step(dict(batch), 0)["loss"].backward()
        model.on_before_optimizer_step(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model._trainer = None
        seconds += time.perf_counter() - begin
        if step + 1 in steps:
            counts[step + 1] = wrong_words(model, batch)
            print(f"w_risk={w_risk:g}, {step + 1} steps: {counts[step + 1]} (before: {counts[0]})", flush=True)
    return {"wrong_words": counts, "step_seconds": round(seconds / max(steps), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 steps instead of 18")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    steps = [2, 4] if args.quick else [3, 6, 9, 12, 15, 18]
    results = {name: learn(w, steps, args.samples) for name, w in (("minimum_risk", 1.0), ("kl_alone", 0.0))}
    words = sum(len(normalized(e.text).split()) for e in utterances())
    finish({"words": words, **results}, args.json)


if __name__ == "__main__":
    main()
