"""A recipe's file that stands for any number of values, or never ends."""

from __future__ import annotations

import os

import pytest

from medicalgpt_cli.engine.pipeline.recipe import read_yaml
from medicalgpt_cli.errors import UnsafeRefused, UsageError


def test_references_upon_references(tmp_path):
    path = tmp_path / "r.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path.write_text("\n".join(lines))
    with pytest.raises(UnsafeRefused, match="100,000 values"):
        read_yaml(path, "a recipe")


@pytest.mark.parametrize(
    "text", ["[" * 5000, "a: &a [*a]", "a: &a {*a : 1}", "{[1]: 2}", "\0", "!!python/name:os.system x"]
)
def test_what_is_no_recipe(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="not valid YAML"):
        read_yaml(path, "a recipe")


def test_what_is_no_file_or_a_large_one(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a" * (2**20 + 1))
    with pytest.raises(UnsafeRefused, match="characters"):
        read_yaml(path, "a recipe")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="no file"):
        read_yaml(path, "a recipe")
    anchored = tmp_path / "b.yaml"
    anchored.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(anchored, "a recipe") == {"a": [1, 2], "b": [1, 2]}
