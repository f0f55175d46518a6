"""The data of an instruction-tuning run: read, split, rendered to tokens, counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import Example, render_conversation
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.reading import reading_options
from medicalgpt_cli.engine.data.report import describe, fingerprint
from medicalgpt_cli.engine.data.splitting import prompt_key, split, without_held_out
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.stages import SftSettings


@dataclass(frozen=True)
class SftData:
    training: list[Example]
    held_out: list[Example]
    held_out_questions: list[int]  # which question each of them is about
    questions: list[Conversation]  # held-out conversations, to be answered before and after
    report: dict[str, Any]  # counts and lengths, for the screen and run.json
    fingerprints: dict[str, str]  # of the token ids and masks of both parts


def load_sft_data(settings: SftSettings, tokenizer: PreTrainedTokenizerBase, observer: Observer) -> SftData:
    """Read `--train-data` and what is held out, and turn both into examples.

    Raises:
        DataError: nothing is left to train on.
    """
    reading = reading_options(settings, [*settings.train_data, *settings.eval_data])
    counts, held_counts = Counts(reading=reading), Counts(reading=reading)
    training = load_conversations(settings.train_data, counts, observer, max_samples=settings.max_samples)
    if settings.eval_data:
        held = load_conversations(settings.eval_data, held_counts, observer)
        training = without_held_out(training, held, counts)
    else:
        training, held = split(training, settings.eval_fraction, settings.seed)
        held_counts.read, held_counts.formats = len(held), counts.formats
        counts.read -= len(held)

    def render(conversations: list[Conversation], into: Counts, task: str) -> tuple[list[Example], list[int]]:
        """The examples, and for each the number of its question."""
        examples: list[Example] = []
        questions: list[int] = []
        numbers: dict[str, int] = {}
        observer.on_task_start(task, len(conversations), "conversations")
        for number, conversation in enumerate(conversations, 1):
            examples += render_conversation(
                tokenizer, conversation, settings.max_length, into, settings.thinking
            )
            question = numbers.setdefault(prompt_key(conversation), len(numbers))
            questions += [question] * (len(examples) - len(questions))
            if number % 50 == 0 or number == len(conversations):
                observer.on_task_advance(task, number)
        observer.on_task_end(task)
        return examples, questions

    examples, _ = render(training, counts, "tokenising training data")
    held_examples, held_questions = render(held, held_counts, "tokenising held-out data")
    if not examples:
        raise DataError(
            "no training example is left",
            "`medgpt data` on the same files shows what was skipped and why",
        )
    return SftData(
        training=examples,
        held_out=held_examples,
        held_out_questions=held_questions,
        questions=held[: settings.eval_questions],
        report={
            "training": describe(examples, counts, tokenizer, settings.max_length),
            "held_out": describe(held_examples, held_counts, tokenizer, settings.max_length),
        },
        fingerprints={"training": fingerprint(examples), "held_out": fingerprint(held_examples)},
    )
