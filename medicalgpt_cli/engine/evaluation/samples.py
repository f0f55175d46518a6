"""A few held-out questions, answered before and after: what a number cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.generation.wire import as_text
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.groups import SamplingSettings


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    observer: Observer,
    thinking: str = "auto",
) -> list[dict[str, str]]:
    """Greedy answers to the first question of each conversation: question, reference and answer.

    Thoughts and calls stand in reference and answer, so that a person sees all that is said.

    Args:
        thinking: whether reasoning is asked for.
    """
    if not conversations:
        return []
    sampling = SamplingSettings(max_new_tokens=max_new_tokens, thinking=thinking)
    backend = LocalBackend(model, tokenizer, sampling, observer)
    rows, prompts = [], []
    for conversation in conversations:
        first = next(
            index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"
        )
        history = conversation.messages[:first]
        prompts.append(backend.prompt(history, conversation.tools))
        rows.append(
            {
                "question": "\n".join(one["content"] for one in history if one["role"] == "user"),
                "reference": as_text(conversation.messages[first]),
            }
        )
    task = "answering held-out questions"
    observer.on_task_start(task, len(rows), "answers")
    done = 0

    def keep(index: int, answer: Any) -> None:
        nonlocal done
        done += 1
        rows[index]["answer"] = as_text(answer.message)
        observer.on_task_advance(task, done)

    backend.answer_batch(prompts, keep)
    observer.on_task_end(task)
    return rows


def paired_samples(before: Sequence[dict[str, str]], after: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The same questions side by side, for the report."""
    return [
        {
            "question": old["question"],
            "reference": old["reference"],
            "before": old["answer"],
            "after": new["answer"],
        }
        for old, new in zip(before, after, strict=True)
    ]
