"""Every causal architecture of the installed transformers, tiny and random, through all that medgpt does.

What is held against what, and the table in docs/models.md: tests/engine/model/architectures.py.
"""

from __future__ import annotations

import pytest

from tests.engine.model.architectures import CHECKS, PAGE, apart, architectures, bad, preload


@pytest.fixture(scope="module")
def libraries() -> None:
    preload()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", architectures())
def test_an_architecture_computes_what_transformers_computes(model_type: str, libraries: None) -> None:
    row = apart(model_type)
    if "made" in row:
        pytest.skip(row["made"])
    assert set(CHECKS) <= row.keys()
    assert {name: row[name] for name in bad(row)} == {}


@pytest.mark.slow
def test_the_table_names_every_architecture() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in architectures() if name not in page] == []
