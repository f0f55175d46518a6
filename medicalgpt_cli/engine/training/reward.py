"""A reward model from pairs of answers: Bradley-Terry, both answers in one forward pass."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medicalgpt_cli.engine.data.mixing import passes_over
from medicalgpt_cli.engine.evaluation.preferences import judge, pair_items, score_pairs
from medicalgpt_cli.engine.model.dropout import use_fast_dropout
from medicalgpt_cli.engine.model.reward_model import new_reward_model, write_record
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.batches import Item
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.engine.run.files import private_folder
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.engine.training import attention, together
from medicalgpt_cli.engine.training.batches import IGNORED, EpochSampler
from medicalgpt_cli.engine.training.callbacks import StopOnSignal
from medicalgpt_cli.engine.training.loop import Stage
from medicalgpt_cli.engine.training.preference_loss import bradley_terry_loss
from medicalgpt_cli.engine.training.reward_data import (
    PairDataset,
    PairLayout,
    RewardData,
    load_reward_data,
    pair_batch,
    pair_layout,
)
from medicalgpt_cli.engine.training.trainer import MedgptTrainer
from medicalgpt_cli.engine.training.tuning import keep_shape, refuse_half_precision
from medicalgpt_cli.settings.stages import RewardSettings


class RewardTrainer(MedgptTrainer):
    unit = "pairs"

    def __init__(self, *, centring: float, **parts: Any):
        """
        Args:
            centring: weight of the term that holds scores near 0 (`bradley_terry_loss`).
        """
        super().__init__(**parts)
        self.centring = centring
        self.differences: list[float] = []  # of the scores, since the last log step

    def batch_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the pairs' losses."""
        batch = {name: value for name, value in inputs.items() if name not in ("labels", "margins")}
        chosen, rejected = model(**batch).logits.chunk(2)
        if (inputs["labels"] != IGNORED).all():
            self.differences += (chosen - rejected).tolist()
        return bradley_terry_loss(chosen, rejected, inputs["margins"], self.centring) * len(chosen)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            seen = [one for part in together.from_all(self.differences) for one in part]
            self.differences = []
            if seen:
                logs["accuracy"] = sum(one > 0 for one in seen) / len(seen)
                logs["margin"] = sum(seen) / len(seen)
        super().log(logs, start_time)


class RewardStage(Stage):
    name = "reward"
    trainer = RewardTrainer
    settings: RewardSettings
    data: RewardData
    lay: PairLayout  # known together with `padding_free`

    def load_data(self, observer: Observer) -> RewardData:
        return load_reward_data(self.settings, self.tokenizer, observer)

    @property
    def examples(self) -> int:
        return len(self.data.mix)

    @property
    def has_held_out(self) -> bool:
        return bool(self.data.held_out)

    def facts(self) -> dict[str, Any]:
        """Pairs, and the tokens of the whole run."""
        passes = self.schedule.updates / self.schedule.updates_per_epoch
        return {
            "pairs": len(self.data.training),
            "held_out_pairs": len(self.data.held_out),
            "tokens": round(
                sum(one["tokens"] * one["passes_an_epoch"] for one in self.data.mix.rows) * passes
            ),
            **passes_over(self.data.mix.rows, passes),
        }

    def load(self, observer: Observer) -> Any:
        if self.resolved.adapter is not None and self.settings.tuning == "lora":
            keep_shape(self.settings, Path(self.resolved.adapter.path), observer)
        refuse_half_precision(self.settings)
        model = new_reward_model(self.settings, self.resolved, observer)
        if next(model.parameters()).device.type == "cpu":
            use_fast_dropout(model)
        return model

    def keeps_apart(self, model: Any, observer: Observer) -> bool:
        apart = super().keeps_apart(model, observer)
        self.lay = pair_layout(model, apart, self.tokenizer.pad_token_id)
        return apart

    def batch_items(self) -> list[Item]:
        return [Item((len(one.chosen), len(one.rejected)), 2, one.shared) for one in self.data.training]

    def sampler(self) -> EpochSampler:
        settings = self.settings
        return EpochSampler(
            PairDataset(self.data.training).lengths,
            settings.batch_size * processes.size(),
            settings.seed,
            by_length=settings.batch_order == "by-length",
            draw=self.data.mix.sampler(settings.seed),
        )

    def trainer_parts(self, model: Any, stop: StopOnSignal) -> dict[str, Any]:
        dataset, settings = PairDataset(self.data.training), self.settings
        measure = partial(self._held_out, model, should_stop=lambda: stop.received is not None)
        return {
            "train_dataset": dataset,
            "sampler": self.sampler(),
            "collate": lambda pairs: pair_batch(pairs, lay=self.lay),
            "measure": measure,
            "centring": settings.centring,
        }

    def _held_out(self, model: Any, **options: Any) -> dict[str, Any] | None:
        pairs = self.data.held_out
        with attention.for_batches(model, self.padding_free):
            found = score_pairs(model, pairs, self.lay, batch_size=self.settings.batch_size, **options)
        if found is None:
            return None
        scores = [*found[0], *found[1]]
        margins = [pair.margin for pair in pairs]
        sources, prompts = [pair.source for pair in pairs], [pair.prompt for pair in pairs]
        figures = judge(*found, margins, [pair.longer_chosen for pair in pairs], sources, prompts)
        self.items_measured = pair_items(*found, margins, sources, prompts)
        mean = sum(scores) / len(scores)
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
        return {**figures, "score_mean": mean, "score_spread": spread}

    def measure(self, model: Any, observer: Observer, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """Accuracy, margin and calibration on held-out pairs; empty where nothing is held out."""
        if not self.has_held_out:
            return {"metrics": {}}
        return {"metrics": known or self._held_out(model, observer=observer)}

    def save(self, model: Any, folder: RunFolder, after: dict[str, Any]) -> None:
        record = {
            "format": 1,
            "head_trained": True,
            "trained_on": self.data.prompts,
        }
        private_folder(folder.new_model)
        write_record(folder.new_model, record)
        super().save(model, folder, after)
