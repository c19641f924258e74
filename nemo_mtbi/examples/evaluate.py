"""Token agreement, KL and repeat WER of a trained run beside text topline and cascade. See conf/evaluate.yaml."""

import shlex
import sys
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.columns import CASCADE, NORMALIZED_CASCADE
from nemo_mtbi.examples._launcher import announce, launcher


@launcher("evaluate")
def main(cfg: DictConfig) -> None:
    from lhotse import CutSet

    from nemo_mtbi.checkpoints.run_directory import STAGES, UNTRAINED, RunDirectory
    from nemo_mtbi.data.conversation import require_cuts
    from nemo_mtbi.evaluation.asr import WhisperASR
    from nemo_mtbi.evaluation.report import write_report
    from nemo_mtbi.evaluation.score import Evaluation
    from nemo_mtbi.evaluation.silence import nothing_heard, require_spoken, spoken_cuts
    from nemo_mtbi.evaluation.systems import SpeechSystem, TextSystem, require_text_llm
    from nemo_mtbi.models import MTBISALM
    from nemo_mtbi.parallel.launch import from_first_rank, is_first_rank, join_ranks
    from nemo_mtbi.process import tune

    tune(cfg.threads)
    if unknown := set(cfg.stages) - set(STAGES):
        raise ConfigError(f"stages: {sorted(unknown)[0]} is none; there are {', '.join(STAGES)}.")
    for path in [*cfg.cuts.values(), *filter(None, [cfg.no_speech])]:
        require_cuts(path)
    for name, path in cfg.cuts.items():
        require_spoken(name, path)
    device = join_ranks(cfg.tensor_model_parallel_size, "evaluate")
    run, output = RunDirectory(cfg.run), Path(cfg.output_dir or Path(cfg.run) / "evaluation")
    stages = [name for name in cfg.stages if run.weights(name).is_file()]
    if left := [name for name in cfg.stages if name not in stages]:
        console.say(f"Left out, since {cfg.run} does not have them: {', '.join(left)}.")
    begin = stages[-1] if stages else None
    model = MTBISALM.from_run(run, begin, cfg.llm_dtype, cfg.tensor_model_parallel_size).to(device)
    require_text_llm(model)
    command = shlex.join(["python", "-m", "nemo_mtbi.examples.evaluate", *sys.argv[1:]])
    results: dict[str, dict] = {}
    no_speech: dict[str, dict] = {}
    if cfg.no_speech:  # first: it is quick, and what it lacks is known before the long part
        silent = CutSet.from_file(cfg.no_speech)
        for name in stages:
            run.load_weights(model, name)
            title = f"no speech: {name}"
            share = nothing_heard(SpeechSystem(model), silent, cfg.cached_features, cfg.batch_size, title)
            no_speech[name] = {"nothing_heard": share}
        if is_first_rank():
            paths = write_report(output, results, no_speech, command)
    for manifest, path in cfg.cuts.items():
        evaluation = Evaluation(model, spoken_cuts(path), cfg.cached_features, cfg.batch_size)
        systems = results.setdefault(manifest, {})
        if cfg.text_topline:
            systems["text_topline"] = evaluation.score(f"{manifest}: text topline", TextSystem(model, None)).summary()
        if cfg.cascade:
            asr = WhisperASR.beside(model.config)
            cache = output / "cascade_transcripts.jsonl"
            transcripts = from_first_rank(partial(asr.transcribe, evaluation.questions.cuts, cache))
            cascade = TextSystem(model, transcripts)
            systems[CASCADE] = evaluation.score(f"{manifest}: cascade", cascade).summary()
            if cfg.normalized_cascade:
                title = f"{manifest}: cascade, normalized"
                systems[NORMALIZED_CASCADE] = evaluation.score(title, cascade.normalized()).summary()
        for name in stages:
            run.load_weights(model, name)
            systems[name] = evaluation.score(
                f"{manifest}: {name}", SpeechSystem(model), generate=name != UNTRAINED
            ).summary()
        if is_first_rank():  # what there is, in case that a later set fails
            paths = write_report(output, results, no_speech, command)
    if not is_first_rank():
        return
    if not console.within_step():
        console.say("\n" + paths["md"].read_text())
    announce("Results", dict(paths))


if __name__ == "__main__":
    main()
