"""Records that say the same, or nearly the same, and that they stand on one side of a split."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence

import pytest

from medicalgpt_cli.engine.data import duplicates, splitting
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.duplicates import Section, find_duplicates, sections_of
from medicalgpt_cli.engine.data.messages import Conversation, Message
from medicalgpt_cli.engine.observer import Observer

needs_datasketch = pytest.mark.skipif(
    importlib.util.find_spec("datasketch") is None, reason="near duplicates need datasketch"
)
WORDS = [f"word{number}" for number in range(5000)]


def said(*texts: str) -> list[list[Section]]:
    return [[("user", text)] for text in texts]


def jaccard(one: str, other: str) -> float:
    """Of runs of three words, by Python's own sets."""
    sets = []
    for text in (one, other):
        words = text.split()
        sets.append({tuple(words[at : at + 3]) for at in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_exact_duplicates_name_the_first():
    found = find_duplicates(["a", "b", "a", "b", "a"], said("a", "b", "a", "b", "a"), Observer())
    assert found.exact == {2: 0, 3: 1, 4: 0} and not found.near


@needs_datasketch
def test_near_duplicates_are_those_of_a_plain_comparison():
    """Of 300 texts, each with some words of an earlier one changed: those with a similarity of 0.8 are found."""
    draw = random.Random(3)
    base = [" ".join(draw.choices(WORDS, k=draw.randrange(40, 120))) for _ in range(150)]
    changed = []
    for text in base:
        words = text.split()
        for _ in range(draw.randrange(1, 8)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        changed.append(" ".join(words))
    texts = [*base, *changed]
    found = find_duplicates(texts, said(*texts), Observer()).near
    expected = {150 + at: at for at in range(150) if jaccard(base[at], changed[at]) >= 0.8}
    assert 30 < len(expected) < 120
    assert found.keys() <= expected.keys() and all(found[one] == expected[one] for one in found)
    assert len(found) >= 0.97 * len(expected)


@needs_datasketch
@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("Fever, and a cough for three days?", "fever and a  cough for three days", True),
        ("感冒发烧，怎么办？", "感冒发烧怎么办", True),
        ("感冒发烧怎么办", "感冒咳嗽怎么办", False),
        ("Fever", "Cough", False),
        ("?!", "!?", False),  # nothing to compare
    ],
)
def test_case_spacing_and_punctuation_make_no_difference(one, other, near):
    assert find_duplicates([one, other], said(one, other), Observer()).near == ({1: 0} if near else {})


@needs_datasketch
def test_the_same_words_in_other_roles_are_no_duplicates():
    long, other = " ".join(WORDS[:60]), " ".join(WORDS[100:160])
    chosen_first = sections_of([{"role": "user", "content": "Which?"}], chosen=long, rejected=other)
    rejected_first = sections_of([{"role": "user", "content": "Which?"}], chosen=other, rejected=long)
    assert not find_duplicates([1, 2], [chosen_first, rejected_first], Observer()).near


@needs_datasketch
def test_a_long_system_message_makes_no_duplicates():
    system: Message = {"role": "system", "content": " ".join(WORDS[:500])}
    turns = [[system, {"role": "user", "content": f"Question {word}?"}] for word in ("one", "two")]
    assert not find_duplicates([1, 2], [sections_of(one) for one in turns], Observer()).near


def test_what_was_not_looked_for_is_said(monkeypatch):
    texts = ["a b c d", "a b c d e"]
    assert "up to 1 records" in (find_duplicates(texts, said(*texts), Observer(), most=1).note or "")
    monkeypatch.setattr(duplicates.importlib.util, "find_spec", lambda name: None)
    found = find_duplicates(["a", "a"], said("a", "a"), Observer())
    assert found.exact == {1: 0} and "datasketch" in (found.note or "")


def conversations(questions: Sequence[str]) -> list[Conversation]:
    return [
        Conversation(
            ({"role": "user", "content": text}, {"role": "assistant", "content": "Rest."}), f"a:{at}"
        )
        for at, text in enumerate(questions, 1)
    ]


@needs_datasketch
def test_near_duplicates_stand_on_one_side_of_a_split():
    draw = random.Random(0)
    questions = []
    for _ in range(40):
        text = " ".join(draw.choices(WORDS, k=60))
        questions += [text, f"{text} please", f"Doctor, {text}"]
    for seed in range(5):
        counts = Counts()
        training, held = splitting.hold_out(conversations(questions), 0.25, seed, counts, Observer())
        assert len(held) == 30 and len(training) == 90
        assert {one.messages[0]["content"][-80:-10] for one in held}.isdisjoint(
            {one.messages[0]["content"][-80:-10] for one in training}
        )
        assert counts.notices == ["80 near duplicates stand on one side of the split"]


@needs_datasketch
def test_a_file_of_near_duplicates_is_still_held_out_by_question():
    text = " ".join(WORDS[:80])
    counts = Counts()
    training, held = splitting.hold_out(
        conversations([f"{text} {number}" for number in range(20)]), 0.1, 0, counts, Observer()
    )
    assert (len(training), len(held)) == (18, 2)
    assert "near duplicates of each other" in counts.notices[0]
