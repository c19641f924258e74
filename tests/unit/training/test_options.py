"""Options of NeMo's recipes that cannot work here are refused by name; those of missing packages are one message."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from nemo_mtbi.config import ModelConfig
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.examples._launcher import CONF, open_dictionaries
from nemo_mtbi.training.options import check_options, named, of_whole_steps

pytestmark = pytest.mark.unit


def options(key, value):
    cfg = OmegaConf.create({"trainer": {}, "exp_manager": {}, "data": {"train_ds": {}}})
    OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.limit_train_batches", 100),
        ("trainer.limit_train_batches", 1),  # one batch
        ("trainer.limit_train_batches", 0.5),
        ("trainer.max_epochs", 3),
        ("trainer.min_epochs", 1),
        ("data.train_ds.force_finite", True),
        ("exp_manager.checkpoint_callback_params.async_save", True),
        ("exp_manager.create_preemption_callback", True),
        ("trainer.max_time", "00:01:00:00"),
        ("trainer.fast_dev_run", True),
        ("trainer.overfit_batches", 2),
        ("trainer.max_steps", -1),
        ("trainer.max_steps", 0),
        ("trainer.max_steps", 2.5),
        ("trainer.gradient_clip_val", -1),
        ("trainer.accumulate_grad_batches", 0),
        ("trainer.val_check_interval", 0.5),
        ("trainer.val_check_interval", 0),
        ("optimizer.lr", -1e-4),
        ("data.train_ds.batch_size", 0),
        ("data.validation_ds.batch_size", -2),
        ("data.train_ds.batch_tokens", -1),
    ],
)
def test_refusals(key, value):
    with pytest.raises(ConfigError, match=f"{key}={value}: "):
        check_options(options(key, value))


@pytest.mark.parametrize(
    ("monitor", "mode", "fits"),
    [
        ("val_loss", "max", False),
        ("val_kl_held_out", "max", False),
        ("val_agreement", "min", False),
        ("val_agreement_by_task/repeat", "max", True),
        ("val_loss", "min", True),
        ("my_own", "max", True),
    ],
)
def test_the_worst_weights_are_not_monitored(monitor, mode, fits):
    cfg = options("exp_manager.checkpoint_callback_params", {"monitor": monitor, "mode": mode})
    if fits:
        check_options(cfg)
    else:
        with pytest.raises(ConfigError, match="would keep the worst weights"):
            check_options(cfg)


def test_a_learning_rate_that_is_never_reached_is_said(capsys):
    for steps, said in ((20, True), (51, False)):
        check_options(OmegaConf.merge(options("trainer.max_steps", steps), options("lr_scheduler.warmup_steps", 50)))
        assert ("never reached" in "".join(capsys.readouterr())) == said


def test_all_are_named_at_once():
    cfg = OmegaConf.merge(options("trainer.max_epochs", 2), options("exp_manager.create_preemption_callback", True))
    with pytest.raises(ConfigError, match="(?s)max_epochs=2.*create_preemption_callback=True"):
        check_options(cfg)


def test_averages_of_lora_that_is_spread_are_refused():
    cfg = OmegaConf.merge(options("exp_manager.ema.enable", True), options("trainer.tensor_model_parallel_size", 2))
    check_options(cfg)
    with pytest.raises(ConfigError, match="cannot be averaged"):
        check_options(cfg, lora=True)


@pytest.mark.parametrize("value", [None, 1.0])
def test_all_of_the_data_is_no_limit(value):
    check_options(options("trainer.limit_train_batches", value))


def test_our_own_yaml_passes():
    node = open_dictionaries(OmegaConf.structured(ModelConfig))
    ConfigStore.instance().store(group="speech_llm", name="schema", node=node)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check_options(compose("train"))


@pytest.mark.parametrize("error", [ValueError("no\n  such"), ImportError("no such"), TypeError("no such")])
def test_errors_of_others_are_one_message(error):
    with pytest.raises(ConfigError, match="trainer / exp_manager: no such"), named():
        raise error
    with pytest.raises(DataError, match="^ours"), named():
        raise DataError("ours")


@pytest.mark.parametrize(
    ("given", "together", "taken"),
    [(3, 2, 4), (200, 16, 208), (200, 8, 200), (0.5, 4, 0.5), (None, 4, None), (7, 1, 7)],
)
def test_validation_stands_between_steps(given, together, taken):
    assert of_whole_steps(given, together) == taken


def test_scales_of_single_ranks_are_refused():
    cfg = options("trainer", {"tensor_model_parallel_size": 2, "precision": "16-mixed"})
    check_options(cfg)
    with pytest.raises(ConfigError, match="Use bf16-mixed"):
        check_options(cfg, lora=True)


def test_gradients_that_would_round_to_nothing_are_refused():
    cfg = options("trainer.precision", "16-mixed")
    check_options(cfg)
    with pytest.raises(ConfigError, match="mean_over=answers"):
        check_options(cfg, by_answer=True)
