"""Training steps with and without cached encoder features, and the size of the cache.

    python benchmarks/encoder_cache.py [--quick] [--json FILE]

A CTC connector and SmolLM2-135M, 32 utterances of 4 s, at 30 s windows and at the audio's own length. ``texts``: a
two-channel connector whose recognizer is frozen, 16 utterances of the package's LibriSpeech of up to 6 s, with cached
features, without and with what the recognizer writes of them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
from results_file import finish

BATCH, SECONDS = 32, 4.0


def build(input_length: str, adapter: dict[str, Any], **changes: Any) -> Any:
    from nemo_mtbi.models import MTBISALM

    model = MTBISALM(
        {
            "pretrained_llm": "offline:smollm2-135m-instruct",
            "pretrained_asr": "offline:whisper-tiny.en",
            "prompt_format": "chatml",
            "llm_dtype": "auto",
            "perception": {
                "input_length": input_length,
                "modality_adapter": {**adapter, "_target_": f"nemo_mtbi.modules.connectors.{adapter['_target_']}"},
            },
            "imitation": {"w_kl": 0.0, "teacher": "none"},
            **changes,
        }
    )
    model.log = model.log_dict = lambda *a, **k: None
    return model.train()


def noise(sampling_rate: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(round(SECONDS * sampling_rate), generator=g) for _ in range(BATCH)]


def speech(sampling_rate: int) -> list[torch.Tensor]:
    """Utterances of the package of 3 to 6 s."""
    import nemo_mtbi

    found = []
    for file in sorted((Path(nemo_mtbi.__file__).parent / "samples" / "librispeech").glob("*.mp3")):
        samples, rate = soundfile.read(file, dtype="float32")
        assert rate == sampling_rate
        if 3 <= len(samples) / rate <= 6:
            found.append(torch.from_numpy(samples))
    return found[: BATCH // 2]


def make_batch(audios: list[torch.Tensor], sampling_rate: int) -> dict[str, Any]:
    from nemo_mtbi.data.example import Example
    from nemo_mtbi.data.interleaving import Word, timeline

    g = torch.Generator().manual_seed(0)
    examples = []
    for i, audio in enumerate(audios):
        seconds = len(audio) / sampling_rate
        ids = torch.randint(100, 40_000, (40,), generator=g).tolist()
        words = [Word(20 + j, 21 + j, j * seconds / 10, (j + 0.8) * seconds / 10) for j in range(10)]
        answer = torch.randint(100, 40_000, (12,), generator=g).tolist()
        examples.append(Example(f"u{i}", 0, "t", "p", ids, timeline(words, seconds), answer, seconds, "x"))
    return {
        "examples": examples,
        "audios": torch.nn.utils.rnn.pad_sequence(audios, batch_first=True),
        "audio_lens": torch.tensor([len(audio) for audio in audios]),
    }


def steps_per_second(model: Any, batches: dict[str, dict[str, Any]], rounds: int) -> dict[str, float]:
    """Of training steps on each batch, which take turns; medians, after a first round."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    for index in range(rounds + 1):
        for name, data in batches.items():
            begin = time.perf_counter()
            model.training_step(dict(data), 0)["loss"].backward()
            if index:
                times[name].append(time.perf_counter() - begin)
    return {name: 1 / statistics.median(own) for name, own in times.items()}


def with_features(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    features, lengths = model.encode(batch["audios"], batch["audio_lens"])
    return {
        "examples": batch["examples"],
        "encoder_features": features.bfloat16(),
        "encoder_feature_lens": lengths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from nemo_mtbi.process import tune

    tune(2)
    rounds = 2 if args.quick else 5
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
    for input_length in ("own", "trained"):
        model = build(input_length, {"_target_": "CTCCompressConnector", "vocab_size": 300})
        model.set_ctc_vocabulary(list(range(1000, 1300)))
        batch = make_batch(noise(model.sampling_rate), model.sampling_rate)
        cached = with_features(model, batch)
        rates = steps_per_second(model, {"uncached": batch, "cached": cached}, rounds)
        features = cached["encoder_features"]
        per_hour = 2 * int(cached["encoder_feature_lens"].sum()) * features.shape[-1] / (BATCH * SECONDS) * 3600
        result[input_length] = {
            "steps_per_s": {k: round(v, 3) for k, v in rates.items()},
            "steps_per_s_vs_uncached": round(rates["cached"] / rates["uncached"], 3),
            "mib_per_hour_of_speech": round(per_hour / 2**20, 1),
        }
    frozen = [
        r"^(llm|embed_tokens)\..+$",
        r"^perception\.encoder.+$",
        r"^perception\.modality_adapter\.(?!acoustic\.).+$",
    ]
    model = build("own", {"_target_": "TwoChannelConnector"}, freeze_params=frozen)
    connector = model.perception.modality_adapter
    connector.begin_imitation()
    cached = with_features(model, make_batch(speech(model.sampling_rate), model.sampling_rate))
    written = connector.write(cached["encoder_features"].float(), cached["encoder_feature_lens"])
    rates = steps_per_second(model, {"cached": cached, "texts": cached | {"written": written}}, rounds)
    result["texts"] = {
        "steps_per_s": {k: round(v, 3) for k, v in rates.items()},
        "steps_per_s_vs_cached_features": round(rates["texts"] / rates["cached"], 3),
        "tokens_an_utterance": round(sum(map(len, written)) / len(written), 1),
    }
    result["steps_per_s_vs_uncached"] = result["own"]["steps_per_s_vs_uncached"]
    finish(result, args.json)


if __name__ == "__main__":
    main()
