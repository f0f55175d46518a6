"""What all training stages share: a run folder, a measure before and after, the trainer, a clean stop.

A stage says what it learns from and how it is measured (`Stage`); `run` does the rest.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from medicalgpt_cli.engine.evaluation.paired import PerItem, paired_differences
from medicalgpt_cli.engine.model.experts import expert_weights
from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype, load_tokenizer
from medicalgpt_cli.engine.model.positions import must_reach
from medicalgpt_cli.engine.model.quantization import check_quantization, count_parameters
from medicalgpt_cli.engine.model.reached import unreached
from medicalgpt_cli.engine.model.references import ResolvedModel, resolve_models
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.batches import Item
from medicalgpt_cli.engine.planning.device import for_gpu
from medicalgpt_cli.engine.planning.needs import Case
from medicalgpt_cli.engine.planning.start import before_loading
from medicalgpt_cli.engine.run import checkpoints, metrics, processes
from medicalgpt_cli.engine.run.allocation import LARGEST, give_back_freed_memory, keep_freed_memory
from medicalgpt_cli.engine.run.files import open_to_others
from medicalgpt_cli.engine.run.folder import Onlooker, RunFolder
from medicalgpt_cli.engine.run.manifest import read as read_manifest
from medicalgpt_cli.engine.run.manifest import resumed_settings
from medicalgpt_cli.engine.run.report import write_report
from medicalgpt_cli.engine.training import attention, origins, sharding, speed, together
from medicalgpt_cli.engine.training.callbacks import Beginning, EarlyStopping, Reporting, StopOnSignal
from medicalgpt_cli.engine.training.trainer import MedgptTrainer
from medicalgpt_cli.engine.training.trainer_args import (
    Schedule,
    check_processes,
    check_surroundings,
    learning_rate,
    same_global_batch,
    schedule,
    training_arguments,
)
from medicalgpt_cli.engine.training.tuning import load_trainable, save_result
from medicalgpt_cli.errors import Stopped, UsageError
from medicalgpt_cli.settings.stages import TrainSettings


class Stage(ABC):
    """One training stage on its data. Making it reads the data; it loads no weights and writes nothing."""

    name: ClassVar[str]
    trainer: ClassVar[type[MedgptTrainer]] = MedgptTrainer
    chats: ClassVar[bool] = True  # needs a chat template, if need be the plain one
    items: ClassVar[str] = "answers"  # what attention keeps apart in a row
    otherwise: ClassVar[str] = "batches are padded"  # what is done where it cannot
    kept_tensor: ClassVar[int] = LARGEST  # bytes of the largest tensor whose memory is kept on a processor
    settings: Any
    data: Any  # what `load_data` gave
    padding_free: bool  # whether batches lie end to end; known once the model is there
    items_measured: PerItem | None = None  # the last held-out figures, item by item

    def __init__(self, settings: TrainSettings, observer: Observer):
        """
        Raises:
            UsageError, DataError: settings or data are wrong. EnvironmentFailure: a device is not there.
        """
        check_processes(settings)
        if settings.resume:
            before = read_manifest(settings.resume)
            settings = resumed_settings(before, settings, settings.resume)
            settings = same_global_batch(settings, before.get("processes", 1))
        check_surroundings(settings)
        self.settings = self.complete(settings)
        self.resolved: ResolvedModel = self.resolve()
        check_quantization(self.resolved, self.settings.quantization, self.settings.tuning)
        device = choose_device(self.settings)
        sharding.check_combination(self.settings, self.name, self.resolved, for_gpu(self.settings, device))
        if not settings.dry_run:
            sharding.check_sharding(self.settings, device)
        speed.check(self.settings, self.resolved)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            self.settings, self.resolved, observer, plain_template=self.chats
        )
        self.data = self.load_data(observer)
        self.schedule: Schedule = schedule(self.settings, self.examples, processes.size())
        observer.on_data(self.data.report)

    # -- what differs between stages -----------------------------------------------------------------------

    def complete(self, settings: TrainSettings) -> TrainSettings:
        """The settings with what follows from others."""
        return settings

    def resolve(self) -> ResolvedModel:
        return resolve_models(self.settings)

    @abstractmethod
    def load_data(self, observer: Observer) -> Any:
        """Read the data. The result has `report` (counts) and `fingerprints` (name to hash)."""

    def fitted(self, case: Case | None, have: int | None) -> Case | None:
        """Settle what the settings leave to the memory that there is; gives the case as it will then be.

        Args:
            case: what the stage needs, None where that is not known. have: bytes of the device, where known.
        """
        return case

    def agree(self, device: torch.device) -> None:  # noqa: B027 - most stages have nothing to settle
        """Settle the same in all processes."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many examples make an epoch."""

    @property
    @abstractmethod
    def has_held_out(self) -> bool:
        """Whether there is data to measure on."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the plan says about the data."""

    @abstractmethod
    def batch_items(self) -> Sequence[Item]:
        """What each example puts into a batch, for the plan of memory and time."""

    @abstractmethod
    def sampler(self) -> Any:
        """Gives the order of an epoch; it has `set_epoch`."""

    @abstractmethod
    def trainer_parts(self, model: Any, stop: StopOnSignal) -> dict[str, Any]:
        """`train_dataset`, `sampler`, `collate` and `measure`, which is called where something is held out.

        Asked for before it is known how batches are laid out (`keeps_apart`).
        """

    @abstractmethod
    def measure(self, model: Any, observer: Observer, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"metrics": …, …}: held-out figures, measured anew unless `known`, and what else is compared."""

    def models(self) -> dict[str, ResolvedModel]:
        """The models that the run is built on, under what the names of their parts begin with in run.json."""
        return {"": self.resolved}

    def keeps_apart(self, model: Any, observer: Observer) -> bool:
        """Whether batches lie end to end, their items kept apart by attention: where asked for and exact."""
        if getattr(self.settings, "layout", None) == "padded":
            return False
        if self.settings.neftune_alpha is not None:
            why = "NEFTune scales its noise by the length of a row"
        else:
            reason = attention.hindrance(model)
            if reason is None:
                return True
            why = f"this model cannot keep the {self.items} of one row apart ({reason})"
        observer.on_notice(f"{self.otherwise}: {why}")
        return False

    def load(self, observer: Observer) -> Any:
        """The model with the weights that are to be trained requiring gradients."""
        return load_trainable(self.settings, self.resolved, observer)

    def tokenizers(self) -> dict[str, str]:
        """Fingerprints of the tokenizers with their templates."""
        return {"tokenizer": fingerprint(self.tokenizer)}

    def save(self, model: Any, folder: RunFolder, after: dict[str, Any]) -> None:
        """Write the result into `folder.new_model` and publish it."""
        save_result(self.settings, self.resolved, model, self.tokenizer, folder)

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """What the result says beyond the figures before and after."""
        return {}

    # -- what is the same ----------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Model, data, updates and learning rate of the whole run."""
        return {
            "model": self.resolved.label,
            **self.facts(),
            "updates": self.schedule.updates,
            "updates_per_epoch": self.schedule.updates_per_epoch,
            "warmup_updates": self.schedule.warmup,
            "learning_rate": learning_rate(self.settings, self.settings),
        }


def run(stage: Stage, observer: Observer) -> dict[str, Any]:
    """Train and leave a complete run folder.

    Returns:
        What `--json` prints: the run folder, steps, and the held-out figures before and after.

    Raises:
        TrainingFailed: the loss is not a number.
        Stopped: a signal came; a checkpoint was saved and the hint says how to go on.
        EnvironmentFailure: the run is not expected to fit into the device's memory.
    """
    device = choose_device(stage.settings)
    if device.type == "cpu":
        keep_freed_memory(stage.kept_tensor)
    planned = before_loading(stage, observer)
    sharding.prepare_environment(stage.settings, device)
    together.join(device, sharding.uses_deepspeed(stage.settings))
    stage.agree(device)
    with _open_folder(stage, observer) as folder:
        folder.update(plan=planned)
        if processes.rank() == 0:
            _say_who_can_read(folder, observer)
        try:
            summary = _train_in(folder, stage, observer)
            together.leave()
            return summary
        except Stopped as stopped:
            folder.finish("stopped")
            if processes.rank() == 0:
                write_report(folder)
            raise Stopped(
                stopped.message, _how_to_go_on(folder, stage), exit_code=stopped.exit_code
            ) from None
        except KeyboardInterrupt as stopped:
            folder.finish("stopped")
            raise Stopped(
                f"stopped at once by {getattr(stopped, 'signal_name', 'SIGINT')}, without another checkpoint",
                _how_to_go_on(folder, stage),
                exit_code=getattr(stopped, "exit_code", 130),
            ) from None
        except BaseException:
            folder.finish("failed")
            raise


def _how_to_go_on(folder: RunFolder, stage: Stage) -> str:
    return f"go on with: medgpt {stage.name} --resume {folder.path}"


def _open_folder(stage: Stage, observer: Observer) -> RunFolder:
    """The run folder; the first process makes it, the others look on."""
    folder = _make_folder(stage, observer) if processes.rank() == 0 else None
    path = together.from_first(folder.path if folder else None)
    return folder or Onlooker(path)


def _make_folder(stage: Stage, observer: Observer) -> RunFolder:
    """A new run folder, or the interrupted one of `--resume` if its data and models are the same as then."""
    settings, data = stage.settings, stage.data
    now = {**data.fingerprints, **stage.tokenizers()}
    if settings.resume is None:
        origin = origins.begin(stage.models(), observer, accept=settings.accept_other_base)
        folder = RunFolder.create(stage.name, stage.resolved.label, settings)
        folder.update(
            data=data.report,
            fingerprints=now,
            **origin,
            processes=processes.size(),
            parallel=sharding.kind_of(settings),
        )
        return folder
    recorded = read_manifest(settings.resume)
    if (recorded.get("parallel", "ddp") == "ddp") != (sharding.kind_of(settings) == "ddp"):
        raise UsageError(
            f"{settings.resume} cannot go on: its checkpoints are for {recorded.get('parallel', 'ddp')}",
            "go on with the --accelerate-config that it began with, or start a new run",
        )
    before = recorded.get("fingerprints", {})
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise UsageError(
            f"{settings.resume} cannot go on: {', '.join(changed)} changed since it began",
            "put the same files back, or start a new run",
        )
    origin = origins.go_on(
        recorded, stage.models(), observer, settings.resume, accept=settings.accept_other_base
    )
    folder = RunFolder.open_for_resume(settings.resume, stage.name, group_readable=settings.group_readable)
    folder.update(**origin)
    return folder


def _say_who_can_read(folder: RunFolder, observer: Observer) -> None:
    """What was open is closed; what could not be closed, or is closed against a wish, is worth a word."""
    if open_to_others(folder.path):
        observer.on_warning(f"others can read {folder.path}: its file system does not keep them out")
    elif folder.was_open:
        observer.on_notice(f"others could read {folder.path}; now you alone can")
    if folder.group_readable and (closed := folder.closed_parents()):
        observer.on_warning(f"--group-readable: {closed[0]} lets nobody else through to the model")


# What bounds the texts of a stage, where it is not --max-length.
_BOUNDS = {"pretrain": "--block-size", "rl": "--max-prompt-length with --max-new-tokens"}


def _train_in(folder: RunFolder, stage: Stage, observer: Observer) -> dict[str, Any]:
    settings, updates = stage.settings, stage.schedule.updates
    # Before the model: from them the library knows that it is to be spread.
    arguments = _arguments(stage, folder)
    set_seed(settings.seed)
    model = stage.load(observer)
    if processes.rank() == 0:  # a hub model is here now, if it was not before
        accept = settings.accept_other_base
        folder.update(**origins.go_on(folder.read(), stage.models(), observer, folder.path, accept=accept))
    longest = max((tokens for item in stage.batch_items() for tokens in item.rows), default=0)
    must_reach(getattr(model, "policy", model), longest, observer, _BOUNDS.get(stage.name, "--max-length"))
    if settings.tuning == "full" and unreached(model):  # else the processes wait for these gradients
        arguments.ddp_find_unused_parameters = True
    experts = expert_weights(model).values()
    if experts and not any(weight.requires_grad for weight in experts):
        observer.on_notice("experts and their router stay as they are: the adapter lies over attention")
    speed.prepare(model, settings)
    # What is spread over processes can be measured once the trainer has done so.
    spread = sharding.spreads_weights(settings)
    before = None if spread else _measured_before(folder, stage, model, observer)
    with StopOnSignal().listening() as stop, ExitStack() as layout:

        def begin() -> None:
            nonlocal before, began
            before = before or _measured_before(folder, stage, model, observer)
            observer.on_train_start(
                _start_event(folder, stage, model, trainer, checkpoint, before["metrics"])
            )
            layout.enter_context(attention.for_batches(model, stage.padding_free))
            if trainer.missed_measurement():  # of the checkpoint that the run goes on from
                trainer.evaluate()
            # Measuring must not have moved the random state; each process drops out on its own.
            set_seed(settings.seed + processes.rank())
            if trainer.args.device.type == "cpu":
                give_back_freed_memory()  # what loading and measuring have left
                if trainer.spread:
                    # AdamW then works on a process' whole share at once, beside what the backward pass has left.
                    layout.callback(
                        register_optimizer_step_pre_hook(lambda *_: give_back_freed_memory()).remove
                    )
            began = time.monotonic()

        trainer = _trainer(stage, model, arguments, folder, stop, [Beginning(begin)], observer)
        first, began = processes.rank() == 0, 0.0
        checkpoint = together.from_first(_checkpoint_to_go_on_from(folder, observer) if first else None)
        layout.enter_context(speed.compiled(model, settings))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        layout.close()
        seconds, step = time.monotonic() - began, trainer.state.global_step
    # The best weights can be told once the last ones were measured, too.
    unmeasured = trainer.early_stopping is not None and trainer.missed_measurement()
    if stop.received is not None and (step < updates or unmeasured):
        raise Stopped(
            f"stopped by {stop.name} after update {step} of {updates}; a checkpoint is saved",
            exit_code=stop.exit_code,
        )
    known = trainer.measured[1] if trainer.measured and trainer.measured[0] == step else None
    best = trainer.best_checkpoint()
    if best is not None and checkpoints.step_of(best) != step:
        trainer.load_weights(best)
        known = None
        observer.on_notice(f"kept the weights with the lowest held-out loss, of {best.name}")
    model.eval()
    after = stage.measure(model, observer, known)
    trainer.make_whole()
    if first:
        stage.save(model, folder, after)
    # As JSON keeps them: what was measured before may have been read from the folder.
    change = paired_differences(folder.items_before(), json.loads(json.dumps(_items(stage))))
    result = {
        "steps": step,
        "seconds": seconds,
        "before": before["metrics"],
        "after": after["metrics"],
        **({"change": change} if change else {}),
        **stage.compare(before, after),
    }
    folder.finish("done", result)
    if first:
        write_report(folder)
    summary = {"stage": stage.name, "folder": str(folder.path), "model": str(folder.model), **result}
    observer.on_train_end(summary)
    return summary


def _measured_before(folder: RunFolder, stage: Stage, model: Any, observer: Observer) -> dict[str, Any]:
    """How the batches are laid out, and the held-out figures; a resumed run measured these when it began."""
    stage.padding_free = stage.keeps_apart(model, observer)
    before = together.from_first(folder.read().get("before"))
    if before is None:
        before = stage.measure(model, observer)
        folder.keep_items_before(_items(stage))
        folder.update(before=before)
    return before


def _items(stage: Stage) -> dict[str, Any]:
    """The last held-out measurement, item by item; empty where nothing is held out."""
    return stage.items_measured.as_dict() if stage.items_measured else {}


def _checkpoint_to_go_on_from(folder: RunFolder, observer: Observer) -> Path | None:
    """The newest complete checkpoint; what was logged or saved after it is forgotten."""
    for name, reason in checkpoints.incomplete(folder.checkpoints).items():
        observer.on_warning(f"{name} is left out: {reason}")
    checkpoint = checkpoints.newest_complete(folder.checkpoints)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    unreadable = metrics.drop_after(folder.metrics, step)
    if unreadable:
        observer.on_warning(f"{folder.metrics.name}: {unreadable} damaged lines are left out")
    checkpoints.drop_after(folder.checkpoints, step)
    return checkpoint


def _start_event(
    folder: RunFolder,
    stage: Stage,
    model: Any,
    trainer: MedgptTrainer,
    checkpoint: Path | None,
    before: dict[str, Any],
) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "folder": str(folder.path),
        "model": stage.resolved.label,
        "steps": stage.schedule.updates,
        "from_step": checkpoints.step_of(checkpoint) if checkpoint else 0,
        "trainable": count_parameters(model, learning=True),
        "parameters": count_parameters(model),
        "quantization": stage.settings.quantization,
        "device": str(trainer.args.device),
        "processes": processes.size() if processes.size() > 1 else None,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "before": before,
    }


def _arguments(stage: Stage, folder: RunFolder) -> TrainingArguments:
    device = choose_device(stage.settings)
    return training_arguments(
        stage.settings,
        stage.schedule,
        folder=folder.checkpoints,
        torch_device=device,
        dtype=choose_dtype(stage.settings, device),
        evaluate=stage.has_held_out,
    )


def _trainer(
    stage: Stage,
    model: Any,
    arguments: TrainingArguments,
    folder: RunFolder,
    stop: StopOnSignal,
    callbacks: list[TrainerCallback],
    observer: Observer,
) -> MedgptTrainer:
    settings = stage.settings
    callbacks = [*callbacks, Reporting(observer, folder.metrics, stage.trainer.unit), stop]
    if settings.early_stopping is not None and stage.has_held_out:
        callbacks.append(EarlyStopping(settings.early_stopping))
    return stage.trainer(
        model=model,
        args=arguments,
        settings=settings,
        checkpoint_folder=folder.checkpoints,
        callbacks=callbacks,
        **stage.trainer_parts(model, stop),
    )
