"""What happened to the records of some files: each skipped, merged or cut one, and each unused key by its name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from medicalgpt_cli.engine.data.known_keys import MEDIA, fold, has_no_meaning, is_known, meaning_of
from medicalgpt_cli.engine.data.naming import SHARE, looks_like_a_name
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.errors import DataError, MedgptError

Place = Literal["record", "turn", "part", "tool call"]
_PLACES = 5  # that are kept of each reason
_DISTINCT = 2_000  # different unused keys of a file that are counted one by one
_LISTED = 20  # wrong records that are kept


@dataclass
class Counts:
    """Figures of what was read, how it is read, and the rules for what may stay unused."""

    strict: bool = False  # a key that is not used ends the run
    ignore: frozenset[str] = frozenset()  # keys that a person has said are not needed
    group: str | None = None  # the key that says which records belong together
    reading: ReadOptions = AS_FOUND
    keep_going: bool = False  # wrong records and broken lines are kept in `wrong`, and end nothing

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    merged: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    tokens_cut: int = 0
    formats: dict[str, str] = field(default_factory=dict)  # file: format
    notices: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[MedgptError] = field(
        default_factory=list
    )  # the first of the records that contradict their format
    wrong_total: int = 0
    _unused: dict[str, Counter[tuple[Place, str]]] = field(default_factory=lambda: defaultdict(Counter))
    _read: Counter[tuple[Place, str, bool]] = field(default_factory=Counter)
    _records: Counter[str] = field(default_factory=Counter)  # by file, of those that were read for their keys

    def fresh(self) -> Counts:
        """Empty counts with the same rules, for other files."""
        return Counts(self.strict, self.ignore, self.group, self.reading, self.keep_going)

    @property
    def used(self) -> int:
        """Rows that are neither skipped nor wrong."""
        return self.read - sum(self.skipped.values()) - self.wrong_total

    def add_skip(self, reason: str, at: str) -> None:
        """A row (or a conversation that was used until now) is left out."""
        self.skipped[reason] += 1
        self._place(reason, at)

    def add_merge(self, reason: str, at: str) -> None:
        self.merged[reason] += 1
        self._place(reason, at)

    def add_truncation(self, reason: str, at: str, tokens: int) -> None:
        self.truncated[reason] += 1
        self.tokens_cut += tokens
        self._place(reason, at)

    def add_format(self, path: str, kind: str) -> None:
        known = self.formats.setdefault(path, kind)
        if kind not in known.split(" + ") and not known.startswith(f"{kind}, "):  # "text, a document a line"
            self.formats[path] = f"{known} + {kind}"

    def add_keys(
        self, path: str, unused: Iterable[tuple[Place, str]], read: Iterable[tuple[Place, str, bool]]
    ) -> None:
        """The keys of one record: the unused ones, and those that were read with whether their value is empty."""
        self._records[path] += 1
        found = self._unused[path]
        for one in set(unused):
            found[one if one in found or len(found) < _DISTINCT else (one[0], "")] += 1
        self._read.update(set(read))

    def add_wrong(self, problem: MedgptError) -> None:
        """A record that contradicts its format."""
        self.wrong_total += 1
        if len(self.wrong) < _LISTED:
            self.wrong.append(problem)

    def add_wrong_line(self, problem: MedgptError) -> None:
        """A line that could not be read as a record."""
        self.read += 1
        self.add_wrong(problem)

    def finish(self) -> None:
        """To be called when all is read.

        Raises:
            DataError: as `check`, which is left to the caller where wrong records end nothing.
        """
        self._look_for_named_keys()
        if not self.keep_going:
            self.check()

    def check(self) -> None:
        """
        Raises:
            DataError: records were wrong, no record has the key of --group, or (where that is asked for) keys
                were not used.
        """
        if self.wrong:
            first = self.wrong[0]
            more = f" (and {self.wrong_total - 1:,} more)" if self.wrong_total > 1 else ""
            hint = f"{first.hint}; `medgpt data` lists them" if more else first.hint
            raise DataError(f"{first.message}{more}", hint)
        if self.group is not None and self._records and not self._in_a_group():
            raise DataError(
                f"--group {self.group}: no record has this key, or a value for it",
                "`medgpt data FILE` shows the keys of a file",
            )
        left = [one for one in self.unused() if not one["accepted"]]
        if self.strict and left:
            shown = ", ".join(f"{one['key']} ({one['records']:,} records)" for one in left[:8])
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            raise DataError(
                f"--strict: nothing is made of {shown}{more}",
                "--ignore KEY accepts one that is not needed, --columns gives one a meaning",
            )

    def _in_a_group(self) -> int:
        """How many records have a value for the key of `--group`."""
        key = fold(self.group or "")
        return sum(
            number
            for (place, one, is_empty), number in self._read.items()
            if place == "record" and not is_empty and fold(one) == key
        )

    def _look_for_named_keys(self) -> None:
        """Notes about the keys of `--ignore` and `--group` that records do not have."""
        if not self._records:
            return
        seen = {fold(key) for keys in self._unused.values() for _, key in keys}
        notes = [
            f"--ignore {key}: no record has this key" for key in sorted(self.ignore) if fold(key) not in seen
        ]
        alone = sum(self._records.values()) - self._in_a_group() if self.group is not None else 0
        if alone:
            notes.append(f"--group {self.group}: {alone:,} records have no value for it, and stand alone")
        self.notices += [note for note in notes if note not in self.notices]

    def keys(self) -> list[dict[str, Any]]:
        """Each key that was read: where it stands, in how many records, and in how many its value is empty."""
        found: dict[tuple[Place, str], list[int]] = {}
        for (place, key, is_empty), number in self._read.items():
            name = key if is_known(key) or looks_like_a_name(key) else "other keys"
            entry = found.setdefault((place, name), [0, 0])
            entry[is_empty] += number
        order = {place: number for number, place in enumerate(get_args(Place))}
        rows = [
            {"key": key, "where": place, "records": filled, "empty": empty}
            for (place, key), (filled, empty) in found.items()
        ]
        return sorted(rows, key=lambda one: (order[one["where"]], -one["records"], one["key"]))

    def unused(self) -> list[dict[str, Any]]:
        """Each key that nothing was made of: its name where it may be named, where it stands, in how many records."""
        found: Counter[tuple[Place, str, str, bool]] = Counter()
        ignored = {fold(key) for key in self.ignore}
        for path, keys in self._unused.items():
            least = SHARE * self._records[path]
            for (place, key), number in keys.items():
                named = bool(key) and (is_known(key) or (looks_like_a_name(key) and number >= least))
                name = key if named else "other keys"
                accepted = fold(key) in ignored
                found[(place, name, meaning(key, accepted) if named else "not known", accepted)] += number
        rows = [
            {"key": key, "where": place, "records": number, "meaning": means, "accepted": accepted}
            for (place, key, means, accepted), number in found.items()
        ]
        return sorted(rows, key=lambda one: (-one["records"], one["where"], one["key"]))

    def unused_lines(self) -> list[str]:
        """The same as lines for the screen and the report: one a key, and one for all that say nothing to be learnt."""
        lines, plain = [], []
        for one in self.unused():
            where = "" if one["where"] == "record" else f" (of a {one['where']})"
            if one["meaning"] == _NOTHING:
                plain.append(f"{one['key']}{where} {one['records']:,}")
            else:
                lines.append(
                    f"{one['key']}{where} is not used in {one['records']:,} records: {one['meaning']}"
                )
        return [*lines, *([f"keys that say nothing to be learnt: {', '.join(plain)}"] if plain else [])]

    def _place(self, reason: str, at: str) -> None:
        if len(self.places[reason]) < _PLACES:
            self.places[reason].append(at)

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "used": self.used,
            "skipped": dict(self.skipped),
            "merged": dict(self.merged),
            "truncated": dict(self.truncated),
            "tokens_cut": self.tokens_cut,
            "formats": self.formats,
            "keys": self.keys(),
            "unused": self.unused(),
            "notices": [*self.notices, *self.unused_lines()],
            "places": dict(self.places),
        }


_NOTHING = "says nothing to be learnt"
_WOULD_MEAN = {
    "history": "earlier turns, which this kind of record does not take",
    "reasoning": "reasoning, which belongs to an answer",
    "weight": "the weight of a loss, and a loss falls on answers only",
    "label": "a truth value here would mark a good or a bad answer; this is none",
    "system": "a system message, which this kind of record does not take",
    "context": "a text below the question, and this kind of record has its turns in a list",
    "explanation": "what explains an answer, and there is none",
    "name": "a speaker's name, which chat templates do not know",
    "group": "which records belong together; --group group keeps them on one side of a split",
    "scores": "scores of several answers",
    "ranks": "ranks of several answers",
}


def meaning(key: str, accepted: bool = False) -> str:
    """What an unused key would have meant."""
    if accepted:
        return "left out, as --ignore says"
    known = meaning_of(key)
    if known in MEDIA:
        return "empty: nothing to see or hear"
    if known in _WOULD_MEAN:
        return _WOULD_MEAN[known]
    if has_no_meaning(key) or known == "id":
        return _NOTHING
    return "known, and not in this kind of record" if known else "not known"
