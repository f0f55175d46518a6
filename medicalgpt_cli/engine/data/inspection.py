"""One look at files before anything is trained on them: what is read of them, and everything that is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.duplicates import Duplicates, Section, find_duplicates, sections_of
from medicalgpt_cli.engine.data.examples import (
    IGNORED,
    Example,
    render_answer,
    render_conversation,
    uncut_lengths,
)
from medicalgpt_cli.engine.data.formats import (
    first_format,
    must_be_text,
    read_all,
    to_conversations,
    to_prompts,
    why_nothing,
)
from medicalgpt_cli.engine.data.language import language_of
from medicalgpt_cli.engine.data.messages import Conversation, Message
from medicalgpt_cli.engine.data.normalised import normalised
from medicalgpt_cli.engine.data.preferences import Pair, audit, audit_notices, margin_of, to_pairs
from medicalgpt_cli.engine.data.readers import Row
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.records import Record, read_record
from medicalgpt_cli.engine.data.rendering import encode_prompt, encode_raw
from medicalgpt_cli.engine.data.report import describe, histogram, percentiles
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, MedgptError, UsageError

Use = Literal["conversations", "pairs", "prompts", "texts"]  # what a record is for
_UNCUT = 10**9
_PLACES = 5  # duplicates that are named


@dataclass
class Item:
    """A record that is of use, and what is made of it."""

    record: Record
    value: dict[str, Any]  # the normalised record
    conversations: list[Conversation] = field(default_factory=list)  # to be learnt, or to be answered
    pairs: list[Pair] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)  # with a tokenizer; of a pair chosen, then rejected

    @property
    def sections(self) -> list[Section]:
        """What it says, by who says it."""
        record = self.record
        if record.text is not None:
            return [("text", record.text)]
        bad = {"marked as bad": "yes"} if record.label is False else {}
        answers = {f"answer {number}": text for number, text in enumerate(record.answers, 1)}
        return sections_of(record.messages, **answers, **bad)

    @property
    def identity(self) -> list[tuple[str, Any]]:
        """What makes two records the same: all but their names."""
        return sorted((key, value) for key, value in self.value.items() if key not in ("id", "group"))


@dataclass(frozen=True)
class Inspection:
    """What `medgpt data` shows. Lengths are uncut; what --max-length would cut is in the counts."""

    report: dict[str, Any]  # plain data without any text of a record
    items: list[Item]
    duplicates: Duplicates
    problem: MedgptError | None  # what has to be mended before the files can be used


def inspect(
    sources: Sequence[str],
    counts: Counts,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    observer: Observer,
    *,
    text_unit: str = "auto",
    margin_column: str | None = None,
    thinking: Thinking = "auto",
) -> Inspection:
    """Read files of any format and measure them, in tokens or (without a tokenizer) in characters.

    What most records are for (to be learnt, compared, asked, or plain text) decides what all are read for; a record
    that cannot be read so is wrong, as it would be in training.

    Args:
        counts: empty ones, with the rules by which the files are read.

    Raises:
        DataError: a file is missing, or cannot be read at all.
    """
    counts.keep_going = True
    used = () if margin_column is None else (margin_column,)

    def make(row: Row) -> list[tuple[Record, Row]]:
        record = read_record(row, counts, used=used)
        return [] if record is None else [(record, row)]

    is_text = _is_text(sources, counts)
    found = list(read_all(sources, counts, observer, make, text_unit=text_unit, with_documents=is_text))
    uses = Counter(_use_of(record) for record, _ in found)
    use: Use = uses.most_common(1)[0][0] if uses else "conversations"
    items = []
    for record, row in found:
        try:
            item = _item(record, row, use, counts, margin_column)
        except DataError as problem:
            counts.add_wrong(problem)
        else:
            items += [] if item is None else [item]
    if use == "conversations" and uses["pairs"]:
        counts.notices.append(f"{uses['pairs']:,} records are pairs: of these, the chosen answer is learnt")
    lengths = _measure(items, use, tokenizer, max_length, thinking, counts, observer)
    duplicates = find_duplicates(
        [item.identity for item in items], [item.sections for item in items], observer
    )
    report = _report(items, use, uses, counts, tokenizer, max_length, sorted(lengths))
    report["duplicates"] = _describe_duplicates(items, duplicates)
    return Inspection(report, items, duplicates, _problem(sources, items, counts))


def _is_text(sources: Sequence[str], counts: Counts) -> bool:
    """Whether the files are read for their text, so that documents are of use, too."""
    try:
        return first_format(sources, counts.reading) == "text"
    except DataError:
        return False  # said, with all else that is wrong, when the files are read


def _use_of(record: Record) -> Use:
    if record.kind == "text":
        return "texts"
    if record.answers:
        return "pairs"
    answered = any(one["role"] == "assistant" for one in record.messages)
    if record.kind == "prompt" or not answered:
        return "prompts"
    return "prompts" if record.kind == "mcq" and record.messages[-1]["role"] == "user" else "conversations"


def _item(record: Record, row: Row, use: Use, counts: Counts, margin_column: str | None) -> Item | None:
    """What is made of a record, as training makes it; None where that is nothing, which is counted.

    An answer that is marked as bad is kept, although sft learns nothing of it.

    Raises:
        DataError: it is of no such use.
    """
    margin = margin_of(row, margin_column) if margin_column else None
    item = Item(record, normalised(record, margin))
    if use == "texts":
        must_be_text(record.kind, record.at)
        if record.text is None or not record.text.strip():
            counts.add_skip("no text", record.at)
            return None
        return item
    if use == "pairs":
        item.pairs = to_pairs(record, row, counts, margin_column)
    else:
        item.conversations = (
            to_conversations(record, row, counts) if use == "conversations" else to_prompts(record, counts)
        )
    kept = item.pairs or item.conversations or (use == "conversations" and record.label is False)
    return item if kept else None


# -- lengths -----------------------------------------------------------------------------------------------


def _measure(
    items: Sequence[Item],
    use: Use,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    thinking: Thinking,
    counts: Counts,
    observer: Observer,
) -> list[int]:
    """The length of each text, prompt, conversation or compared answer; with a tokenizer items get their examples."""
    if tokenizer is None:
        return [length for item in items for length in _characters(item)]
    task = "tokenising"
    observer.on_task_start(task, len(items), "records")
    lengths: list[int] = []
    for number, item in enumerate(items, 1):
        if use == "texts":
            lengths.append(len(encode_raw(tokenizer, item.record.text or "")))
        elif use == "prompts":
            lengths += [
                len(encode_prompt(tokenizer, one.messages, one.tools, thinking)) for one in item.conversations
            ]
        elif use == "pairs":
            lengths += _encode_pairs(item, tokenizer, counts)
        else:
            for one in item.conversations:
                lengths += uncut_lengths(tokenizer, one, thinking)
                item.examples += render_conversation(tokenizer, one, max_length, counts, thinking)
        if number % 50 == 0:
            observer.on_task_advance(task, number)
    observer.on_task_end(task)
    return lengths


def _encode_pairs(item: Item, tokenizer: PreTrainedTokenizerBase, counts: Counts) -> list[int]:
    """Gives the item an example for both answers of each pair, behind their prompt. Returns: their lengths."""
    lengths: list[int] = []
    for pair in item.pairs:
        sides: list[Example] = []
        for answer in (pair.chosen, pair.rejected):
            try:
                rendered = render_answer(tokenizer, pair.messages, answer, _UNCUT, pair.tools)
            except UsageError as problem:
                if not tokenizer.chat_template:
                    raise
                counts.add_skip(problem.message, pair.at)
                break
            if rendered is not None:
                prompt, target = rendered
                sides.append(Example(prompt + target, [IGNORED] * len(prompt) + target, pair.at, pair.id))
        if len(sides) == 2:
            item.examples += sides
            lengths += [len(side.input_ids) for side in sides]
    return lengths


def _characters(item: Item) -> list[int]:
    if item.record.text is not None:
        return [len(item.record.text)]
    if item.pairs:
        return [
            _spoken(pair.messages) + len(answer)
            for pair in item.pairs
            for answer in (pair.chosen, pair.rejected)
        ]
    return [_spoken(one.messages) for one in item.conversations]


def _spoken(messages: Sequence[Message]) -> int:
    return sum(len(one["content"]) + len(one.get("reasoning", "")) for one in messages)


# -- the report --------------------------------------------------------------------------------------------


def _report(
    items: Sequence[Item],
    use: Use,
    uses: Counter[Use],
    counts: Counts,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    lengths: Sequence[int],
) -> dict[str, Any]:
    pairs = [pair for item in items for pair in item.pairs]
    audited = audit(pairs) if pairs else None
    if audited:
        counts.notices += audit_notices(audited)
    examples = [] if use == "pairs" else [one for item in items for one in item.examples]
    report = (
        {**counts.as_dict(), "max_length": None}
        if tokenizer is None
        else describe(examples, counts, tokenizer, max_length)
    )
    languages = Counter(language_of("\n".join(text for _, text in item.sections)) for item in items)
    groups = [item.record.group for item in items if item.record.group is not None]
    return report | {
        "use": use,
        "uses": dict(uses),
        "unit": "tokens" if tokenizer else "characters",
        "total_length": sum(lengths),
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
        "longer": sum(length > max_length for length in lengths) if tokenizer else None,
        "holds": {name: number for name, number in _holds(items).items() if number},
        "languages": dict(languages.most_common()),
        "groups": {"records": len(groups), "groups": len(set(groups))} if counts.group else None,
        "documents": len(items) if use == "texts" else 0,
        "prompts": sum(len(item.conversations) for item in items) if use == "prompts" else 0,
        "pairs": len(pairs),
        "audit": audited,
        "wrong_total": counts.wrong_total,
        "wrong": [{"message": one.message, "hint": one.hint} for one in counts.wrong],
    }


def _holds(items: Sequence[Item]) -> dict[str, int]:
    """How many records have something beside plain turns."""
    held: Counter[str] = Counter()
    for item in items:
        record = item.record
        turns = record.messages
        weights = [one["weight"] for one in turns if "weight" in one]
        held["system message"] += any(one["role"] == "system" for one in turns)
        held["several exchanges"] += sum(one["role"] == "user" for one in turns) > 1
        held["tools"] += bool(record.tools)
        held["calls of tools"] += any("tool_calls" in one for one in turns)
        held["reasoning"] += any("reasoning" in one for one in turns)
        held["turns that are context only (weight 0)"] += 0 in weights
        held["turns with another weight"] += any(weights)
        held["options"] += record.options is not None
        held["right options"] += bool(record.key)
        held["more than two answers"] += len(record.answers) > 2
        held["an answer marked as good"] += record.label is True
        held["an answer marked as bad"] += record.label is False
    return held


def _describe_duplicates(items: Sequence[Item], found: Duplicates) -> dict[str, Any]:
    def places(of: dict[int, int]) -> list[list[str]]:
        return [[items[one].record.at, items[first].record.at] for one, first in [*of.items()][:_PLACES]]

    return {
        "exact": len(found.exact),
        "near": None if found.note else len(found.near),
        "note": found.note,
        "exact_places": places(found.exact),
        "near_places": places(found.near),
    }


def _problem(sources: Sequence[str], items: Sequence[Item], counts: Counts) -> MedgptError | None:
    if counts.wrong_total:
        word = "record is" if counts.wrong_total == 1 else "records are"
        return DataError(
            f"{counts.wrong_total:,} {word} wrong, the first at {counts.wrong[0].message}",
            counts.wrong[0].hint,
        )
    try:
        counts.check()
    except DataError as problem:
        return problem
    if not items:
        return DataError(f"{', '.join(sources)}: no record of use", why_nothing(counts))
    return None
