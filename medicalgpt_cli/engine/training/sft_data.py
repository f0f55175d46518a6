"""The data of an instruction-tuning run: read, split, rendered to tokens, mixed, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.example_table import ExampleTable, Part, side_counts
from medicalgpt_cli.engine.data.formats import Conversation, Counts, iterate_conversations, why_nothing
from medicalgpt_cli.engine.data.mixing import Source, check_weights, parse_source, shares_of
from medicalgpt_cli.engine.data.packing import Mix, mix
from medicalgpt_cli.engine.data.report import figures, merged_counts
from medicalgpt_cli.engine.data.splitting import held_out
from medicalgpt_cli.engine.data.tokenising import Rendering, content_hash, tokenised
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.environment import cache_folder
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.stages import SftSettings


@dataclass(frozen=True)
class SftData:
    training: ExampleTable
    held_out: ExampleTable
    held_out_questions: list[int]  # which question each of them is about
    questions: list[Conversation]  # held-out conversations, to be answered before and after
    report: dict[str, Any]  # counts and lengths, for the screen and run.json
    fingerprints: dict[str, str]  # of the token ids and losses of both parts
    mix: Mix  # what an epoch takes of each source


def load_sft_data(settings: SftSettings, tokenizer: PreTrainedTokenizerBase, observer: Observer) -> SftData:
    """Read `--train-data` and what is held out, and turn both into examples.

    Raises:
        DataError: nothing is left to train on. UsageError: some sources have a weight and others none.
    """
    sources = [parse_source(text) for text in settings.train_data]
    check_weights(sources)
    rendering = Rendering(tokenizer, settings.max_length)
    notices: list[str] = []
    shares = shares_of(settings.max_samples, sources, _usable, notices)
    parts = _read(sources, rendering, shares, observer)
    own = [Source(name) for name in settings.eval_data]
    held_parts = _read(own, rendering, None, observer) if own else parts
    asked = [part.conversations["question"] for part in parts]
    if own:
        measured = np.concatenate([part.conversations["question"] for part in held_parts])
        out = [np.isin(one, measured) for one in asked]
        held = [np.ones(len(part.conversations), dtype=bool) for part in held_parts]
    else:
        whole = held_out(np.concatenate(asked), settings.eval_fraction, settings.seed)
        out = held = np.split(whole, np.cumsum([len(one) for one in asked])[:-1])
    training, testing = _table(parts, [~one for one in out]), _table(held_parts, held)
    if not len(training):
        raise DataError(
            "no training example is left", "`medgpt data` on the same files shows what was skipped and why"
        )
    mixed = mix(sources, training.sizes, training.tokens_of_parts(), "examples")
    counts = _training_counts(parts, out, bool(own))
    counts["notices"] += [*notices, *_repeated(parts)]
    return SftData(
        training=training,
        held_out=testing,
        held_out_questions=testing.questions,
        questions=_questions(own or sources, held_parts, held, settings.eval_questions),
        report={
            "training": counts | _figures(training, settings),
            "held_out": _held_out_counts(held_parts, held, bool(own)) | _figures(testing, settings),
            "sources": mixed.told,
        },
        fingerprints={"training": training.fingerprint(), "held_out": testing.fingerprint()},
        mix=mixed,
    )


def _usable(name: str, most: int) -> int:
    """How many conversations a file has, counted up to a number."""
    return sum(1 for _ in iterate_conversations([name], Counts(), Observer(), most=most))


def _read(
    sources: Sequence[Source], rendering: Rendering, shares: dict[str, int] | None, observer: Observer
) -> list[Part]:
    """The examples of each source.

    Raises:
        DataError: none of them has a conversation.
    """

    def read(name: str) -> Part:
        counts = Counts()
        conversations = iterate_conversations([name], counts, observer, shares=shares)
        return tokenised(name, rendering, conversations, counts, {"shares": shares}, cache_folder(), observer)

    parts = [read(source.name) for source in sources]
    if not any(len(part.conversations) for part in parts):
        skipped = Counter(merged_counts([part.counts for part in parts])["skipped"])
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{names}: no conversation to learn from", why_nothing(Counts(skipped=skipped)))
    return parts


def _table(parts: Sequence[Part], sides: Sequence[np.ndarray]) -> ExampleTable:
    """The examples of some conversations of each part."""
    chosen = [
        np.flatnonzero(side[part.examples["conversation"]]) for part, side in zip(parts, sides, strict=True)
    ]
    return ExampleTable(parts, chosen)


def _questions(
    sources: Sequence[Source], parts: Sequence[Part], held: Sequence[np.ndarray], most: int
) -> list[Conversation]:
    """The first held-out conversations, read again: a table does not tell what was said."""
    found: list[Conversation] = []
    for source, part, side in zip(sources, parts, held, strict=True):
        wanted = Counter(
            (part.at(int(number)), int(part.conversations["content"][number]))
            for number in np.flatnonzero(side)[: most - len(found)]
        )
        if not wanted:
            continue
        files = dict.fromkeys(at.rpartition(":")[0] for at, _ in wanted)
        for file in files:
            name = file if Path(file).exists() else source.name
            for one in iterate_conversations([name], Counts(), Observer()):
                key = (one.at, content_hash(one))
                if wanted[key]:
                    wanted[key] -= 1
                    found.append(one)
                if not any(number for (at, _), number in wanted.items() if at.rpartition(":")[0] == file):
                    break
    return found


# -- counts ------------------------------------------------------------------------------------------------


def _training_counts(parts: Sequence[Part], out: Sequence[np.ndarray], own: bool) -> dict[str, Any]:
    """What happened to all records but those that are held out.

    Args:
        out: for each part whether a conversation is not trained on. own: the held-out data has its own files.
    """
    number = sum(int(one.sum()) for one in out)
    read = merged_counts([part.counts for part in parts])
    rendered = side_counts(parts, [~one for one in out])
    if own and number:
        places = [
            part.at(int(at)) for part, one in zip(parts, out, strict=True) for at in np.flatnonzero(one)[:5]
        ]
        rendered["skipped"]["its question stands in the held-out data"] = number
        rendered["places"]["its question stands in the held-out data"] = places[:5]
    found = merged_counts([read, {"read": 0, "used": 0, "formats": {}, "notices": [], **rendered}])
    found["read"] -= 0 if own else number
    return found | {"used": found["read"] - sum(found["skipped"].values())}


def _held_out_counts(parts: Sequence[Part], held: Sequence[np.ndarray], own: bool) -> dict[str, Any]:
    read = merged_counts([part.counts for part in parts])
    if not own:  # how its records were read is said of the training data
        number = sum(int(one.sum()) for one in held)
        read = merged_counts([]) | {"read": number, "formats": read["formats"]}
    rendered = side_counts(parts, held)
    found = merged_counts([read, {"read": 0, "used": 0, "formats": {}, "notices": [], **rendered}])
    return found | {"used": found["read"] - sum(found["skipped"].values())}


def _figures(table: ExampleTable, settings: SftSettings) -> dict[str, Any]:
    return figures(table.lengths.tolist(), int(table.targets.sum()), settings.max_length)


def _repeated(parts: Sequence[Part]) -> list[str]:
    contents = np.concatenate([part.conversations["content"] for part in parts])
    more = len(contents) - len(np.unique(contents))
    return [f"{more:,} of {len(contents):,} conversations repeat another one"] if more else []
