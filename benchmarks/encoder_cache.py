"""Training steps with and without cached encoder features, and the size of the cache.

    python benchmarks/encoder_cache.py [--quick] [--json FILE]

The default connector and LLM of conf/model/offline.yaml, 32 utterances of 4 s, at 30 s windows and at the audio's own
length.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results_file import finish

BATCH, SECONDS = 32, 4.0


def build(input_length: str) -> Any:
    from nemo_mtbi.models import MTBISALM

    model = MTBISALM(
        {
            "pretrained_llm": "offline:smollm2-135m-instruct",
            "pretrained_asr": "offline:whisper-tiny.en",
            "prompt_format": "chatml",
            "llm_dtype": "bfloat16",
            "perception": {
                "input_length": input_length,
                "modality_adapter": {
                    "_target_": "nemo_mtbi.modules.connectors.CTCCompressConnector",
                    "vocab_size": 300,
                },
            },
            "imitation": {"w_kl": 0.0, "teacher": "none"},
        }
    )
    model.set_ctc_vocabulary(list(range(1000, 1300)))
    model.log = model.log_dict = lambda *a, **k: None
    return model.train()


def make_batch(model: Any) -> dict[str, Any]:
    from nemo_mtbi.data.example import Example
    from nemo_mtbi.data.interleaving import Word, timeline

    g = torch.Generator().manual_seed(0)
    samples = round(SECONDS * model.sampling_rate)
    examples = []
    for i in range(BATCH):
        ids = torch.randint(100, 40_000, (40,), generator=g).tolist()
        words = [Word(20 + j, 21 + j, j * 0.4, j * 0.4 + 0.3) for j in range(10)]
        answer = torch.randint(100, 40_000, (12,), generator=g).tolist()
        examples.append(Example(f"u{i}", 0, "t", "p", ids, timeline(words, SECONDS), answer, SECONDS, "x"))
    return {
        "examples": examples,
        "audios": 0.1 * torch.randn(BATCH, samples, generator=g),
        "audio_lens": torch.full((BATCH,), samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from nemo_mtbi.process import tune

    tune(2)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
    for input_length in ("own", "trained"):
        model = build(input_length)
        batch = make_batch(model)
        features, lengths = model.encode(batch["audios"], batch["audio_lens"])
        cached = {
            "examples": batch["examples"],
            "encoder_features": features.bfloat16(),
            "encoder_feature_lens": lengths,
        }
        times: dict[str, list[float]] = {"uncached": [], "cached": []}
        for index in range((2 if args.quick else 5) + 1):
            for name, data in (("uncached", batch), ("cached", cached)):
                begin = time.perf_counter()
                model.training_step(data, 0)["loss"].backward()
                if index:
                    times[name].append(time.perf_counter() - begin)
        median = {k: statistics.median(v) for k, v in times.items()}
        per_hour = 2 * int(lengths.sum()) * features.shape[-1] / (BATCH * SECONDS) * 3600
        result[input_length] = {
            "steps_per_s": {k: round(1 / v, 3) for k, v in median.items()},
            "steps_per_s_vs_uncached": round(median["uncached"] / median["cached"], 3),
            "mib_per_hour_of_speech": round(per_hour / 2**20, 1),
        }
    result["steps_per_s_vs_uncached"] = result["own"]["steps_per_s_vs_uncached"]
    finish(result, args.json)


if __name__ == "__main__":
    main()
