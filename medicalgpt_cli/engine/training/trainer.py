"""Hugging Face's training loop with our batches, our loss, our held-out measure and safe checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer

from medicalgpt_cli.engine.run import checkpoints, processes
from medicalgpt_cli.engine.run.files import remove_tree
from medicalgpt_cli.engine.training import sharding, shares, together
from medicalgpt_cli.engine.training.batches import IGNORED
from medicalgpt_cli.engine.training.callbacks import EarlyStopping, best_step
from medicalgpt_cli.engine.training.losses import target_loss
from medicalgpt_cli.engine.training.trainer_args import warmed_up
from medicalgpt_cli.errors import TrainingFailed
from medicalgpt_cli.settings.stages import TrainSettings


class MedgptTrainer(Trainer):
    """Trainer for next-token prediction; other stages give their own `batch_loss`.

    The loss of an update is the mean over all its target tokens, across accumulated batches and devices; where these
    have weights, sum(weight · loss) / sum(weight).
    Checkpoints are written beside, hashed, synced and renamed, so that a name that exists is complete.
    """

    unit: ClassVar[str] = "target_tokens"  # what the loss is the mean over

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        args: Any,
        train_dataset: Dataset,
        sampler: Sampler[int],
        collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        measure: Callable[[], dict[str, Any] | None],
        settings: TrainSettings,
        checkpoint_folder: Path,
        callbacks: list[Any],
    ):
        """
        Args:
            sampler: gives the order of an epoch; it has `set_epoch`.
            measure: held-out figures of the model as it is, None where a signal came.
        """
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=[],  # the library asks for one where it is to evaluate; `measure` has the data
            data_collator=collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # the observer speaks
        self.sampler, self.measure = sampler, measure
        self.seen = 0  # targets since the last log step
        self.measured: tuple[int, dict[str, Any]] | None = None  # the last update measured after
        self.settings, self.checkpoint_folder = settings, checkpoint_folder
        self.spread = sharding.kind_of(settings) != "ddp"
        self.early_stopping = next((one for one in callbacks if isinstance(one, EarlyStopping)), None)
        # Our batches carry shifted labels; their count normalises the loss, and the loss says so.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """The library's schedule with our warm-up (`warmed_up`)."""
        if self.lr_scheduler is None:
            theirs = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            factors = [warmed_up(factor, warmup) for factor in theirs.lr_lambdas]
            self.lr_scheduler = LambdaLR(theirs.optimizer, factors)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """Every process goes through all batches of the run and keeps its share of each (`collate`).

        The library's own division repeats examples at the end of an epoch, and its order depends on the processes.
        """
        if processes.size() == 1:
            return super().get_train_dataloader()
        from accelerate.data_loader import prepare_data_loader

        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size * processes.size(),
            sampler=self.sampler,
            collate_fn=self._share,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(loader, self.accelerator.device, num_processes=1, put_on_device=False)

    def _share(self, examples: list[Any]) -> dict[str, Any]:
        """This process' part of a batch; where there is none, one without a loss: every process has to answer."""
        mine = together.share(examples)
        batch = self.data_collator(mine or examples[:1])
        if not mine:
            for name in ("labels", "shift_labels"):
                if name in batch:
                    batch[name] = torch.full_like(batch[name], IGNORED)
        return batch

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """One pass over the batches; none where nothing is left to be learnt.

        The library looks at the number of updates behind an update only. A run that died after its last one would
        make another one when it goes on, unless that was also the last of an epoch.
        """
        if self.is_finished():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)

    def is_finished(self) -> bool:
        """Whether the last update was made: all of them, or so many that early stopping ended the run."""
        stopped = self.early_stopping is not None and self.early_stopping.reached(self.state)
        return stopped or self.state.global_step >= self.state.max_steps

    def missed_measurement(self) -> bool:
        """Whether held-out data was to be measured on after this update, and a signal came first."""
        step = self.state.global_step
        if not step or self.args.eval_strategy == "no" or step % self.args.eval_steps:
            return False
        last = [entry for entry in self.state.log_history if entry["step"] == step]
        return not any(name.startswith("eval_") for entry in last for name in entry)

    def batch_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the loss over the items of a batch; `labels` that are not -100 are its items."""
        return target_loss(model, inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total = self.batch_loss(model, inputs)
        if (inputs["labels"] == IGNORED).all():  # a batch that is only there for the others (`_share`)
            total = total * 0
        count = num_items_in_batch
        if count is None:
            count = _total_weight(inputs)
        loss = total / count
        if self.args.average_tokens_across_devices:
            # The count is of all devices, and the gradient will be averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the summed loss of an update is divided by: its items, or the sum of their weights."""
        if not batch_samples or "loss_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        total = sum(_total_weight(batch) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += int((inputs["labels"] != IGNORED).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            newest = checkpoints.newest_complete(self.checkpoint_folder)
            raise TrainingFailed(
                f"the loss became {float(loss)} at update {self.state.global_step + 1}",
                "lower --learning-rate"
                + (
                    f"; the last good checkpoint is {newest}" if newest else "; no checkpoint was written yet"
                ),
            )
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["seen"], self.seen = together.total(self.seen, self.args.device), 0
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """The held-out figures, weighted by token."""
        measured = self.measure()
        if together.largest(int(measured is None), self.args.device):
            # a signal came: save and leave, without a figure for this update
            self.control.should_save = self.control.should_training_stop = True
            return {}
        self.measured = (self.state.global_step, measured)
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in measured.items()
            if isinstance(value, float)
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_folder / ".writing")

    def _save_checkpoint(self, model, trial) -> None:
        first = processes.rank() == 0
        if first:
            remove_tree(self.checkpoint_folder / ".writing")  # what a killed save has left
        together.wait()
        super()._save_checkpoint(model, trial)
        together.wait()
        name = f"checkpoint-{self.state.global_step}"
        final = self.checkpoint_folder / name
        if first:
            checkpoints.publish(self.checkpoint_folder / ".writing" / name, final)
            best = self.best_checkpoint()
            checkpoints.prune(
                self.checkpoint_folder, self.settings.keep_checkpoints, protect=[best] if best else []
            )
        together.wait()
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_published"):
                callback.on_published(self.state.global_step, final)

    def _wrap_model(self, model, training=True, dataloader=None):
        wrapped = super()._wrap_model(model, training, dataloader)
        if self.accelerator.ddp_handler is not None:
            # The gradients lie in the buckets through which processes talk, instead of twice in memory.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        return wrapped

    # -- a model that is spread over the processes -------------------------------------------------------------

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.spread:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        sharding.check_spread(self.settings, self.model, self.model_wrapped, self.optimizer)
        if resume_from_checkpoint is not None:
            shares.restore_learning(self.model, self.optimizer, Path(resume_from_checkpoint))
            self._load_state(Path(resume_from_checkpoint))
            schedule = torch.load(Path(resume_from_checkpoint) / "scheduler.pt", weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate  # the schedule sets it with its next step only
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model's part of a checkpoint; of one that is spread, what learns is saved with its moments."""
        if not self.spread:
            super().save_model(output_dir, _internal_call)
        elif processes.rank() == 0:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self._save_state(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.spread:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        shares.save_learning(self.model, self.optimizer, Path(output_dir))
        if processes.rank() == 0:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def make_whole(self) -> None:
        """Give the first process the whole of what has learnt; a model that was spread can then only be saved."""
        if self.spread:
            shares.make_whole(self.model, self.optimizer)

    def _save_state(self, folder: Path) -> None:
        """What a stage remembers beside weights, moments and random states."""

    def _load_state(self, folder: Path) -> None:
        """The same, taken up again."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        # The arguments are pickled there by default; run.json holds them as plain text.
        arguments = Path(output_dir or self.args.output_dir) / "training_args.bin"
        if arguments.exists():
            os.remove(arguments)  # noqa: PTH107

    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, where early stopping keeps it."""
        step = best_step(self.state) if self.early_stopping else None
        return self.checkpoint_folder / f"checkpoint-{step}" if step is not None else None

    def load_weights(self, checkpoint: Path) -> None:
        """Put the weights of a checkpoint into the model (used to end with the best one)."""
        if self.spread:
            shares.restore_learning(self.model, self.optimizer, checkpoint, moments=False)
        else:
            self._load_from_checkpoint(str(checkpoint))


def _total_weight(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many items a batch has; the sum of their weights where it has `loss_weights`."""
    items = batch["labels"] != IGNORED
    return batch["loss_weights"][items].sum() if "loss_weights" in batch else items.sum()
