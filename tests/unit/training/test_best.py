"""Which weights of a stage are kept, also over restarts; which checkpoint a stage goes on from."""

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from nemo.utils.exp_manager import StatelessTimer, check_resume
from omegaconf import OmegaConf

from nemo_mtbi.checkpoints.run_directory import ALIGNMENT, IMITATION, RunDirectory
from nemo_mtbi.errors import CheckpointError, ConfigError
from nemo_mtbi.examples import train as train  # registers the schema of its YAML
from nemo_mtbi.examples._launcher import CONF
from nemo_mtbi.io import jsonl
from nemo_mtbi.models.validation import ValidationSums
from nemo_mtbi.modules.connectors.subsampling import ConvSubsampler
from nemo_mtbi.training.best import BestWeights, Ended, LastValidation
from nemo_mtbi.training.resume import settle_checkpoints
from nemo_mtbi.training.stages import stage_config
from tests.helpers import build

pytestmark = pytest.mark.unit


def validated(best, values):
    """Steps after which weights were kept."""
    kept = []
    for step, value in enumerate(values, 1):
        trainer = SimpleNamespace(
            callback_metrics={"val_loss": torch.tensor(value)},
            sanity_checking=False,
            is_global_zero=True,
            global_step=step,
            strategy=SimpleNamespace(broadcast=lambda own: own),
        )
        if step == 1:
            best.setup(trainer, None, "fit")
        before = jsonl.read_json(best.run.best_record("imitation")).get("value")
        best.on_validation_end(
            trainer, SimpleNamespace(trained_state=lambda needed: {"a": torch.zeros(1)}, references={})
        )
        if jsonl.read_json(best.run.best_record("imitation")).get("value") != before:
            kept.append(step)
    return kept


def test_what_is_no_number_is_never_the_best(tmp_path):
    best = BestWeights(RunDirectory(tmp_path), "imitation", "val_loss", "min")
    assert validated(best, [math.nan, 2.0, math.nan, 3.0, 1.0, math.inf]) == [2, 5]


def test_a_metric_that_the_stage_does_not_have_is_refused(tmp_path):
    best = BestWeights(RunDirectory(tmp_path), "alignment", "val_agreement", "max")
    with pytest.raises(
        ConfigError, match="val_agreement: the stage alignment does not measure .* It measures val_loss"
    ):
        validated(best, [1.0])


def test_a_validation_of_no_example_says_nothing():
    sums, logged = ValidationSums(), {}
    sums.visit("held_out")
    sums.log(lambda name, value, **_: logged.update({name: value}), True, torch.device("cpu"), None)
    assert logged and all(math.isnan(value) for value in logged.values())


def test_the_best_survives_what_nemo_does_at_a_restart(tmp_path):
    run = RunDirectory(tmp_path)
    assert validated(BestWeights(run, "imitation", "val_loss", "min"), [2.0, 1.0]) == [1, 2]
    (run.stage("imitation") / "log.txt").write_text("moved")
    trainer = SimpleNamespace(ckpt_path=None)
    check_resume(trainer, str(run.stage("imitation")), resume_if_exists=True, resume_ignore_no_checkpoint=True)
    assert not (run.stage("imitation") / "log.txt").exists() and run.best_weights("imitation").is_file()
    assert validated(BestWeights(run, "imitation", "val_loss", "min"), [1.5, 0.5]) == [2]


class Tiny(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.validated = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, _):
        return (self.weight - batch.float().mean()).square().sum()

    def validation_step(self, batch, _):
        self.log("val_loss", 1.0)

    def on_validation_epoch_end(self):
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(tmp_path, *callbacks, **options):
    """A stage's end with its callbacks in the order of training."""
    ended, model = Ended(), Tiny()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=5, max_epochs=-1, num_sanity_val_steps=0, **quiet, **options
    )
    trainer.callbacks += [*callbacks, LastValidation(), ended]
    data = torch.utils.data.DataLoader(range(1000))
    trainer.fit(model, data, torch.utils.data.DataLoader(range(2)))
    return model.validated, trainer.global_step, ended.early


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("timed", [False, True])
def test_the_last_step_is_validated_once(tmp_path, accumulated, timed):
    """Also beside exp_manager's timer, which leaves where it sees that training is to stop."""
    timers = [StatelessTimer("00:10:00:00")] * timed
    found = fitted(tmp_path, *timers, val_check_interval=3 * accumulated, accumulate_grad_batches=accumulated)
    assert found == ([3, 5], 5, False)
    assert fitted(tmp_path, *timers, val_check_interval=5)[0] == [5]


def test_early_stopping_ends_a_stage_for_whatever_reason(tmp_path):
    reached = pl.callbacks.EarlyStopping("val_loss", patience=10, stopping_threshold=2.0)
    assert fitted(tmp_path, reached, val_check_interval=2) == ([2], 2, True)


def test_stages_have_folders_and_monitors_of_their_own():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["output_dir=x", "trainer.max_steps=5"])
    OmegaConf.set_struct(cfg, False)
    cfg.exp_manager.checkpoint_callback_params.dirpath = "/scratch"
    own = {name: stage_config(cfg, name).exp_manager.checkpoint_callback_params for name in (ALIGNMENT, IMITATION)}
    assert own[ALIGNMENT].dirpath == "/scratch/alignment" and own[IMITATION].dirpath == "/scratch/imitation"
    assert own[ALIGNMENT].monitor == "val_loss"
    params = {"exp_manager": {"checkpoint_callback_params": {"monitor": "val_loss_mine"}}}
    cfg.alignment_stage = OmegaConf.merge(cfg.alignment_stage, params)
    assert stage_config(cfg, ALIGNMENT).exp_manager.checkpoint_callback_params.monitor == "val_loss_mine"


def test_a_checkpoint_of_another_stage_is_refused(tiny_config):
    model = build(tiny_config)
    checkpoint = {"state_dict": model.state_dict()}
    model.stage = "alignment"
    model.on_save_checkpoint(checkpoint)
    model.stage = "imitation"
    with pytest.raises(CheckpointError, match="of the stage alignment, and this is imitation"):
        model.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("averaged", [False, True])
def test_half_of_a_pair_is_no_checkpoint(tmp_path, averaged):
    """Killed between a checkpoint and its averaged weights, NeMo goes on from the pair before."""
    for step in (1, 2):
        torch.save({"global_step": step}, tmp_path / f"mtbi-step={step}-last.ckpt")
    if averaged:
        torch.save({}, tmp_path / "mtbi-step=1-last-EMA.ckpt")
    (tmp_path / "mtbi-step=2-last-unfinished").touch()
    settle_checkpoints(tmp_path)
    left = [f"mtbi-step={1 if averaged else 2}-last.ckpt"]
    assert sorted(f.name for f in tmp_path.glob("*last.ckpt")) == left and not list(tmp_path.glob("*-unfinished"))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_positions_stand_where_their_frames_are(layers):
    """An impulse in one frame is loudest at the position whose time is nearest to that frame's."""
    subsample = ConvSubsampler(1, 1, layers).eval()
    for layer in subsample.layers:
        torch.nn.init.constant_(layer.weight, 0.0)
        layer.weight.data[..., 2] = 1.0
        torch.nn.init.zeros_(layer.bias)
    for frame in range(0, 64, subsample.factor):
        features = torch.zeros(1, 64, 1)
        features[0, frame] = 5.0
        with torch.no_grad():
            hidden, _ = subsample(features, torch.tensor([64]))
        place = int(hidden[0, :, 0].argmax())
        assert float(subsample.centers(hidden.shape[1], hidden)[0, place]) + 0.5 == frame
