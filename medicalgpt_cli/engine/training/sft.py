"""Instruction tuning: settings → data → model → trainer → saved model and report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from medicalgpt_cli.engine.evaluation.heldout import held_out
from medicalgpt_cli.engine.evaluation.samples import answer_questions, paired_samples
from medicalgpt_cli.engine.model.loading import choose_device, choose_dtype, load_tokenizer
from medicalgpt_cli.engine.model.references import ResolvedModel, resolve_models
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import checkpoints, metrics
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.engine.run.manifest import read as read_manifest
from medicalgpt_cli.engine.run.manifest import resumed_settings
from medicalgpt_cli.engine.run.report import write_report
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import end_to_end, padded, target_count
from medicalgpt_cli.engine.training.callbacks import EarlyStopping, Reporting, StopOnSignal
from medicalgpt_cli.engine.training.sft_data import SftData, load_sft_data
from medicalgpt_cli.engine.training.trainer import Collate, MedgptTrainer
from medicalgpt_cli.engine.training.trainer_args import (
    Schedule,
    check_surroundings,
    learning_rate,
    schedule,
    training_arguments,
)
from medicalgpt_cli.engine.training.tuning import load_trainable, save_result
from medicalgpt_cli.errors import Stopped, UsageError
from medicalgpt_cli.settings.stages import SftSettings


@dataclass(frozen=True)
class SftPlan:
    """Everything about a run that is known before weights are loaded."""

    settings: SftSettings
    resolved: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    data: SftData
    schedule: Schedule

    def as_dict(self) -> dict[str, Any]:
        """Model, examples, updates and tokens of the whole run."""
        training = self.data.training
        passes = self.schedule.updates / self.schedule.updates_per_epoch
        return {
            "model": self.resolved.label,
            "examples": len(training),
            "held_out_examples": len(self.data.held_out),
            "updates": self.schedule.updates,
            "updates_per_epoch": self.schedule.updates_per_epoch,
            "warmup_updates": self.schedule.warmup,
            "tokens": round(sum(len(example.input_ids) for example in training) * passes),
            "target_tokens": round(target_count(training) * passes),
            "learning_rate": learning_rate(self.settings, self.settings),
        }


def plan_sft(settings: SftSettings, observer: Observer) -> SftPlan:
    """Resolve the model, read and tokenise the data, count the updates; loads no weights, writes nothing.

    Raises:
        UsageError, DataError: settings or data are wrong.
    """
    if settings.resume:
        settings = resumed_settings(read_manifest(settings.resume), settings, settings.resume)
    check_surroundings(settings)
    resolved = resolve_models(settings)
    tokenizer = load_tokenizer(settings, resolved)
    data = load_sft_data(settings, tokenizer, observer)
    observer.on_data(data.report)
    return SftPlan(settings, resolved, tokenizer, data, schedule(settings, len(data.training)))


def run_sft(settings: SftSettings, observer: Observer) -> dict[str, Any]:
    """Tune a model on conversations and leave a complete run folder.

    Returns:
        What `--json` prints: the run folder, steps, and held-out loss, perplexity and bits per byte before
        and after.

    Raises:
        UsageError, DataError: settings or data are wrong. TrainingFailed: the loss is not a number.
        Stopped: a signal came; a checkpoint was saved and the hint says how to go on.
    """
    planned = plan_sft(settings, observer)
    with _open_folder(planned) as folder:
        try:
            return _train_in(folder, planned, observer)
        except Stopped as stopped:
            folder.finish("stopped")
            write_report(folder)
            raise Stopped(stopped.message, _how_to_go_on(folder), exit_code=stopped.exit_code) from None
        except KeyboardInterrupt:
            folder.finish("stopped")
            raise Stopped("stopped at once, without another checkpoint", _how_to_go_on(folder)) from None
        except BaseException:
            folder.finish("failed")
            raise


def _how_to_go_on(folder: RunFolder) -> str:
    return f"go on with: medgpt sft --resume {folder.path}"


def _open_folder(planned: SftPlan) -> RunFolder:
    """A new run folder, or the interrupted one of `--resume` if its data is the same as then."""
    settings, data = planned.settings, planned.data
    if settings.resume is None:
        folder = RunFolder.create("sft", planned.resolved.label, settings)
        folder.update(
            data=data.report,
            fingerprints={**data.fingerprints, "tokenizer": fingerprint(planned.tokenizer)},
            parents=planned.resolved.parents(),
        )
        return folder
    before = read_manifest(settings.resume).get("fingerprints", {})
    now = {**data.fingerprints, "tokenizer": fingerprint(planned.tokenizer)}
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UsageError(
            f"{settings.resume} cannot go on: {', '.join(changed)} changed since it began",
            "put the same files back, or start a new run",
        )
    return RunFolder.open_for_resume(settings.resume, "sft")


def _train_in(folder: RunFolder, planned: SftPlan, observer: Observer) -> dict[str, Any]:
    settings, plan = planned.settings, planned.schedule
    set_seed(settings.seed)
    model = load_trainable(settings, planned.resolved, observer)
    collate = _collate(planned, model, observer)
    measure = partial(_measure, planned, model, collate, observer)
    before = folder.read().get("before")  # a resumed run measured it when it began
    if before is None:
        before = measure()
        folder.update(before=before)
    with StopOnSignal().listening() as stop:
        trainer = _trainer(planned, model, collate, folder, stop, observer)
        checkpoint = _checkpoint_to_go_on_from(folder, observer)
        observer.on_train_start(_start_event(folder, planned, model, trainer, checkpoint, before["metrics"]))
        began = time.monotonic()
        set_seed(settings.seed)  # measuring must not have moved the random state
        with attention.for_batches(model, collate is end_to_end):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds, step = time.monotonic() - began, trainer.state.global_step
    if stop.received is not None and step < plan.updates:
        raise Stopped(
            f"stopped by {stop.name} after update {step} of {plan.updates}; a checkpoint is saved",
            exit_code=stop.exit_code,
        )
    known = trainer.measured[1] if trainer.measured and trainer.measured[0] == step else None
    best = trainer.best_checkpoint()
    if best is not None and checkpoints.step_of(best) != step:
        trainer.load_weights(best)
        known = None
        observer.on_notice(f"kept the weights with the lowest held-out loss, of {best.name}")
    model.eval()
    after = measure(known=known)
    save_result(settings, planned.resolved, model, planned.tokenizer, folder)
    result = {
        "steps": step,
        "seconds": seconds,
        "before": before["metrics"],
        "after": after["metrics"],
        "samples": paired_samples(before["answers"], after["answers"]),
    }
    folder.finish("done", result)
    write_report(folder)
    summary = {"stage": "sft", "folder": str(folder.path), "model": str(folder.model), **result}
    observer.on_train_end(summary)
    return summary


def _checkpoint_to_go_on_from(folder: RunFolder, observer: Observer) -> Path | None:
    """The newest complete checkpoint; what was logged or saved after it is forgotten."""
    for name, reason in checkpoints.incomplete(folder.checkpoints).items():
        observer.on_warning(f"{name} is left out: {reason}")
    checkpoint = checkpoints.newest_complete(folder.checkpoints)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    metrics.drop_after(folder.metrics, step)
    checkpoints.drop_after(folder.checkpoints, step)
    return checkpoint


def _start_event(
    folder: RunFolder,
    planned: SftPlan,
    model: Any,
    trainer: MedgptTrainer,
    checkpoint: Path | None,
    before: dict[str, float],
) -> dict[str, Any]:
    return {
        "stage": "sft",
        "folder": str(folder.path),
        "model": planned.resolved.label,
        "steps": planned.schedule.updates,
        "from_step": checkpoints.step_of(checkpoint) if checkpoint else 0,
        "trainable": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": str(trainer.args.device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "before": before,
    }


def _collate(planned: SftPlan, model: Any, observer: Observer) -> Collate:
    """How a batch is laid out: end to end where the model gives the same logits for it, else padded."""
    settings = planned.settings
    if settings.layout == "padding-free":
        if settings.neftune_alpha is not None:
            observer.on_notice("batches are padded: NEFTune scales its noise by the length of a row")
        elif not attention.is_exact(model):
            observer.on_notice("batches are padded: this model cannot keep the examples of one row apart")
        else:
            return end_to_end
    return partial(padded, pad_id=planned.tokenizer.pad_token_id)


def _measure(
    planned: SftPlan,
    model: Any,
    collate: Collate,
    observer: Observer,
    known: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Held-out loss (measured anew unless it is `known`) and a few answers; empty where nothing is held out."""
    data, settings = planned.data, planned.settings
    if not data.held_out:
        return {"metrics": {}, "answers": []}
    if known is None:
        with attention.for_batches(model, collate is end_to_end):
            known = held_out(
                model,
                data.held_out,
                planned.tokenizer,
                collate,
                batch_size=settings.batch_size,
                observer=observer,
            )
    answers = answer_questions(
        model, planned.tokenizer, data.questions, settings.eval_answer_tokens, observer
    )
    return {"metrics": known, "answers": answers}


def _trainer(
    planned: SftPlan, model: Any, collate: Collate, folder: RunFolder, stop: StopOnSignal, observer: Observer
) -> MedgptTrainer:
    settings, data, plan = planned.settings, planned.data, planned.schedule
    device = choose_device(settings)
    args = training_arguments(
        settings,
        plan,
        folder=folder.checkpoints,
        torch_device=device,
        dtype=choose_dtype(settings, device),
        evaluate=bool(data.held_out),
    )
    callbacks: list[Any] = [Reporting(observer, folder.metrics), stop]
    if settings.early_stopping is not None and data.held_out:
        callbacks.append(EarlyStopping(settings.early_stopping))
    return MedgptTrainer(
        model=model,
        args=args,
        train=data.training,
        held_out_examples=data.held_out,
        collate=collate,
        tokenizer=planned.tokenizer,
        by_length=settings.batch_order == "by-length",
        checkpoint_folder=folder.checkpoints,
        keep_checkpoints=settings.keep_checkpoints,
        callbacks=callbacks,
        stop=stop,
    )
