"""Instruction tuning: conversations, a loss on the answers, questions answered before and after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from medicalgpt_cli.engine.data.example_table import ExampleTable
from medicalgpt_cli.engine.data.examples import Example
from medicalgpt_cli.engine.data.mixing import passes_over
from medicalgpt_cli.engine.data.rendering import end_of_turn
from medicalgpt_cli.engine.evaluation.heldout import example_figures, example_items, example_nats
from medicalgpt_cli.engine.evaluation.samples import answer_questions, paired_samples
from medicalgpt_cli.engine.model.unlearnt import unlearnt_end
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.batches import Item
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.engine.training.batches import (
    EpochSampler,
    ExampleDataset,
    end_to_end,
    padded,
)
from medicalgpt_cli.engine.training.callbacks import StopOnSignal
from medicalgpt_cli.engine.training.loop import Stage
from medicalgpt_cli.engine.training.sft_data import SftData, load_sft_data
from medicalgpt_cli.settings.stages import SftSettings


class SftStage(Stage):
    name = "sft"
    items = "examples"
    settings: SftSettings
    data: SftData

    def load_data(self, observer: Observer) -> SftData:
        return load_sft_data(self.settings, self.tokenizer, observer)

    @property
    def examples(self) -> int:
        return len(self.data.mix)

    @property
    def has_held_out(self) -> bool:
        return bool(self.data.held_out)

    def facts(self) -> dict[str, Any]:
        """Examples and tokens of the whole run."""
        training = self.data.training
        passes = self.schedule.updates / self.schedule.updates_per_epoch
        taken = np.repeat([one["passes_an_epoch"] * passes for one in self.data.mix.rows], training.sizes)
        return {
            "examples": len(training),
            "held_out_examples": len(self.data.held_out),
            "tokens": round(float(training.lengths @ taken)),
            "target_tokens": round(float(training.targets @ taken)),
            **passes_over(self.data.mix.rows, passes),
        }

    def load(self, observer: Observer) -> Any:
        model = super().load(observer)
        frozen = self.settings.tuning == "lora" and self.settings.embeddings != "all"
        why = unlearnt_end(model, self.tokenizer) if frozen and self.resolved.adapter is None else None
        if why:
            observer.on_warning(
                f"{self.tokenizer.convert_ids_to_tokens(end_of_turn(self.tokenizer))}, with which the chat template "
                f"ends an answer, looks as if {self.resolved.base.name} had never learnt it ({why}); an adapter alone "
                "may not teach it, and answers then do not end: --embeddings all trains it, too"
            )
        return model

    def batch_items(self) -> Sequence[Item]:
        return ExampleItems(self.data.training)

    def sampler(self) -> EpochSampler:
        settings = self.settings
        return EpochSampler(
            self.data.training.lengths,
            settings.batch_size * processes.size(),
            settings.seed,
            by_length=settings.batch_order == "by-length",
            draw=self.data.mix.sampler(settings.seed),
        )

    def trainer_parts(self, model: Any, stop: StopOnSignal) -> dict[str, Any]:
        dataset = ExampleDataset(self.data.training)
        measure = partial(self._held_out, model, should_stop=lambda: stop.received is not None)
        return {
            "train_dataset": dataset,
            "sampler": self.sampler(),
            "collate": self._collate,
            "measure": measure,
        }

    def _collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        weighted = self.data.training.is_weighted
        if self.padding_free:
            return end_to_end(examples, weighted=weighted)
        return padded(examples, pad_id=self.tokenizer.pad_token_id, weighted=weighted)

    def _held_out(self, model: Any, **options: Any) -> dict[str, Any] | None:
        with attention.for_batches(model, self.padding_free):
            nats = example_nats(
                model,
                self.data.held_out,
                self.tokenizer,
                self._collate,
                batch_size=self.settings.batch_size,
                **options,
            )
        if nats is None:
            return None
        self.items_measured = example_items(
            self.data.held_out, self.data.held_out_questions, nats, self.tokenizer
        )
        return example_figures(self.data.held_out, nats, self.tokenizer)

    def measure(self, model: Any, observer: Observer, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Held-out loss and the answers to a few held-out questions; empty where nothing is held out."""
        if not self.has_held_out:
            return {"metrics": {}, "answers": []}
        figures = known or self._held_out(model, observer=observer)
        answers = answer_questions(
            model,
            self.tokenizer,
            self.data.questions,
            self.settings.eval_answer_tokens,
            observer,
            self.settings.thinking,
        )
        return {"metrics": figures, "answers": answers}

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        return {"samples": paired_samples(before["answers"], after["answers"])}


class ExampleItems(Sequence[Item]):
    """What the examples of a table put into a batch, for the plan of memory and time."""

    def __init__(self, table: ExampleTable):
        self._lengths, self._targets = table.lengths, table.targets

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return Item((int(self._lengths[index]),), int(self._targets[index]))
