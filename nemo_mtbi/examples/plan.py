"""What a training run would need on GPUs. See conf/plan.yaml."""

from typing import Any

from omegaconf import DictConfig

from nemo_mtbi import console
from nemo_mtbi.examples._launcher import launcher
from nemo_mtbi.io.typed import typed
from nemo_mtbi.parallel.plan_config import GB, PlanConfig

BATCH_SHARE = 0.9  # of the positions that fit; the rest is for what the arithmetic leaves out


@launcher("plan", {"plan_schema": PlanConfig})
def main(cfg: DictConfig) -> None:
    from transformers import AutoConfig

    from nemo_mtbi.errors import ConfigError
    from nemo_mtbi.parallel.plan import plan
    from nemo_mtbi.pretrained.offline import resolve_pretrained

    config = typed(PlanConfig, cfg)
    config.check()
    try:
        if isinstance(config.llm, str):
            name = resolve_pretrained(config.llm)
            shape = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        else:
            fields = {str(k): v for k, v in dict(config.llm).items()}
            shape = AutoConfig.for_model(fields.pop("model_type", "none given"), **fields)
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        wanted = "Give a hub name, a folder, or model_type and its fields."
        raise ConfigError(f"llm={config.llm}: {first} {wanted}") from error
    show(config, plan(config, shape))


def show(config: PlanConfig, found: Any) -> None:
    size = config.tensor_model_parallel_size
    console.say(f"LLM of {found.parameters / 1e9:.2f}e9 parameters, {config.gpus} GPUs, {size} for each copy")
    for part, size_in_bytes in found.bytes_by_part.items():
        console.say(f"  {part:28s}{size_in_bytes / GB:8.2f} GB")
    total = sum(found.bytes_by_part.values()) / GB
    console.say(f"  {'together':28s}{total:8.2f} GB of {config.gpu_memory_gb:g} on each GPU")
    console.say(f"  {'activations of the LLM':28s}{found.bytes_per_position / 1e6:8.2f} MB a position")
    console.say(f"  {'activations of the connector':28s}{found.bytes_per_example / 1e6:8.0f} MB an example")
    console.say(f"An example has {found.example_positions} positions; a GPU holds {found.longest_batch} at once.")
    if not found.fits:
        console.say("Not one example fits: raise tensor_model_parallel_size, or set activation_checkpointing=true.")
        return
    console.say(
        f"At {config.utilization:.0%} of {config.gpu_tflops:g} TFLOP/s: {found.positions_per_second:,.0f} positions/s; "
        f"{found.examples:,.0f} examples take {found.hours:,.1f} h, {found.hours * config.gpus:,.0f} GPU-hours."
    )
    console.say(
        f"Batches: data.train_ds.batch_size=null data.train_ds.batch_tokens={int(BATCH_SHARE * found.longest_batch)}, "
        f"about {BATCH_SHARE * found.longest_batch / found.example_positions:,.0f} examples each."
    )
    console.say("Weights are counted on the real layers; activations and times are arithmetic, no measurement.")


if __name__ == "__main__":
    main()
