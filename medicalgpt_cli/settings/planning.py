"""What is asked of a plan, beside the settings of the stage that is planned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import opt
from medicalgpt_cli.settings.groups import Settings
from medicalgpt_cli.settings.stages import (
    InferSettings,
    PretrainSettings,
    RewardSettings,
    RlSettings,
    SftSettings,
)

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """Where and how fast."""

    panel: ClassVar[str] = "Plan"

    plan_for: str = opt(
        "here",
        "Plan for the device that is here, for a GPU, or for a processor.",
        choices=("here", "gpu", "cpu"),
    )
    device_memory: str | None = opt(
        None, "What one device has, 24GB or 24GiB; what is free here where not given.", metavar="SIZE"
    )
    throughput: str | None = opt(
        None,
        "How fast it goes: tokens a second, or the folder of an earlier run. Where not given, products of this "
        "model's width are measured here for two seconds, and the time is a lower bound.",
        metavar="N|RUN",
    )

    # Of the stage, and no option of its plan: nothing is written, nothing goes on.
    FIXED: ClassVar[tuple[str, ...]] = ("dry_run",)
    dry_run: bool = True

    def check(self) -> None:
        super().check()
        if self.device_memory is not None and self.device_bytes is None:
            raise UsageError(f"--device-memory {self.device_memory}: not a size", "for example 24GB or 80GiB")
        speed = self.tokens_a_second
        if speed is not None and not 0 < speed < float("inf"):
            raise UsageError(f"--throughput {self.throughput}: out of range", "allowed: above 0")

    @property
    def device_bytes(self) -> int | None:
        """`--device-memory` in bytes: GB are powers of 1000, GiB of 1024."""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT])(i?)B", self.device_memory or "", re.IGNORECASE)
        if found is None:
            return None
        return round(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()]) or None

    @property
    def tokens_a_second(self) -> float | None:
        """`--throughput` where it is a number."""
        try:
            return float(self.throughput) if self.throughput else None
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class PlanTrainSettings(PlanSettings):
    """What is asked about a training stage."""

    devices: int | None = opt(
        None,
        "For how many devices the table of DDP, ZeRO and FSDP is made; 2, 4 and 8 where not given.",
        min=2,
    )

    FIXED: ClassVar[tuple[str, ...]] = (
        "dry_run", "output_dir", "resume", "force", "report_to", "group_readable", "accept_other_base",
    )  # fmt: skip
    output_dir: Path | None = None
    resume: Path | None = None
    force: bool = False
    report_to: tuple[str, ...] = ()
    group_readable: bool = False
    accept_other_base: bool = False

    def check(self) -> None:
        super().check()
        if getattr(self, "accelerate_config", None):
            raise UsageError(
                "--accelerate-config is not for a plan", "--parallel zero3 --processes 8 say what it decides"
            )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanPretrainSettings(PlanTrainSettings, PretrainSettings):
    """Memory and time of `medgpt pretrain`, from its settings and data, without weights."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanSftSettings(PlanTrainSettings, SftSettings):
    """Memory and time of `medgpt sft`, from its settings and data, without weights."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanRewardSettings(PlanTrainSettings, RewardSettings):
    """Memory and time of `medgpt reward`, from its settings and data, without weights."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanRlSettings(PlanTrainSettings, RlSettings):
    """Memory and time of `medgpt rl`, from its settings and data, without weights."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanInferSettings(PlanSettings, InferSettings):
    """Memory and time of `medgpt infer`, from its settings and questions, without weights."""

    FIXED: ClassVar[tuple[str, ...]] = (
        "dry_run", "predictions_file", "resume", "overwrite", "interactive", "force", "endpoint", "endpoint_model",
        "endpoint_key_file", "accept_other_base",
    )  # fmt: skip
    throughput: str | None = opt(
        None,
        "Tokens of answers a second, as infer says them. Where not given, products of this model's width are measured "
        "here for two seconds, and the time is a lower bound.",
        metavar="N",
    )
    predictions_file: str | None = "predictions.jsonl"
    resume: bool = False
    overwrite: bool = False
    interactive: bool = False
    force: bool = False
    endpoint: str | None = None
    endpoint_model: str | None = None
    endpoint_key_file: Path | None = None
    accept_other_base: bool = False

    def check(self) -> None:
        if not self.data_file:
            raise UsageError("--data-file is missing", "name a file of questions")
        super().check()
        if self.throughput is not None and self.tokens_a_second is None:
            raise UsageError(
                f"--throughput {self.throughput}: not a number",
                "tokens of answers a second, as infer says them",
            )
