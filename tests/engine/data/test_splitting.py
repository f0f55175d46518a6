"""What is held out: questions, groups and likenesses stay on one side, whatever the order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.splitting import held_out, roots_of, split

_U64 = np.uint64


def _components(questions, groups, alike) -> list[frozenset[int]]:
    """By hand: sets of positions, joined until nothing changes."""
    sets = [{index} for index in range(len(questions))]
    links = [(a, b) for a in range(len(questions)) for b in range(a) if questions[a] == questions[b]]
    links += [(a, b) for a in range(len(groups)) for b in range(a) if groups[a] == groups[b] != 0]
    for first, second in [*links, *alike]:
        one, other = (next(some for some in sets if place in some) for place in (first, second))
        if one is not other:
            sets.remove(other)
            one |= other
    return [frozenset(one) for one in sets]


@given(st.data())
def test_roots_are_those_of_joined_sets(data):
    rows = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=14))
    place = st.integers(0, len(rows) - 1)
    alike = data.draw(st.lists(st.tuples(place, place), max_size=3))
    questions, groups = (np.array(column, dtype=_U64) for column in zip(*rows, strict=True))
    roots = roots_of(questions, groups, alike).tolist()
    for one in _components(questions.tolist(), groups.tolist(), alike):
        assert {roots[place] for place in one} == {min(int(questions[place]) for place in one)}
    order = data.draw(st.permutations(range(len(rows))))
    moved = [(order.index(a), order.index(b)) for a, b in alike]
    assert roots_of(questions[order], groups[order], moved).tolist() == [roots[index] for index in order]


def test_a_share_is_held_out_and_at_least_one():
    hashes = np.arange(1, 1001, dtype=_U64)
    assert held_out(hashes, 0.05, 0).sum() == 50
    assert held_out(hashes[:2], 0.001, 0).sum() == 1
    assert held_out(hashes, 0.0, 0).sum() == 0 and held_out(hashes[:1], 0.5, 0).sum() == 0
    assert held_out(hashes[:0], 0.5, 0).tolist() == []
    assert (held_out(hashes, 0.05, 0) != held_out(hashes, 0.05, 1)).any()


def test_a_group_stays_on_one_side():
    rows = [
        Conversation(
            ({"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}),
            "f:1",
            group=f"g{n % 7}",
        )
        for n in range(70)
    ]
    training, held = split(rows, 0.3, 3)
    assert held and {one.group for one in training}.isdisjoint(one.group for one in held)
    again, _ = split(rows[::-1], 0.3, 3)
    assert {one.messages[0]["content"] for one in again} == {one.messages[0]["content"] for one in training}
