"""What a set of examples is like, in numbers: for the screen, for run.json and for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, Example, render_conversation, uncut_lengths
from medicalgpt_cli.engine.data.formats import first_format, load_conversations, load_prompts, load_texts
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.rendering import encode_prompt, encode_raw
from medicalgpt_cli.engine.observer import Observer


def describe(
    examples: Sequence[Example], counts: Counts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Counts by reason, formats, and lengths in tokens with their percentiles and a histogram."""
    lengths = [len(example.input_ids) for example in examples]
    targets = sum(label != IGNORED for example in examples for label in example.labels[1:])
    return {**counts.as_dict(), **figures(lengths, targets, max_length)}


def figures(lengths: Iterable[int], targets: int, max_length: int) -> dict[str, Any]:
    """What the lengths of examples say."""
    ordered = sorted(lengths)
    return {
        "examples": len(ordered),
        "tokens": sum(ordered),
        "target_tokens": targets,
        "max_length": max_length,
        "lengths": percentiles(ordered),
        "histogram": histogram(ordered),
    }


_ADDED = ("skipped", "merged", "truncated")  # counts by reason
_PLACES = 5  # that are kept of each reason


def merged_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of several sources (`Counts.as_dict`) as one."""
    found: dict[str, Any] = {
        "read": 0,
        "used": 0,
        "tokens_cut": 0,
        "formats": {},
        "notices": [],
        "places": {},
    }
    found |= {name: {} for name in _ADDED}
    unused: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        for name in ("read", "used", "tokens_cut"):
            found[name] += part.get(name, 0)
        for name in _ADDED:
            for reason, number in part.get(name, {}).items():
                found[name][reason] = found[name].get(reason, 0) + number
        found["formats"] |= part["formats"]
        found["notices"] += part["notices"]
        for reason, places in part["places"].items():
            found["places"][reason] = [*found["places"].get(reason, []), *places][:_PLACES]
        for one in part.get("unused", []):
            key = (one["key"], one["where"], one["meaning"], one["accepted"])
            before = unused.get(key, {"records": 0})["records"]
            unused[key] = {**one, "records": before + one["records"]}
    found["unused"] = sorted(unused.values(), key=lambda one: (-one["records"], one["where"], one["key"]))
    return found


@dataclass(frozen=True)
class Inspection:
    """What `medgpt data` shows. Lengths are uncut; what --max-length would cut is in the counts."""

    report: dict[str, Any]
    conversations: list[Conversation]  # none for plain text
    examples: list[Example]  # none without a tokenizer, and where there is no answer to learn


def inspect(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    observer: Observer,
    *,
    reading: ReadOptions = AS_FOUND,
    thinking: Thinking = "auto",
) -> Inspection:
    """Read files of any format and measure them, in tokens or (without a tokenizer) in characters.

    Raises:
        DataError: what is wrong with a file.
    """
    counts = Counts(reading=reading)
    kind = first_format(sources, reading)
    conversations: list[Conversation] = []
    examples: list[Example] = []
    if kind == "text":
        texts = load_texts(sources, counts, observer)
        lengths = [len(encode_raw(tokenizer, text) if tokenizer else text) for text in texts]
    elif kind in ("prompt", "mcq"):
        conversations = load_prompts(sources, counts, observer)
        lengths = [_prompt_length(one, tokenizer, thinking) for one in conversations]
    else:
        conversations = load_conversations(sources, counts, observer)
        if tokenizer is None:
            lengths = [_prompt_length(one, None, thinking) for one in conversations]
        else:
            lengths = [length for c in conversations for length in uncut_lengths(tokenizer, c, thinking)]
            examples = [
                one
                for c in conversations
                for one in render_conversation(tokenizer, c, max_length, counts, thinking)
            ]
    if tokenizer is not None:
        report = describe(examples, counts, tokenizer, max_length)
    else:
        report = {**counts.as_dict(), "max_length": None}
    lengths.sort()
    report |= {
        "unit": "tokens" if tokenizer else "characters",
        "total_length": sum(lengths),
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
        "longer": sum(length > max_length for length in lengths) if tokenizer else None,
    }
    return Inspection(report, conversations, examples)


def _prompt_length(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None, thinking: Thinking
) -> int:
    if tokenizer is None:
        return sum(len(one["content"]) for one in conversation.messages)
    return len(encode_prompt(tokenizer, conversation.messages, conversation.tools, thinking))


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 90th and 99th percentile and largest of sorted lengths; empty without any."""
    if not lengths:
        return {}

    def at(share: float) -> int:
        return lengths[min(int(share * len(lengths)), len(lengths) - 1)]

    return {"min": lengths[0], "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": lengths[-1]}


def histogram(lengths: Sequence[int], bins: int = 12) -> list[dict[str, int]]:
    """Bars of equal width: {"from", "to", "count"}, `to` included."""
    if not lengths:
        return []
    width = max(-(-(max(lengths) + 1) // bins), 1)
    counts = [0] * bins
    for length in lengths:
        counts[length // width] += 1
    bars = [{"from": i * width, "to": (i + 1) * width - 1, "count": count} for i, count in enumerate(counts)]
    while bars and bars[-1]["count"] == 0:
        bars.pop()
    return bars
