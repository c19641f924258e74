"""Ask an exported speech LLM about recordings. See conf/generate.yaml."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_mtbi import console
from nemo_mtbi.data.time_marks import require_time_marks
from nemo_mtbi.errors import CheckpointError, ConfigError, DataError
from nemo_mtbi.examples._generate_arguments import to_overrides
from nemo_mtbi.examples._launcher import launcher

LONG_SECONDS = 60  # of audio, from which on a progress bar is shown


@launcher("generate", arguments=to_overrides)
def main(cfg: DictConfig) -> None:
    paths, questions = (list(v) if OmegaConf.is_list(v) else [v] for v in (cfg.audio, cfg.prompt))
    check(cfg, paths, questions)
    from nemo_mtbi.data.audio_inputs import audio_inputs
    from nemo_mtbi.data.audio_stream import gaps_of, seconds_of
    from nemo_mtbi.io import jsonl
    from nemo_mtbi.models.exported import open_speech_llm
    from nemo_mtbi.parallel.launch import chosen_device, is_first_rank

    inputs = list(audio_inputs(paths))
    questions = [str(question) for question in questions]
    alone = len(inputs) == len(questions) == 1
    size = cfg.tensor_model_parallel_size
    device = chosen_device(str(cfg.device), size, "generate")
    model = open_speech_llm(cfg.model, size, cfg.trust_remote_code).to(device)
    model.listen_as(cfg.max_positions, cfg.positions_per_second, cfg.time_marks)
    records: list[dict[str, Any]] = []
    failed = 0
    with written(cfg.output, records):
        for begin in range(0, len(inputs), cfg.batch_size):
            loaded = []
            for source in inputs[begin : begin + cfg.batch_size]:
                try:
                    loaded.append((source, source.open(model.sampling_rate)))
                except DataError as error:
                    if len(inputs) == 1:
                        raise
                    failed += 1
                    console.tell(f"{source} is left out: {error}")
            if not loaded:
                continue
            audios = [audio for _, audio in loaded]
            seconds = sum(seconds_of(audio, model.sampling_rate) for audio in audios)
            with console.progress(
                total=round(seconds), desc="listening", unit="s", disable=seconds < LONG_SECONDS
            ) as bar:
                try:
                    heard = model.listen(audios, on_heard=partial(advance, bar))
                except DataError:
                    if len(inputs) == 1:
                        raise
                    readable = [pair for pair in loaded if can_be_heard(model, *pair)]
                    failed += len(loaded) - len(readable)
                    if not readable:
                        continue
                    loaded, audios = readable, [audio for _, audio in readable]
                    heard = model.listen(audios)
            gaps = {source: gaps_of(audio) for source, audio in loaded if gaps_of(audio)}
            for source, missing in gaps.items():
                console.tell(f"{source} cannot be read from {', from '.join(map(str, missing))}; the rest is answered.")
            options = {"max_new_tokens": cfg.max_new_tokens, "do_sample": cfg.do_sample}
            for question in questions:
                fitting = []
                for one, row in answers(model, question, loaded, heard, options):
                    source = one[0]
                    if isinstance(row, DataError):
                        if len(inputs) == 1:
                            raise row
                        failed += 1
                        console.tell(f"{source} is left out: {row}")
                        continue
                    fitting.append(one)
                    answer = model.tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip()
                    record = {**source.to_dict(), "prompt": question, "answer": answer}
                    if source in gaps:
                        record["gaps"] = [asdict(gap) for gap in gaps[source]]
                    records.append(record)
                    if cfg.json:
                        console.say(jsonl.dumps(record))
                    elif alone:
                        console.say(answer)
                    else:  # a line for each answer: what it is about, where that differs, then the answer
                        differing = [str(source)] * (len(inputs) > 1) + [one_line(question)] * (len(questions) > 1)
                        console.say("\t".join([*differing, one_line(answer)]))
                if not fitting:
                    break
                if len(fitting) < len(loaded):
                    loaded, heard = fitting, model.listen([audio for _, audio in fitting])
    if not records:
        raise DataError(f"None of the {len(inputs)} recordings can be read; the lines above say why.")
    if cfg.output and is_first_rank():
        console.tell(f"{len(records)} answers, {failed} left out: {cfg.output}")


def check(cfg: DictConfig, paths: list[Any], questions: list[Any]) -> None:
    """Refuse, before anything is imported, what cannot work.

    Raises:
        ConfigError: a setting.
        CheckpointError: there is no such model.
        DataError: there is none of the recordings.
    """
    optional = [] if cfg.max_positions is None else ["max_positions"]
    for key in ("max_new_tokens", "batch_size", "tensor_model_parallel_size", *optional):
        if type(cfg[key]) is not int or cfg[key] < 1:
            raise ConfigError(f"{key}={cfg[key]}: give a whole number of at least 1.")
    rate = cfg.positions_per_second
    if rate is not None and not (type(rate) in (int, float) and rate > 0):
        raise ConfigError(f"positions_per_second={rate}: give a number above 0.")
    require_time_marks(cfg.time_marks)
    if not questions:
        raise ConfigError("prompt is empty; give a question, or prompt='' for the speech alone.")
    if not os.path.exists(str(cfg.model)):  # not Path.exists, which raises for a name that is too long
        raise CheckpointError(f"There is no model {cfg.model}: a .nemo file, an exported directory or a training run.")
    if not any(os.path.exists(str(path)) for path in paths):
        raise DataError(f"There is no audio file {', '.join(map(str, paths[:3]))}.")


@contextmanager
def written(output: str | None, records: list[dict[str, Any]]) -> Iterator[None]:
    """Write to ``output`` at the end the answers that there are, however it comes."""
    from nemo_mtbi.io import jsonl
    from nemo_mtbi.parallel.launch import is_first_rank

    try:
        yield
    finally:
        if output and records and is_first_rank():
            jsonl.write_text(Path(output), "".join(jsonl.dumps(r) + "\n" for r in records))


def answers(
    model: Any, question: str, loaded: list[tuple[Any, Any]], heard: Any, options: dict[str, Any]
) -> Iterator[tuple[tuple[Any, Any], Any]]:
    """Each recording with the tokens of its answer, or with the DataError that says why there is none (it does not fit
    into the LLM's context, say); those that are asked with it are then asked one by one.
    """
    try:
        rows = model.generate([[model.user_turn(question)] for _ in loaded], heard, **options)
    except DataError as error:
        if len(loaded) == 1:
            yield loaded[0], error
            return
        for one in loaded:
            yield from answers(model, question, [one], model.listen([one[1]]), options)
        return
    yield from zip(loaded, rows, strict=True)


def can_be_heard(model: Any, source: Any, audio: Any) -> bool:
    """Whether a recording can be read; if not, it is told."""
    try:
        model.listen([audio])
    except DataError as error:
        console.tell(f"{source} is left out: {error}")
        return False
    return True


def advance(bar: Any, done: float) -> None:
    """A progress bar to ``done`` seconds."""
    bar.update(round(done) - bar.n)


def one_line(text: str) -> str:
    """Text in a table of lines."""
    return " ".join(text.split())


if __name__ == "__main__":
    main()
