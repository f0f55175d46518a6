"""The plan of `medgpt infer`: weights, the cache of keys and values, and what a batch of questions needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt_cli.engine.generation.batching import batches_by_length
from medicalgpt_cli.engine.generation.helpers import even_batch_size
from medicalgpt_cli.engine.generation.infer import LocalModel, Refused
from medicalgpt_cli.engine.generation.local import context_length
from medicalgpt_cli.engine.generation.questions import counts_of_questions, read_questions
from medicalgpt_cli.engine.model.loading import choose_device
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning import device, plan, work
from medicalgpt_cli.engine.planning.needs import SLACK_ON_GPU, Planned, cache_of
from medicalgpt_cli.engine.planning.rehearsal import Manner, Rows, rehearse
from medicalgpt_cli.engine.planning.skeleton import build, outline
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.planning import PlanInferSettings

# A cache that grows by a token never fits into the hole that it leaves. Fitted on a processor (docs/planning.md).
_HOLES_ON_CPU = 0.5


@dataclass(frozen=True)
class Answers(Planned):
    """All that the memory of answering follows from."""

    lengths: Sequence[int]  # of the prompts, in tokens
    limit: int  # new tokens of an answer at most
    context: int
    on_gpu: bool
    program: int
    file: int

    def new_tokens(self, prompt: int) -> int:
        return min(self.limit, self.context - prompt)

    def needs(self, rows: Sequence[int]) -> dict[str, int]:
        """Bytes by part while prompts of these lengths are answered; "peak" is their sum, or what loading takes."""
        weights = self.parameters.base_bytes + self.parameters.adapter_bytes
        drawn = Rows(tuple(rows), 0, True)
        cache = cache_of(self.outline, drawn, self.new_tokens(max(rows)))
        # One layer's keys are there twice as they grow.
        batch = max(rehearse(self.outline, drawn, Manner("answer")).peak, cache.largest)
        found = {
            "program": self.program,
            "frozen": weights,
            "cache": cache.total,
            "batch": batch,
            "slack": round((SLACK_ON_GPU if self.on_gpu else _HOLES_ON_CPU) * (batch + cache.total)),
        }
        loading = self.program + weights + (0 if self.on_gpu else self.file)
        return {**found, "peak": max(sum(found.values()), loading), "loading": loading}

    def largest_batch(self, room: int) -> int | None:
        """How many of the longest prompts fit together into `room` bytes; None where not even one does."""
        longest = sorted(self.lengths, reverse=True)
        low, high = 0, len(longest)  # as many fit; no more than as many can be asked for
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needs(longest[:middle])["peak"] <= room else (low, middle - 1)
        return low or None


def plan_of_answers(settings: PlanInferSettings, observer: Observer) -> dict[str, Any]:
    """All that `medgpt plan infer` shows and `--json` prints: sizes in bytes, times in seconds.

    Raises:
        UsageError: no question can be answered, or the model's memory is not known from its shapes.
    """
    model = LocalModel(settings, observer)
    prompts = [
        model.prompt(question)
        for question in read_questions(settings.data_file, counts_of_questions(settings))
    ]
    here = choose_device(settings)
    on_gpu = device.for_gpu(settings, here)
    shapes = outline(
        model.resolved, device.dtype_for(settings, here, on_gpu), quantization=settings.quantization
    )
    with plan.explained(model.resolved):
        context = context_length(build(shapes), settings)
        lengths = [len(one) for one in prompts if not isinstance(one, Refused) and 0 < len(one) < context]
        if not lengths:
            raise UsageError(
                f"{settings.data_file}: no question fits into the context of {context:,} tokens and the template",
                "ask shorter ones, or leave out --max-context",
            )
        program, file = device.program_bytes(on_gpu), device.file_bytes(model.resolved)
        answers = Answers(shapes, lengths, settings.max_new_tokens, context, on_gpu, program, file)
        size = even_batch_size(len(lengths), settings.batch_size, settings.wanted_processes)
        batches = [[lengths[place] for place in places] for places in batches_by_length(lengths, size)]
        largest = max(batches, key=lambda rows: len(rows) * (max(rows) + answers.new_tokens(max(rows))))
        memory = answers.needs(largest)
        have = settings.device_bytes or device.device_memory(settings, on_gpu)
        return {
            "stage": "infer",
            "model": model.resolved.label,
            "device": "gpu" if on_gpu else "cpu",
            "devices": settings.wanted_processes,
            "dtype": str(shapes.dtype).removeprefix("torch."),
            "quantization": shapes.quantization,
            "parameters": answers.parameters.total,
            "memory": memory,
            "batch": {
                "rows": len(largest),
                "tokens": len(largest) * max(largest),
                "longest": max(largest),
                "new_tokens": answers.new_tokens(max(largest)),
            },
            "device_memory": have,
            "fits": None if have is None else memory["peak"] <= have,
            "largest_batch": None if have is None else answers.largest_batch(have),
            "batch_flag": "--batch-size",
            "questions": len(prompts),
            "examples": len(lengths),
            "cannot_be_answered": len(prompts) - len(lengths),
            "tokens": sum(lengths),
            **_amount(settings, answers, batches),
        }


def _amount(settings: PlanInferSettings, answers: Answers, batches: list[list[int]]) -> dict[str, Any]:
    """Tokens of all answers at their longest, what they cost, and how long that takes."""
    shape, tokens, flops = work.shape_of(answers.skeleton), 0, 0.0
    for prompt in answers.lengths:
        new = answers.new_tokens(prompt)
        tokens += new
        flops += work.forward(shape, prompt + new, (prompt + new) ** 2, new)
    found = {"answer_tokens": tokens, "flops": flops}
    if (speed := settings.tokens_a_second) is not None:
        return {**found, "time": {"seconds": tokens / speed, "source": "given"}}
    here = choose_device(settings)
    if answers.on_gpu != (here.type == "cuda"):
        return {**found, "time": {"seconds": None, "source": "no such device here to measure on"}}
    width, rows = (
        answers.outline.config.get_text_config().hidden_size,
        max(map(len, batches)) * max(answers.lengths),
    )
    speed = work.speed_here(width, rows, answers.outline.dtype, here)
    seconds = flops / speed / settings.wanted_processes
    return {**found, "time": {"seconds": seconds, "source": "measured products", "flops_a_second": speed}}
