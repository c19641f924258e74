"""Configuration of target generation (no NeMo import, so that launchers answer at once)."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class TargetsConfig:
    """``conf/targets.yaml``.

    Attributes:
        cuts: manifests to answer, by output name.
        output_dir: where everything goes.
        llm, dtype, batch_size: the text LLM and how it runs.
        prompt_format, speech_position: as in training.
        task_names: tasks (None: all of the train group); task_folders adds the user's own.
        prompt_split: ``seen``, ``held_out`` or ``all``; ``splits`` overrides it by output name.
        languages: of the prompts.
        prompts_per_task: wordings drawn for each cut and task (0: all of the split).
        max_new_tokens: upper limit on the tasks' own budgets; longer answers are truncated, and filtered by that name.
        tasks_per_cut: how many tasks are drawn for each cut, by output name (default: all of them).
        top_k: teacher log-probabilities kept for each response token (0: none), at ``temperature``.
        filters: names of :mod:`nemo_mtbi.targets.filters`.
        seed: of the draws.
    """

    cuts: dict[str, str] = field(default_factory=dict)
    output_dir: str = MISSING
    llm: str = MISSING
    dtype: str = "bfloat16"
    batch_size: int = 128
    prompt_format: str = "chat_template"
    speech_position: str = "after"
    task_names: list[str] | None = None
    task_folders: list[str] | None = None
    prompt_split: str = "seen"
    splits: dict[str, str] = field(default_factory=dict)
    languages: list[str] = field(default_factory=lambda: ["en"])
    prompts_per_task: int = 1
    max_new_tokens: int | None = None
    tasks_per_cut: dict[str, int] = field(default_factory=dict)
    top_k: int = 0
    temperature: float = 1.0
    filters: list[str] = field(default_factory=lambda: ["empty", "refusal", "truncated", "repetition"])
    seed: int = 0
