"""Continued pretraining: documents in blocks, a loss on every token, bits per byte before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from medicalgpt_cli.engine.data.packing import Block
from medicalgpt_cli.engine.evaluation.bits_per_byte import text_figures, text_items, window_nats
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel, resolve_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.batches import Item
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import packed, stacked
from medicalgpt_cli.engine.training.callbacks import StopOnSignal
from medicalgpt_cli.engine.training.loop import Stage
from medicalgpt_cli.engine.training.pretrain_data import PretrainData, load_pretrain_data
from medicalgpt_cli.settings.stages import PretrainSettings


class PretrainStage(Stage):
    name = "pretrain"
    chats = False
    items = "documents"
    otherwise = "documents of a block see each other"
    settings: PretrainSettings
    data: PretrainData

    def complete(self, settings: PretrainSettings) -> PretrainSettings:
        """A model that starts from random numbers has no weights to freeze."""
        return replace(settings, tuning="full") if settings.from_config else settings

    def resolve(self) -> ResolvedModel:
        if self.settings.from_config is None:
            return resolve_models(self.settings)
        config = self.settings.from_config
        return ResolvedModel(
            ModelReference(str(config), "config", str(config)), None, str(self.settings.tokenizer_path)
        )

    def load_data(self, observer: Observer) -> PretrainData:
        return load_pretrain_data(self.settings, self.tokenizer, observer)

    @property
    def examples(self) -> int:
        return len(self.data.sampler)

    @property
    def has_held_out(self) -> bool:
        return bool(self.data.held_out.windows)

    def facts(self) -> dict[str, Any]:
        """Blocks and tokens of the whole run, and how often each source is seen in it."""
        passes = self.schedule.updates / self.schedule.updates_per_epoch
        sources = self.data.report["sources"]
        an_epoch = sum(one["passes_an_epoch"] * one["tokens"] for one in sources)
        return {
            "blocks": len(self.data.sampler),
            "tokens": round(an_epoch * passes),
            "held_out_tokens": self.data.report["held_out"]["tokens"],
            **{f"passes over {one['source']}": one["passes_an_epoch"] * passes for one in sources},
        }

    def keeps_apart(self, model: Any, observer: Observer) -> bool:
        apart = super().keeps_apart(model, observer)
        if apart:
            observer.on_notice(
                "documents of a block are kept apart: attention and positions begin anew with each"
            )
        return apart

    def batch_items(self) -> list[Item]:
        found = []
        for source in self.data.blocks.sources:
            lengths = [source.block_size] * len(source)
            if source.tail:
                lengths[-1] = source.tail
            found += [Item((length,), length) for length in lengths]
        return found

    def sampler(self) -> Any:
        return self.data.sampler

    def trainer_parts(self, model: Any, stop: StopOnSignal) -> dict[str, Any]:
        measure = partial(self._held_out, model, should_stop=lambda: stop.received is not None)
        return {
            "train_dataset": self.data.blocks,
            "sampler": self.sampler(),
            "collate": self._collate,
            "measure": measure,
        }

    def _collate(self, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
        return packed(blocks) if self.padding_free else stacked(blocks, pad_id=self.tokenizer.pad_token_id)

    def _held_out(self, model: Any, **options: Any) -> dict[str, Any] | None:
        text = self.data.held_out
        with attention.for_batches(model, self.padding_free):
            nats = window_nats(model, text, self._collate, batch_size=self.settings.batch_size, **options)
        if nats is None:
            return None
        self.items_measured = text_items(text, nats)
        return text_figures(text, nats)

    def measure(self, model: Any, observer: Observer, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Held-out bits per byte by source and language; empty where nothing is held out."""
        if not self.has_held_out:
            return {"metrics": {}}
        return {"metrics": known or self._held_out(model, observer=observer)}
