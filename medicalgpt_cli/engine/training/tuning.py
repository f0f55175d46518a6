"""The model that a training command trains, and what it leaves behind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.rendering import stop_token_ids
from medicalgpt_cli.engine.model.adapters import add_adapter, different_shape, save_adapter, target_layers
from medicalgpt_cli.engine.model.base_record import write_record
from medicalgpt_cli.engine.model.dropout import use_fast_dropout
from medicalgpt_cli.engine.model.loading import choose_device, load_model, must_be_loadable_alone
from medicalgpt_cli.engine.model.merged_weights import fold
from medicalgpt_cli.engine.model.references import VOCABULARY, ResolvedModel
from medicalgpt_cli.engine.model.tokenizer import save_tokenizer
from medicalgpt_cli.engine.model.vocabulary import new_token_ids
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import private_folder
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import flag_of
from medicalgpt_cli.settings.stages import TrainSettings


def load_trainable(settings: TrainSettings, resolved: ResolvedModel, observer: Observer) -> Any:
    """The model with the weights that are to be trained requiring gradients.

    LoRA over a base: a new adapter. LoRA on top of an adapter: that adapter is trained on, so that what is
    saved is one ordinary adapter over the original base; its rank and scale stay what they were.
    Full tuning: all weights, an adapter merged into them first. Full weights are held in fp32, which
    AdamW's small steps need; the GPU computes in `--dtype` under autocast.
    """
    refuse_half_precision(settings)
    if settings.tuning == "full":
        model = load_model(replace(settings, dtype="fp32"), resolved, trainable=True, observer=observer)
        must_be_loadable_alone(model, resolved.base.name)
        if resolved.adapter is not None:
            model, _ = fold(model)
            observer.on_notice("the adapter was merged into the weights, which are all trained")
        return model.requires_grad_(True)
    model = load_model(settings, resolved, trainable=True, observer=observer)
    if resolved.adapter is None:
        rows = new_token_ids(resolved.base.folder) if resolved.base.folder else []
        for notice in target_layers(model, settings.target_modules).notices(model.config.model_type):
            observer.on_notice(notice)
        model = add_adapter(model, settings, seed=settings.seed, new_rows=rows)
        if rows and settings.embeddings in ("auto", "new"):
            observer.on_notice(
                f"the embeddings of {len(rows):,} tokens that were added to the base learn, too"
            )
    else:
        keep_shape(settings, Path(resolved.adapter.path), observer)
    if choose_device(settings).type == "cpu":
        use_fast_dropout(model)
    return model


def refuse_half_precision(settings: TrainSettings) -> None:
    """A processor has no autocast for weights that all learn.

    Raises:
        UsageError: it was asked for.
    """
    half = settings.tuning == "full" and settings.dtype in ("bf16", "fp16")
    if half and choose_device(settings).type == "cpu":
        raise UsageError(
            f"--dtype {settings.dtype}: a processor tunes all weights in fp32",
            "leave --dtype out, or train a LoRA adapter",
        )


def keep_shape(settings: TrainSettings, adapter: Path, observer: Observer) -> None:
    """An adapter that is trained on keeps its rank, scale and kind; asking for others is refused."""
    differing = different_shape(adapter, settings)
    asked = [name for name in differing if settings.chosen(name)]
    if asked:
        raise UsageError(
            f"{flag_of(asked[0])} {getattr(settings, asked[0])}: the adapter to go on with has {differing[asked[0]]}",
            "leave it out, or merge the adapter first (medgpt merge-lora) and start a new one",
        )
    for name, value in differing.items():
        observer.on_notice(f"{flag_of(name)} is {value}, as in the adapter that training goes on with")


def save_result(
    settings: TrainSettings,
    resolved: ResolvedModel,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
) -> None:
    """Write `model/`: the adapter or the weights, the tokenizer with its template, the generation settings."""
    private_folder(folder.new_model)
    if settings.tuning == "lora":
        save_adapter(model, folder.new_model, resolved.base.path)
        files = folder.read().get("parents", {}).get("base", {}).get("files")
        if files:
            write_record(folder.new_model, files)
        record = resolved.base.folder / VOCABULARY if resolved.base.folder else None
        if record and record.is_file():
            shutil.copyfile(record, folder.new_model / VOCABULARY)
    else:
        model.save_pretrained(folder.new_model, safe_serialization=True)
    save_tokenizer(tokenizer, folder.new_model)
    if getattr(model, "generation_config", None) is not None:  # a reward model writes nothing
        ends = stop_token_ids(tokenizer, model.generation_config)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(folder.new_model)
    folder.publish_model()
