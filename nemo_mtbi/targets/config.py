"""Configuration of target generation (no NeMo import, so that launchers answer at once)."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_mtbi.corpus.execution import LOCAL
from nemo_mtbi.corpus.ray_data import RayConfig
from nemo_mtbi.data.description import TEMPLATE
from nemo_mtbi.data.messages import NOTHING_HEARD_ANSWER

ENGINES = ("hf", "openai", "vllm")
DEFAULT_FILTERS = ("empty", "refusal", "truncated", "repetition", "too_long", "unasked", "misread", "one_sided")


@dataclass
class OpenAIConfig:
    """An OpenAI-compatible server that runs ``TargetsConfig.llm`` (vLLM, NIM, SGLang, llama.cpp, ``transformers
    serve``).

    Attributes:
        base_url: of the server, up to and including ``/v1``.
        model: its name on the server, if that is not ``llm``.
        concurrency: requests in flight, of each worker.
        max_retries: of a request, with the client's exponential back-off; a ``Retry-After`` of up to two minutes is
            obeyed.
        timeout_seconds: of one request.
        requests_per_minute: upper limit of each worker, if any; retries come on top.
        api_key_variable: environment variable that holds the key; the key itself is never a setting.
        context_tokens: longest prompt with answer that the server takes (``--max-model-len``), if less than the LLM's
            own.
        send_token_ids: send token ids instead of text, for servers that take them (vLLM, SGLang, llama.cpp). Prompts
            that text cannot say (a transcript that holds the letters of a control token) are sent so at any rate.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    concurrency: int = 16
    max_retries: int = 6
    timeout_seconds: float = 300.0
    requests_per_minute: float | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    context_tokens: int | None = None
    send_token_ids: bool = False


@dataclass
class VLLMConfig:
    """vLLM in the worker's own process, on the GPUs that it sees.

    Attributes:
        tensor_parallel_size: GPUs of each worker that share the LLM.
        gpu_memory_utilization: share of each GPU's memory for weights and cache.
        max_model_len: longest prompt with answer, if less than the LLM's own.
        options: further arguments of ``vllm.LLM`` by their own names (``quantization: fp8``); they count among what
            decides an answer.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DescriptionConfig:
    """What the text LLM reads beside the words (:mod:`nemo_mtbi.data.description`).

    Attributes:
        share: of the prompts that are not about the voice, how many have a described transcript; those about it always
            have one. None: voices are not described.
        template: of an utterance.
        least: attributes of an utterance at least.
    """

    share: float | None = None
    template: str = TEMPLATE
    least: int = 1


@dataclass
class TargetsConfig:
    """``conf/targets.yaml``.

    Attributes:
        cuts: manifests to answer, by output name.
        output_dir: where everything goes.
        llm: the text LLM; with ``engine=openai``, where its tokenizer is read from.
        engine: ``hf`` (Transformers in this process), ``vllm`` (vLLM in this process, see :class:`VLLMConfig`) or
            ``openai`` (a server, see :class:`OpenAIConfig`).
        dtype, batch_size: how ``hf`` runs it; ``vllm`` takes the dtype, and batches by itself.
        executor, workers, ray: ``local``: so many processes on this machine (with CUDA: one a GPU); the same command on
            other machines adds theirs. ``ray``: workers of a Ray cluster.
        shard_cuts: cuts of one unit of work, at most: small manifests have smaller ones.
        prompt_format, speech_position: as in training.
        task_names: tasks (None: all of the train group); task_folders adds the user's own.
        prompt_split: ``seen``, ``held_out`` or ``all``; ``splits`` overrides it by output name.
        languages: of the prompts.
        prompts_per_task: wordings drawn for each cut and task (0: all of the split).
        max_new_tokens: upper limit on the tasks' own budgets; longer answers are truncated, and filtered by that name.
        tasks_per_cut: how many tasks are drawn for each cut, by output name (default: all); 0.5: one for half of the
            cuts.
        top_k: teacher log-probabilities kept for each response token (0: none), at ``temperature``.
        filters: names of :mod:`nemo_mtbi.targets.filters`.
        nothing_heard_answer: to recordings in which nothing is said (source ``no_speech``), whatever the prompt; their
            task is ``no_speech``.
        max_total_tokens: of prompt and response together, for the filter ``too_long``: the training budget.
        max_duplicates: equal answers to one wording that the filter ``near_duplicate`` lets through.
        shar_dir: where to write Lhotse Shar too, with audio (``shar_audio``: its format) and ``shar_size`` cuts a
            shard.
        description: see :class:`DescriptionConfig`; prepare with ``describe.enabled=true`` first.
        seed: of the draws.
    """

    cuts: dict[str, str] = field(default_factory=dict)
    output_dir: str = MISSING
    llm: str = MISSING
    engine: str = "hf"
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    dtype: str = "bfloat16"
    batch_size: int = 128
    executor: str = LOCAL
    workers: int = 1
    ray: RayConfig = field(default_factory=RayConfig)
    shard_cuts: int = 1000
    prompt_format: str = "chat_template"
    speech_position: str = "after"
    task_names: list[str] | None = None
    task_folders: list[str] | None = None
    prompt_split: str = "seen"
    splits: dict[str, str] = field(default_factory=dict)
    languages: list[str] = field(default_factory=lambda: ["en"])
    prompts_per_task: int = 1
    max_new_tokens: int | None = None
    tasks_per_cut: dict[str, float] = field(default_factory=dict)
    top_k: int = 0
    temperature: float = 1.0
    filters: list[str] = field(default_factory=lambda: list(DEFAULT_FILTERS))
    nothing_heard_answer: str = NOTHING_HEARD_ANSWER  # that of the model's configuration too
    max_total_tokens: int | None = None
    max_duplicates: int = 3
    shar_dir: str | None = None
    shar_audio: str = "flac"
    shar_size: int = 1000
    description: DescriptionConfig = field(default_factory=DescriptionConfig)
    seed: int = 0

    @property
    def name_on_server(self) -> str:
        """Of the LLM (``engine: openai``)."""
        return self.openai.model or self.llm


def decoded_by(config: TargetsConfig) -> Any:
    """What decides a greedy answer beside the LLM and the prompt."""
    if config.engine == "openai":
        return ["openai", config.name_on_server, "no penalty"]  # earlier answers may have had the server's
    return config.dtype if config.engine == "hf" else [config.engine, config.dtype, dict(config.vllm.options)]
