"""The generalization benchmark: seen prompts, unseen prompts, unseen tasks; scores against the text LLM.

::

    <output_dir>/references/<trained|unseen>/   the text topline's answers, as targets (nemo_mtbi/targets)
    <output_dir>/predictions/<system>/<set>.<column>.jsonl
    <output_dir>/benchmark.json, .md, .html, .png
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.checkpoints.run_directory import RunDirectory, split_stage
from nemo_mtbi.checkpoints.seen_record import seen_prompts
from nemo_mtbi.data.chat_template import dialect
from nemo_mtbi.data.conversation import MTBIConversation, require_cuts
from nemo_mtbi.data.feature_cache import FEATURES_FIELD
from nemo_mtbi.data.target import Target
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.evaluation.asr import WhisperASR
from nemo_mtbi.evaluation.benchmark_report import write_report
from nemo_mtbi.evaluation.columns import (
    CASCADE,
    COLUMNS,
    NORMALIZED_CASCADE,
    SEEN_PROMPTS,
    TOPLINE,
    UNSEEN_PROMPTS,
    UNSEEN_TASKS,
)
from nemo_mtbi.evaluation.labelled import label_of, labelled_cuts
from nemo_mtbi.evaluation.latency import seconds_to_first_token
from nemo_mtbi.evaluation.predictions import Predictions, digest, key_of
from nemo_mtbi.evaluation.silence import nothing_heard, require_spoken, spoken_cuts
from nemo_mtbi.evaluation.summary import summarize, summarize_labels
from nemo_mtbi.evaluation.systems import (
    EvaluationSet,
    SALMSystem,
    SpeechSystem,
    System,
    TextLLM,
    TextSystem,
    require_text_llm,
)
from nemo_mtbi.models.mtbi_salm import MTBISALM
from nemo_mtbi.targets import workers
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.tasks.library import comparable, load_library, select_tasks

SALM_PREFIX = "salm:"
Records = dict[str, dict[str, Any]]


class Benchmark:
    """One call of ``conf/benchmark.yaml``.

    Raises:
        ConfigError: systems, tasks or names that cannot be compared.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.output = cfg, Path(cfg.output_dir)
        check_names(cfg)
        folders = list(cfg.task_folders) if cfg.task_folders else None
        self.library = load_library(folders)
        trained, self.seen = cfg.trained_tasks, seen_by(cfg.systems.values())
        if trained is None and self.seen:
            trained = comparable(self.library, self.seen)
            if not trained:
                raise ConfigError(
                    f"The systems were trained on {', '.join(sorted(self.seen))} alone, which the benchmark does not "
                    "ask: name trained_tasks."
                )
        groups = ((trained, "train"), (cfg.unseen_tasks, "held_out"))
        self.trained, self.unseen = (
            [t.name for t in select_tasks(self.library, list(names) if names is not None else None, group)]
            for names, group in groups
        )
        if cfg.unseen_tasks is None:
            self.unseen = [name for name in self.unseen if name not in {*self.trained, *self.seen}]
        if not self.unseen:
            raise ConfigError("unseen_tasks: the systems were trained on all of the group held_out; name other tasks.")
        if given := [n for n in [*self.trained, *self.unseen] if self.library[n].answer is not None]:
            raise ConfigError(
                f"Task {given[0]} gives the answer itself, so that there is none of the text LLM to compare with. "
                "Leave it out of trained_tasks and unseen_tasks."
            )
        if both := set(self.trained) & set(self.unseen):
            raise ConfigError(f"{sorted(both)[0]} stands in trained_tasks and in unseen_tasks.")
        if both := self.seen.keys() & set(self.unseen):
            raise ConfigError(f"unseen_tasks: a system was trained on {sorted(both)[0]} (seen.json).")
        # Ours first: one of them gives the text LLM. NeMo's other speech LLMs have their own.
        self.specs = dict(sorted(cfg.systems.items(), key=lambda item: item[1].startswith(SALM_PREFIX)))
        if next(iter(self.specs.values())).startswith(SALM_PREFIX):
            raise ConfigError("systems: at least one must be trained with nemo_mtbi; its LLM is the text LLM.")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.text_llm = TextLLM()
        self.model, self.weights = self._open(next(iter(self.specs.values())))
        self.llm = self.model.references["llm"]
        model, tokenizer, end = self.model, self.model.tokenizer.tokenizer, self.model.end_of_turn()
        rendering = Target.rendering_of(
            dialect(model.cfg.prompt_format, tokenizer), model.config.speech_position, self.llm
        )
        self.labelled = {  # before the text LLM answers for long
            name: labelled_cuts(name, dict(options), tokenizer, end, self.output / "audio", rendering)
            for name, options in (cfg.labelled or {}).items()
        }
        self.references = write_references(
            self.output / "references", dict(cfg.cuts), self.trained, self.unseen, self._target_settings(folders)
        )
        self.records: dict[str, dict[str, Records]] = {name: {} for name in cfg.cuts}
        self.label_records: dict[str, Records] = {name: {} for name in self.labelled}
        self.silence: dict[str, dict[str, float | None]] = {}

    def run(self, command: str) -> dict[str, Path]:
        """Ask every system, score, and write the report.

        Args:
            command: for the record.
        """
        self._ask(TOPLINE, lambda questions: TextSystem(self.model, None))
        latency = self._ask_cascades()
        for index, (name, spec) in enumerate(self.specs.items()):
            self._ask_system(name, spec, first=index == 0)
        resamples, baseline = int(self.cfg.resamples), self.cfg.baseline
        results = {
            manifest: summarize(systems, self.library, baseline, resamples, list(self.cfg.compare_with))
            for manifest, systems in self.records.items()
        }
        for corpus, systems in self.label_records.items():
            compared = list(self.cfg.compare_with)
            results[corpus] = {"labels": summarize_labels(systems, baseline, resamples, compared)}
        about = {
            "trained_tasks": self.trained,
            "unseen_tasks": self.unseen,
            "seen_wordings": self._seen_wordings(),
            "systems": self.specs,
            "baseline": baseline,
            "resamples": self.cfg.resamples,
            "seconds_to_first_token": latency,
            "nothing_heard": self.silence,
        }
        return write_report(self.output, results, about, command)

    def _seen_wordings(self) -> list[str]:
        """Prompts of the column of unseen ones that a system was trained on all the same."""
        held_out = [(name, p.id) for name in self.trained for p in self.library[name].select("held_out")]
        return [prompt for name, prompt in held_out if prompt in self.seen.get(name, ())]

    def _target_settings(self, folders: list[str] | None) -> dict[str, Any]:
        cfg, model = self.cfg, self.model
        return {
            "llm": cfg.llm or model.config.pretrained_llm,
            "prompt_format": model.cfg.prompt_format,
            "dtype": cfg.llm_dtype,
            "speech_position": model.config.speech_position,
            "languages": list(cfg.languages),
            "prompts_per_task": cfg.prompts_per_task,
            "max_new_tokens": cfg.max_new_tokens,
            "task_folders": folders,
        }

    def _open(self, spec: str) -> tuple[MTBISALM, Path]:
        model, weights = open_system(spec, self.cfg.llm_dtype)
        return model.to(self.device), weights

    def _budget(self, conversation: MTBIConversation) -> int:
        assert conversation.target is not None
        own = label_of(conversation).get("max_new_tokens") or self.library[conversation.target.task].max_new_tokens
        return min(own, self.cfg.max_new_tokens or own)

    def _choices(self, conversation: MTBIConversation) -> list[str]:
        assert conversation.target is not None
        label = label_of(conversation)
        return label["choices"] if label else self.library[conversation.target.task].choices

    def _ask(self, name: str, system_for: Callable[[EvaluationSet], System], *key: Any) -> None:
        """Predictions of one system for every set.

        Args:
            name: of the system.
            system_for: gives the system for a set.
            key: what decides its answers, besides the LLM.
        """
        cfg = self.cfg
        own = key_of(self.llm, cfg.llm_dtype, cfg.max_new_tokens, *key, *([] if cfg.generate else ["forced"]))
        folder = self.output / "predictions" / name
        predictions = Predictions(folder, own, self._choices, self._budget, cfg.batch_size, self.text_llm, cfg.generate)
        for manifest, columns in self.references.items():
            for column in COLUMNS:
                questions = EvaluationSet(self.model, spoken_cuts(columns[column]), cfg.cached_features)
                found = predictions.predict(f"{manifest}.{column}", self.model, system_for(questions), questions)
                self.records[manifest].setdefault(name, {})[column] = found
        for corpus, (cuts, transcribed) in self.labelled.items():
            if name != TOPLINE or transcribed:
                cached = self.cfg.cached_features and all(cut.has_custom(FEATURES_FIELD) for cut in cuts)
                questions = EvaluationSet(self.model, cuts, cached)
                found = predictions.predict(corpus, self.model, system_for(questions), questions, imitation=False)
                self.label_records[corpus][name] = found

    def _ask_cascades(self) -> dict[str, float]:
        """The cascades' predictions; seconds to the first token, if they are asked for."""
        cfg, model = self.cfg, self.model
        recognizer = WhisperASR.beside(model.config) if cfg.cascade else None
        if recognizer is not None:
            cache, asr = self.output / "cascade_transcripts.jsonl", recognizer.transcribe

            def cascade(questions: EvaluationSet) -> TextSystem:
                return TextSystem(model, asr(questions.cuts, cache))

            self._ask(CASCADE, cascade, recognizer.key)
            if cfg.normalized_cascade:
                self._ask(NORMALIZED_CASCADE, lambda q: cascade(q).normalized(), recognizer.key, "normalized")
        if not cfg.latency_utterances:
            return {}
        first = spoken_cuts(next(iter(cfg.cuts.values())))
        return seconds_to_first_token(model, first, "What is this about?", int(cfg.latency_utterances), recognizer)

    def _ask_system(self, name: str, spec: str, first: bool) -> None:
        if spec.startswith(SALM_PREFIX):
            source = spec.removeprefix(SALM_PREFIX)
            other = SALMSystem(source, self.device)
            self._ask(name, lambda questions: other, digest(Path(source)) if Path(source).is_dir() else source)
            return
        if not first:
            self.model, self.weights = self._open(spec)
        model = self.model
        if model.references["llm"] != self.llm:
            raise ConfigError(
                f"systems.{name} has another LLM than the first system; their answers cannot be compared."
            )
        listens = (
            json.dumps(OmegaConf.to_container(model.cfg.perception), sort_keys=True),
            model.config.nothing_heard_answer,
        )
        self._ask(name, lambda questions: SpeechSystem(model), digest(self.weights), model.encoder_key, *listens)
        if self.cfg.no_speech:
            spoken = {name: spoken_cuts(path) for name, path in self.cfg.cuts.items()}
            sets = {"no speech": CutSet.from_file(self.cfg.no_speech), **spoken}
            self.silence[name] = {
                title: nothing_heard(
                    SpeechSystem(model), cuts, self.cfg.cached_features, self.cfg.batch_size, f"{name}: {title}"
                )
                for title, cuts in sets.items()
            }


def check_names(cfg: DictConfig) -> None:
    """What can be checked before anything is trained or loaded.

    Raises:
        ConfigError: names that stand for nothing or twice, numbers that are too small, no speech.
        DataError: manifests that are missing.
    """
    if reserved := {TOPLINE, CASCADE, NORMALIZED_CASCADE} & set(cfg.systems):
        raise ConfigError(f"systems: {sorted(reserved)[0]} is a name of the benchmark's own; choose another.")
    cascades = [CASCADE, *([NORMALIZED_CASCADE] if cfg.normalized_cascade else [])] if cfg.cascade else []
    if cfg.baseline not in {TOPLINE, *cfg.systems, *cascades}:
        raise ConfigError(f"baseline={cfg.baseline} is none of the systems ({', '.join(cfg.systems)}).")
    if unknown := set(cfg.compare_with) - {TOPLINE, *cascades, *cfg.systems}:
        there = ", ".join([TOPLINE, *cascades, *cfg.systems])
        raise ConfigError(f"compare_with: {sorted(unknown)[0]} is none of the systems ({there}).")
    if shared := set(cfg.cuts) & set(cfg.labelled or {}):
        raise ConfigError(f"cuts and labelled: {sorted(shared)[0]} is a name of both; each set needs its own.")
    for key, least in (("resamples", 100), ("batch_size", 1), ("latency_utterances", 0)):
        if (cfg[key] or 0) < least:
            raise ConfigError(f"{key}={cfg[key]}: at least {least}.")
    for path in [*cfg.cuts.values(), *filter(None, [cfg.no_speech])]:
        require_cuts(path)
    for name, path in cfg.cuts.items():
        require_spoken(name, path)


def seen_by(specs: Iterable[str]) -> dict[str, set[str]]:
    """Ids of prompts by task that systems were trained on, whatever the stage, as far as their files say so."""
    seen: dict[str, set[str]] = {}
    for spec in specs:
        own = {} if spec.startswith(SALM_PREFIX) else seen_prompts(Path(split_stage(spec)[0]))
        for task, prompts in own.items():
            seen.setdefault(task, set()).update(prompts)
    return seen


def write_references(
    folder: Path, cuts: dict[str, str], trained: list[str], unseen: list[str], settings: dict[str, Any]
) -> dict[str, dict[str, Path]]:
    """The text LLM's answers: ``[set][column]`` -> manifest with targets. Finished ones are reused.

    Args:
        folder: for the two target folders.
        cuts: manifests by set name.
        trained: tasks of the first two columns.
        unseen: tasks of the third.
        settings: further fields of :class:`TargetsConfig` (llm, prompt_format, dtype, ...).
    """
    plans = {
        "trained": (trained, {SEEN_PROMPTS: "seen", UNSEEN_PROMPTS: "held_out"}),
        "unseen": (unseen, {UNSEEN_TASKS: "all"}),
    }
    manifests: dict[str, dict[str, Path]] = {name: {} for name in cuts}
    for group, (tasks, columns) in plans.items():
        named = {f"{name}.{column}": path for name, path in cuts.items() for column in columns}
        splits = {key: columns[key.rpartition(".")[2]] for key in named}
        config = TargetsConfig(
            cuts=named, output_dir=str(folder / group), task_names=tasks, splits=splits, filters=["empty"], **settings
        )
        for key, path in workers.run(config).items():
            name, _, column = key.rpartition(".")
            manifests[name][column] = path
    return manifests


def open_system(spec: str, llm_dtype: str) -> tuple[Any, Path]:
    """A model with its LLM in ``llm_dtype``, and the file or folder that its trained weights come from.

    ``spec``: a training run, ``RUN@STAGE``, a ``.nemo`` file or an exported directory.

    Raises:
        ConfigError: see :func:`nemo_mtbi.evaluation.systems.require_text_llm`.
    """
    if (Path(split_stage(spec)[0]) / "model.json").is_file():
        run, name = RunDirectory.parse(spec)
        model = MTBISALM.from_run(run, name, llm_dtype)
        require_text_llm(model)
        return model, run.weights(name)
    model = MTBISALM.restore_from(spec)
    require_text_llm(model)
    dtype = getattr(torch, llm_dtype)
    model.llm.to(dtype)
    model.embed_tokens.to(dtype)
    model.bind_connector()
    return model, Path(spec)
