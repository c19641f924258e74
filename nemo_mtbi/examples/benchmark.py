"""Generalization to unseen prompts and tasks: systems beside the text topline and the cascade. See conf/benchmark.yaml."""

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher

SALM_PREFIX = "salm:"


@launcher("benchmark")
def main(cfg: DictConfig) -> None:
    import torch
    from lhotse import CutSet

    from nemo_mtbi.data.conversation import check_manifest
    from nemo_mtbi.errors import ConfigError
    from nemo_mtbi.evaluation.asr import WhisperASR
    from nemo_mtbi.evaluation.benchmark import (
        CASCADE,
        COLUMNS,
        NORMALIZED_CASCADE,
        TOPLINE,
        Predictions,
        digest,
        key_of,
        seconds_to_first_token,
        summarize,
        summarize_labels,
        write_references,
    )
    from nemo_mtbi.evaluation.benchmark_report import write_report
    from nemo_mtbi.evaluation.labelled import label_of, labelled_cuts
    from nemo_mtbi.evaluation.score import normalize
    from nemo_mtbi.evaluation.systems import Questions, SALMSystem, SpeechSystem, TextLLM, TextSystem
    from nemo_mtbi.tasks.library import load_library, select_tasks
    from nemo_mtbi.training.cpu import tune

    tune(cfg.threads)
    if reserved := {TOPLINE, CASCADE, NORMALIZED_CASCADE} & set(cfg.systems):
        raise ConfigError(f"systems: {sorted(reserved)[0]} is a name of the benchmark's own; choose another.")
    if cfg.baseline not in {TOPLINE, *cfg.systems, *([CASCADE] if cfg.cascade else [])}:
        raise ConfigError(f"baseline={cfg.baseline} is none of the systems ({', '.join(cfg.systems)}).")
    for path in cfg.cuts.values():
        check_manifest(path)
    folders = list(cfg.task_folders) if cfg.task_folders else None
    library = load_library(folders)
    trained, unseen = (
        [t.name for t in select_tasks(library, list(names) if names is not None else None, group)]
        for names, group in ((cfg.trained_tasks, "train"), (cfg.unseen_tasks, "held_out"))
    )
    if both := set(trained) & set(unseen):
        raise ConfigError(f"{sorted(both)[0]} stands in trained_tasks and in unseen_tasks.")
    output, device = Path(cfg.output_dir), "cuda" if torch.cuda.is_available() else "cpu"

    def load(spec: str) -> tuple[Any, Path]:
        model, weights = open_system(spec, cfg.llm_dtype)
        return model.to(device), weights

    # Ours first: one of them gives the text LLM. NeMo's other speech LLMs have their own.
    specs = dict(sorted(cfg.systems.items(), key=lambda item: item[1].startswith(SALM_PREFIX)))
    if next(iter(specs.values())).startswith(SALM_PREFIX):
        raise ConfigError("systems: at least one must be trained with nemo_mtbi; its LLM is the text LLM.")
    model, weights = load(next(iter(specs.values())))
    settings = {
        "llm": cfg.llm or model.config.pretrained_llm, "prompt_format": model.cfg.prompt_format, "dtype": cfg.llm_dtype,
        "speech_position": model.config.speech_position, "prompts_per_task": cfg.prompts_per_task,
        "max_new_tokens": cfg.max_new_tokens, "task_folders": folders,
    }  # fmt: skip
    references = write_references(output / "references", dict(cfg.cuts), trained, unseen, settings)
    records: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in cfg.cuts}
    labelled = {
        name: labelled_cuts(name, dict(options), model.tokenizer.tokenizer, model.stop_ids()[-1], output / "audio")
        for name, options in (cfg.labelled or {}).items()
    }
    label_records: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in labelled}
    limit = cfg.max_new_tokens

    def budget(conversation: Any) -> int:
        own = label_of(conversation).get("max_new_tokens") or library[conversation.target.task].max_new_tokens
        return min(own, limit or own)

    def choices(conversation: Any) -> list[str]:
        label = label_of(conversation)
        return label["choices"] if label else library[conversation.target.task].choices

    text_llm = TextLLM()

    def predict(name: str, model: Any, make: Any, *key: Any) -> None:
        """``make(questions)`` gives the system for a manifest."""
        own = key_of(llm, cfg.llm_dtype, limit, *key, *([] if cfg.generate else ["forced"]))
        predictions = Predictions(
            output / "predictions" / name, own, choices, budget, cfg.batch_size, text_llm, cfg.generate
        )
        for manifest, columns in references.items():
            for column in COLUMNS:
                questions = Questions(model, CutSet.from_file(columns[column]), cfg.cached_features)
                found = predictions.predict(f"{manifest}.{column}", model, make(questions), questions)
                records[manifest].setdefault(name, {})[column] = found
        for corpus, (cuts, transcribed) in labelled.items():
            if name != TOPLINE or transcribed:
                questions = Questions(model, cuts, cached_features=False)
                found = predictions.predict(corpus, model, make(questions), questions, imitation=False)
                label_records[corpus][name] = found

    llm = model.references["llm"]
    predict(TOPLINE, model, lambda questions: TextSystem(model, None))
    recognizer = WhisperASR(model.config.pretrained_asr) if cfg.cascade else None
    if recognizer is not None:
        cache = output / "cascade_transcripts.jsonl"
        asr = recognizer.transcribe
        predict(CASCADE, model, lambda questions: TextSystem(model, asr(questions.cuts, cache)), recognizer.key)
        if cfg.normalized_cascade:

            def normalized(questions: Any) -> Any:
                return TextSystem(model, {i: normalize(t) for i, t in asr(questions.cuts, cache).items()})

            predict(NORMALIZED_CASCADE, model, normalized, recognizer.key, "normalized")
    latency = {}
    if cfg.latency_utterances:
        first = CutSet.from_file(next(iter(cfg.cuts.values())))
        latency = seconds_to_first_token(model, first, "What is this about?", int(cfg.latency_utterances), recognizer)
    for index, (name, spec) in enumerate(specs.items()):
        if spec.startswith(SALM_PREFIX):
            source = spec.removeprefix(SALM_PREFIX)
            other = SALMSystem(source, device)
            predict(
                name, model, lambda questions, s=other: s, digest(Path(source)) if Path(source).is_dir() else source
            )
            continue
        if index:
            model, weights = load(spec)
        if model.references["llm"] != llm:
            raise ConfigError(
                f"systems.{name} has another LLM than the first system; their answers cannot be compared."
            )
        predict(name, model, lambda questions, m=model: SpeechSystem(m), digest(weights), model.encoder_key)
    resamples = int(cfg.resamples)
    results = {manifest: summarize(systems, library, cfg.baseline, resamples) for manifest, systems in records.items()}
    for corpus, systems in label_records.items():
        results[corpus] = {"labels": summarize_labels(systems, cfg.baseline, resamples)}
    command = shlex.join(["python", "-m", "nemo_mtbi.examples.benchmark", *sys.argv[1:]])
    about = {"trained_tasks": trained, "unseen_tasks": unseen, "systems": specs, "baseline": cfg.baseline,
             "resamples": cfg.resamples, "seconds_to_first_token": latency}  # fmt: skip
    paths = write_report(output, results, about, command)
    print("\n" + paths["md"].read_text())
    announce("Results", dict(paths))


def open_system(spec: str, llm_dtype: str) -> tuple[Any, Path]:
    """A model with its LLM in ``llm_dtype``, and the file or folder that its trained weights come from.

    ``spec``: a training run, ``RUN@STAGE``, a ``.nemo`` file or an exported directory.
    """
    import torch

    from nemo_mtbi.models import MTBISALM
    from nemo_mtbi.training.run_directory import RunDirectory

    if (Path(spec.partition("@")[0]) / "model.json").is_file():
        run, name = RunDirectory.parse(spec)
        return run.load_model(name, llm_dtype), run.weights(name)
    model = MTBISALM.restore_from(spec)
    dtype = getattr(torch, llm_dtype)
    model.llm.to(dtype)
    model.embed_tokens.to(dtype)
    model.bind_connector()
    return model, Path(spec)


if __name__ == "__main__":
    main()
