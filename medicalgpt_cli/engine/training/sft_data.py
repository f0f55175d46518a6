"""The data of an instruction-tuning run: read, split, rendered to tokens, mixed, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.duplicates import Section
from medicalgpt_cli.engine.data.example_table import ExampleTable, Part, side_counts
from medicalgpt_cli.engine.data.formats import iterate_conversations, why_nothing
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.mixing import Source, check_weights, parse_source, shares_of
from medicalgpt_cli.engine.data.packing import Mix, mix
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.data.report import figures, merged_counts
from medicalgpt_cli.engine.data.splitting import ALL_ALIKE, held_out, near_duplicates, roots_of, told_by
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
    reader = _Reader(
        counts_for(settings, [*(one.name for one in sources), *settings.eval_data]),
        Rendering(tokenizer, settings.max_length, settings.thinking),
        observer,
    )
    notices: list[str] = []
    shares = shares_of(settings.max_samples, sources, reader.usable, notices)
    parts = reader.parts(sources, shares)
    own = [Source(name) for name in settings.eval_data]
    held_parts = reader.parts(own, None) if own else parts
    left_out = _stand_in(held_parts, parts) if own else {}
    if own:
        held = [np.ones(len(part.conversations), dtype=bool) for part in held_parts]
        out = [np.logical_or.reduce(one) for one in zip(*left_out.values(), strict=True)]
    else:
        whole = _held_out(reader, sources, shares, parts, settings, notices)
        out = held = np.split(whole, np.cumsum([len(part.conversations) for part in parts])[:-1])
    training, testing = _table(parts, [~one for one in out]), _table(held_parts, held)
    if not len(training):
        raise DataError(
            "no training example is left", "`medgpt data` on the same files shows what was skipped and why"
        )
    mixed = mix(sources, training.sizes, training.tokens_of_parts(), "examples")
    counts = _training_counts(parts, out, left_out)
    counts["notices"] += [*notices, *_repeated(parts)]
    return SftData(
        training=training,
        held_out=testing,
        held_out_questions=testing.questions,
        questions=_questions(reader, own or sources, held_parts, held, settings.eval_questions),
        report={
            "training": counts | _figures(training, settings),
            "held_out": _held_out_counts(held_parts, held, bool(own)) | _figures(testing, settings),
            "sources": mixed.told,
        },
        fingerprints={"training": training.fingerprint(), "held_out": testing.fingerprint()},
        mix=mixed,
    )


@dataclass(frozen=True)
class _Reader:
    """Reads conversations, in the way that the options of a run say."""

    rules: Counts  # by which the files are read
    rendering: Rendering
    observer: Observer

    def conversations(self, name: str, **limits: Any) -> Iterator[Conversation]:
        """Of a source that was read before: nothing is said or counted again."""
        return iterate_conversations([name], self.rules.fresh(), Observer(), **limits)

    def told(self, sources: Sequence[Source], shares: dict[str, int] | None) -> Iterator[list[Section]]:
        """What each conversation of `parts` says."""
        for source in sources:
            yield from map(told_by, self.conversations(source.name, shares=shares))

    def usable(self, name: str, most: int) -> int:
        """How many conversations a file has, counted up to a number."""
        return sum(1 for _ in self.conversations(name, most=most))

    def parts(self, sources: Sequence[Source], shares: dict[str, int] | None) -> list[Part]:
        """The examples of each source.

        Raises:
            DataError: none of them has a conversation.
        """
        parts = [self._part(source.name, shares) for source in sources]
        if not any(len(part.conversations) for part in parts):
            skipped = Counter(merged_counts([part.counts for part in parts])["skipped"])
            names = ", ".join(source.name for source in sources)
            raise DataError(f"{names}: no conversation to learn from", why_nothing(Counts(skipped=skipped)))
        return parts

    def _part(self, name: str, shares: dict[str, int] | None) -> Part:
        counts = self.rules.fresh()
        conversations = iterate_conversations([name], counts, self.observer, shares=shares)
        options = {
            "shares": shares,
            "reading": asdict(counts.reading),
            "strict": counts.strict,
            "ignore": sorted(counts.ignore),
            "group": counts.group,
        }
        return tokenised(name, self.rendering, conversations, counts, options, cache_folder(), self.observer)


def _column(parts: Sequence[Part], name: str) -> np.ndarray:
    """A column of the conversations of all parts."""
    return np.concatenate([part.conversations[name] for part in parts])


def _held_out(
    reader: _Reader,
    sources: Sequence[Source],
    shares: dict[str, int] | None,
    parts: Sequence[Part],
    settings: SftSettings,
    notices: list[str],
) -> np.ndarray:
    """Which conversations `--eval-fraction` holds out: (conversations of all parts,) of bool."""
    questions, groups = _column(parts, "question"), _column(parts, "group")
    fraction, seed = settings.eval_fraction, settings.seed
    near = near_duplicates(reader.told(sources, shares), len(questions), fraction, notices, reader.observer)
    found = held_out(roots_of(questions, groups, near), fraction, seed)
    if near and not found.any():
        notices[-1] = ALL_ALIKE
        found = held_out(roots_of(questions, groups), fraction, seed)
    return found


def _stand_in(held: Sequence[Part], parts: Sequence[Part]) -> dict[str, list[np.ndarray]]:
    """For each reason why a conversation is not trained on, and each part: (conversations,) of bool."""
    questions, groups = (_column(held, name) for name in ("question", "group"))
    asked = [np.isin(part.conversations["question"], questions) for part in parts]
    grouped = [np.isin(part.conversations["group"], groups[groups != 0]) for part in parts]
    return {
        "its question stands in the held-out data": asked,
        "its group stands in the held-out data": [
            one & ~other for one, other in zip(grouped, asked, strict=True)
        ],
    }


def _table(parts: Sequence[Part], sides: Sequence[np.ndarray]) -> ExampleTable:
    """The examples of some conversations of each part."""
    chosen = [
        np.flatnonzero(side[part.examples["conversation"]]) for part, side in zip(parts, sides, strict=True)
    ]
    return ExampleTable(parts, chosen)


def _questions(
    reader: _Reader, sources: Sequence[Source], parts: Sequence[Part], held: Sequence[np.ndarray], most: int
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
            for one in reader.conversations(name):
                key = (one.at, content_hash(one))
                if wanted[key]:
                    wanted[key] -= 1
                    found.append(one)
                if not any(number for (at, _), number in wanted.items() if at.rpartition(":")[0] == file):
                    break
    return found


# -- counts ------------------------------------------------------------------------------------------------


def _training_counts(
    parts: Sequence[Part], out: Sequence[np.ndarray], left_out: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Any]:
    """What happened to all records but those that are held out.

    Args:
        out: for each part whether a conversation is not trained on.
        left_out: why that is so, where the held-out data has its own files.
    """
    read = merged_counts([part.counts for part in parts])
    rendered = side_counts(parts, [~one for one in out])
    for reason, sides in left_out.items():
        numbers = [np.flatnonzero(side) for side in sides]
        if number := sum(map(len, numbers)):
            rendered["skipped"][reason] = number
            places = (part.at(int(at)) for part, some in zip(parts, numbers, strict=True) for at in some)
            rendered["places"][reason] = list(islice(places, 5))
    found = merged_counts([read, {"read": 0, "used": 0, "formats": {}, "notices": [], **rendered}])
    if not left_out:
        found["read"] -= sum(int(one.sum()) for one in out)
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
