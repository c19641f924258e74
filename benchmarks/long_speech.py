"""Long speech: what is left of a model when its positions are fused, and what an hour of audio costs.

    python benchmarks/long_speech.py RUN CUTS [--recordings CUTS] [--minutes M ...] [--quick] [--json FILE] [--png FILE]
    python benchmarks/long_speech.py --seams [--json FILE]

RUN: a training run (or RUN@STAGE) with a dense connector; CUTS: a manifest of utterances with speakers and targets.

- ``recovery_by_share``: token agreement with the text LLM on CUTS where similar neighbours are fused to a share of the
  positions, over that of all positions; ``average_pooling_by_share``: where equal groups of neighbours are averaged;
  ``fusion_over_average_pooling``: the difference of the two, paired over utterances (bootstrap).
- ``long_recordings``: the same on recordings of consecutive utterances of one speaker (of ``--recordings``, with
  transcripts; default: CUTS), up to ``MOST`` for each of ``--minutes`` that the speakers fill, by the place of the
  answer; beside them the cascade (Whisper tiny.en and the text LLM). Shares that do not fit into the LLM's context are
  left out.
- ``seams``: word error rate within a second of a cut and elsewhere, of Whisper tiny.en's decoder on the package's
  LibriSpeech, joined by speaker; cut where it is quiet, and every 30 s.
- ``first_token_10min``: seconds from ten minutes of audio in a file to the first token, model loaded, with 400
  positions, with all of them (be they more than the LLM's context), and of the cascade;
  ``first_token_speedup_10min``: the second over the first.
- ``peak_gb_by_minutes``: peak memory of a process that answers with 400 positions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from results_file import finish, peak_gb
from torch import Tensor, nn

SHARES = (1.0, 0.5, 0.25, 0.125)
BUDGET, RATE = 400, 16_000
ASR = "offline:whisper-tiny.en"
PROMPT = "What is this about?"
RESAMPLES = 1000
MOST = 4  # recordings of one length
ROOM = 512  # positions of prompt and answer


class AveragePooling(nn.Module):
    """Equal groups of neighbours, averaged."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, speech: Any, *_: Any) -> Any:
        from nemo_mtbi.modules.connectors.base import frame_mask

        mask = frame_mask(speech.lengths, speech.embeddings.shape[1]).to(speech.embeddings.dtype)

        def pooled(values: Tensor) -> Tensor:
            padding = -values.shape[1] % self.size
            values = nn.functional.pad(values, (0, 0, 0, padding) if values.ndim == 3 else (0, padding))
            return values.unflatten(1, (-1, self.size)).sum(2)

        count = pooled(mask).clamp_min(1)
        embeddings = pooled(speech.embeddings * mask[..., None]) / count[..., None]
        lengths = (speech.lengths + self.size - 1) // self.size
        return replace(speech, embeddings=embeddings, lengths=lengths, centers=pooled(speech.centers * mask) / count)


def by_share(model: Any, cuts: Any, cached: bool, batch_size: int) -> dict[str, Any]:
    """Scores of each way and share on cuts with targets."""
    from nemo_mtbi.evaluation.score import Evaluation
    from nemo_mtbi.evaluation.statistics import Bootstrap
    from nemo_mtbi.evaluation.systems import SpeechSystem
    from nemo_mtbi.modules.fusion import Fusion
    from nemo_mtbi.modules.perception import connector_of, context_of

    connector = connector_of(model.perception)
    assert connector is not None and not connector.emits_tokens
    per_second = 1 / (connector.subsampling_factor * model.frame_seconds)
    longest, context = max(cut.duration for cut in cuts), context_of(model.llm.config) or float("inf")
    shares = [share for share in SHARES if longest * per_second * share + ROOM <= context]
    evaluation = Evaluation(model, cuts, cached_features=cached, batch_size=batch_size)
    own, rows = model.perception.fusion, dict[str, dict[str, Any]]({"fusion": {}, "average_pooling": {}})
    differences: dict[str, Any] = {}
    for share in shares:
        ways = {"fusion": Fusion(per_second=share * per_second), "average_pooling": AveragePooling(round(1 / share))}
        found = {}
        for name, way in ways.items():
            if share == 1 and name != "fusion":
                rows[name]["1"] = rows["fusion"]["1"]
                continue
            model.perception.fusion = None if share == 1 else way.eval()
            found[name] = evaluation.score(f"{name} {share:g}", SpeechSystem(model), generate=False)
            scores = found[name].summary()
            rows[name][f"{share:g}"] = {k: scores[k] for k in ("token_agreement", "kl_per_token", "by_task")}
        if len(found) == 2:
            pairs = {m: [found[name].sums(m) for name in ways] for m in ("token_agreement", "kl_per_token")}
            bootstrap = Bootstrap(next(iter(pairs.values()))[0].ids, RESAMPLES)
            differences[f"{share:g}"] = {m: bootstrap.compare(*pair) for m, pair in pairs.items()}
    model.perception.fusion = own
    result = {"positions_per_second": per_second, "scores": rows, "fusion_over_average_pooling": differences}
    if 1.0 in shares:
        whole = rows["fusion"]["1"]["token_agreement"]
        result["recovery"] = {
            name: {share: row["token_agreement"] / whole for share, row in found.items()}
            for name, found in rows.items()
        }
    return result


def on_long_recordings(model: Any, cuts: Any, minutes: float, folder: Path) -> dict[str, Any]:
    """Scores on recordings of that length, by its name; empty if no speaker fills one."""
    from lhotse import CutSet

    from nemo_mtbi.data.audio_stream import open_audio
    from nemo_mtbi.evaluation.asr import WhisperASR
    from nemo_mtbi.evaluation.long_speech import long_recordings, questions_on
    from nemo_mtbi.evaluation.score import Evaluation
    from nemo_mtbi.evaluation.systems import TextSystem
    from nemo_mtbi.tasks.library import load_library

    recordings = chosen(long_recordings(cuts, 60 * minutes, folder))
    if not recordings:
        return {}
    asked = CutSet.from_cuts(questions_on(recordings, model, load_library()["question_generation"]))
    found = by_share(model, asked, cached=False, batch_size=2)
    waves = [np.concatenate(list(open_audio(r.path, RATE))) for r in recordings]
    texts = WhisperASR(ASR).transcripts(waves)
    heard = dict(zip([r.path.stem for r in recordings], texts, strict=True))
    cascade = Evaluation(model, asked, cached_features=False, batch_size=2)
    scores = cascade.score("cascade", TextSystem(model, heard), generate=False).summary()
    found["cascade"] = {k: scores[k] for k in ("token_agreement", "kl_per_token", "by_task")}
    return {f"{minutes:g}": {"recordings": len(recordings), **found}}


def chosen(recordings: list[Any]) -> list[Any]:
    """Up to ``MOST``, from all speakers alike."""
    step = max(1, len(recordings) / MOST)
    return [recordings[int(i * step)] for i in range(min(MOST, len(recordings)))]


@torch.no_grad()
def seams(folder: Path) -> dict[str, Any]:
    """Word errors at cuts and elsewhere, for both ways to cut."""
    from nemo_mtbi.data.audio_windows import audio_windows
    from nemo_mtbi.evaluation.asr import WhisperASR
    from nemo_mtbi.evaluation.long_speech import long_recordings, seam_errors, word_times
    from nemo_mtbi.preparation.sources import SourceConfig, read_tsv
    from nemo_mtbi.preparation.word_times import PocketSphinxAligner

    table = SourceConfig("tsv", "pkg://nemo_mtbi/samples/librispeech/transcripts.tsv", split_column="split")
    cuts = [entry.load() for entry in read_tsv(table)]
    recordings, aligner, asr = long_recordings(cuts, 100.0, folder), PocketSphinxAligner(), WhisperASR(ASR)
    totals: dict[str, Any] = {"recordings": len(recordings), "minutes": sum(r.seconds for r in recordings) / 60}
    for way in ("quiet", "every_30_s"):
        sums: dict[str, int] = {}
        for recording in recordings:
            samples, _ = soundfile.read(recording.path, dtype="float32")
            if way == "quiet":
                windows = [(w.begin, w.samples) for w in audio_windows([samples], RATE, 30 * RATE, 320)]
            else:
                windows = [(b, samples[b : b + 30 * RATE]) for b in range(0, len(samples), 30 * RATE)]
            text = " ".join(asr.transcripts([part for _, part in windows]))
            cut_at = [begin / RATE for begin, _ in windows[1:]]
            for key, value in seam_errors(word_times(recording, aligner), text, cut_at).items():
                sums[key] = sums.get(key, 0) + value
        rates = {f"wer_{k}": sums[f"errors_{k}"] / max(1, sums[f"words_{k}"]) for k in ("at_seams", "elsewhere")}
        totals[way] = {**sums, **rates}
    return totals


def recording_of(cuts: Any, minutes: float, folder: Path) -> Path:
    """A recording of that length; the utterances come again and again."""
    from nemo_mtbi.data.audio import mono_samples

    path = folder / f"{minutes:g}min.wav"
    left = round(minutes * 60 * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        while left:
            for cut in cuts:
                samples = mono_samples(cut, RATE)[:left]
                file.write(samples)
                left -= len(samples)
    return path


def measure(model_path: str, audio: Path, budget: str) -> None:
    """In a process of its own: seconds to the first token, and peak memory."""
    from nemo_mtbi.data.audio_stream import open_audio
    from nemo_mtbi.evaluation.asr import WhisperASR
    from nemo_mtbi.models.exported import open_speech_llm

    model = open_speech_llm(model_path)
    asr = WhisperASR(ASR) if budget == "cascade" else None
    if asr is not None:
        _ = asr.parts
    elif budget != "all":
        model.limit_positions(int(budget))
    begin = time.perf_counter()
    if asr is not None:
        text = asr.transcripts([np.concatenate(list(open_audio(audio, RATE)))])[0]
        model.generate([[model.text_turn(PROMPT, text)]], max_new_tokens=1, do_sample=False)
    else:
        heard = model.listen([open_audio(audio, model.sampling_rate)])
        listened = time.perf_counter() - begin
        dialog = [[model.user_turn(PROMPT)]]
        inputs, mask, _ = model.dialog_inputs(dialog, model.prompt_pieces(dialog)[0], heard)
        model.generate_from_embeddings(inputs, mask, max_new_tokens=1, do_sample=False)  # beyond the context too
    seconds = time.perf_counter() - begin
    result = {"seconds": seconds, "peak_gb": peak_gb()}
    if asr is None:
        result |= {"listening": listened, "positions": int(heard.speech.lengths.max())}
    print(json.dumps(result))


def measured(*arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def keep(result: dict[str, Any], path: Path | None) -> None:
    """What is measured so far."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def plot(result: dict[str, Any], path: Path) -> None:
    """Recovery by share of the positions, seconds to the first token, and memory."""
    from nemo_mtbi.io.html import save_picture, subplots

    figure, (left, middle, right) = subplots(1, 3, figsize=(12, 3.6))
    for key, name in (("recovery_by_share", "fusion"), ("average_pooling_by_share", "average pooling")):
        left.plot([f"1/{round(1 / float(s))}" for s in result[key]], list(result[key].values()), "o-", label=name)
    left.set(title="agreement with the text LLM\nover that of all positions", xlabel="share of the positions")
    left.legend()
    ways = result["first_token_10min"]
    names = {str(BUDGET): f"{BUDGET} positions", "all": "all positions", "cascade": "cascade"}
    middle.bar([names[str(w)] for w in ways], [own["seconds"] for own in ways.values()], color="#76b900")
    middle.set(title="ten minutes of audio:\nseconds to the first token")
    memory = result["peak_gb_by_minutes"]
    right.plot([str(m) for m in memory], list(memory.values()), "o-")
    right.set(title=f"peak memory, {BUDGET} positions", xlabel="minutes of audio", ylabel="GB", ylim=(0, None))
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
        return
    if sys.argv[1:2] == ["--seams"]:  # needs no model of ours
        with tempfile.TemporaryDirectory() as temporary:
            finish(seams(Path(temporary)), Path(sys.argv[3]) if sys.argv[2:3] == ["--json"] else None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("cuts", type=Path)
    parser.add_argument("--recordings", type=Path, help="manifest of the utterances of long recordings")
    parser.add_argument("--minutes", type=float, nargs="*", default=[0.5, 1, 2, 5, 10], help="of long recordings")
    parser.add_argument("--quick", action="store_true", help="the short utterances, and one and ten minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path, help="curves")
    arguments = parser.parse_args()
    from lhotse import CutSet

    from nemo_mtbi.checkpoints.archive import save_directory
    from nemo_mtbi.checkpoints.run_directory import RunDirectory
    from nemo_mtbi.models import MTBISALM

    run, stage = RunDirectory.parse(arguments.run)
    model = MTBISALM.from_run(run, stage).eval()
    cuts = list(CutSet.from_file(arguments.cuts))
    short = by_share(model, CutSet.from_cuts(cuts), cached=True, batch_size=32)
    result: dict[str, Any] = {
        "utterances": len(cuts),
        "recovery_by_share": short["recovery"]["fusion"],
        "average_pooling_by_share": short["recovery"]["average_pooling"],
        **{k: v for k, v in short.items() if k != "recovery"},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exported = save_directory(model, folder / "model")
        audio = {m: recording_of(cuts, m, folder) for m in ((1, 10) if arguments.quick else (1, 10, 60))}
        keep(result, arguments.json)
        ways = {way: measured(exported, audio[10], way) for way in (BUDGET, "all", "cascade")}
        result["first_token_10min"] = ways
        result["first_token_speedup_10min"] = ways["all"]["seconds"] / ways[BUDGET]["seconds"]
        result["at_400_positions"] = {m: measured(exported, file, BUDGET) for m, file in audio.items()}
        result["peak_gb_by_minutes"] = {m: own["peak_gb"] for m, own in result["at_400_positions"].items()}
        if not arguments.quick:
            spoken = list(CutSet.from_file(arguments.recordings)) if arguments.recordings else cuts
            result["long_recordings"] = {}
            for minutes in arguments.minutes:
                keep(result, arguments.json)
                result["long_recordings"] |= on_long_recordings(model, spoken, minutes, folder)
            keep(result, arguments.json)
            result["seams"] = seams(folder)
    finish(result, arguments.json)
    if arguments.png:
        plot(result, arguments.png)


if __name__ == "__main__":
    main()
