"""Run the frozen encoder once and keep its features with the cuts. See conf/cache_features.yaml."""

from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi.config import ModelConfig
from nemo_mtbi.corpus.execution import LOCAL
from nemo_mtbi.corpus.ray_data import RayConfig
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.examples._launcher import announce, launcher
from nemo_mtbi.io.typed import typed


@launcher("cache_features", {"speech_llm/schema": ModelConfig})
def main(cfg: DictConfig) -> None:
    from nemo_mtbi import registration  # noqa: F401  registers our classes as NeMo targets
    from nemo_mtbi.data.conversation import check_manifest
    from nemo_mtbi.data.perturbation import speed_factors
    from nemo_mtbi.preparation.cache_features import cache_features
    from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder

    perturbed = cfg.manifests if cfg.perturbed_manifests is None else cfg.perturbed_manifests
    if unknown := set(perturbed) - set(cfg.manifests):
        raise ConfigError(f"perturbed_manifests: {', '.join(sorted(unknown))} is not among manifests.")
    for manifest in cfg.manifests:
        check_manifest(manifest)
    speeds = speed_factors(cfg.perturb_speed)
    encoder = FrozenEncoder(cfg.model) if (cfg.executor, cfg.workers) == (LOCAL, 1) else cfg.model
    who = (cfg.executor, cfg.workers, typed(RayConfig, cfg.ray))
    for manifest in cfg.manifests:
        own_speeds = speeds if manifest in perturbed else ()
        report = cache_features(encoder, Path(manifest), cfg.batch_seconds, own_speeds, *who)
        rate = report.bytes / 2**20 / report.hours if report.hours else 0.0
        announce(
            f"{manifest}: {report.encoded} encoded, {report.cached} in the cache, {report.skipped} left out",
            {
                "size": f"{report.bytes / 2**20:.1f} MiB, {rate:.0f} MiB per hour of speech",
            },
        )


if __name__ == "__main__":
    main()
