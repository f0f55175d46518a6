"""Which GPUs the libraries see."""

from __future__ import annotations

import os

import pytest

from medicalgpt_cli.engine.run.devices import show_only


@pytest.mark.parametrize(
    ("visible", "gpus", "single", "expected"),
    [
        (None, (), True, "0"),  # training sees one GPU only
        (None, (), False, None),
        ("4,5,6", (), True, "4"),
        ("4,5,6", (1, 2), False, "5,6"),  # --gpus numbers the visible ones
        (None, (2,), True, "2"),
        ("4", (3,), True, "3"),  # not there: loading will say so
        ("", (), True, ""),  # somebody hid them all
    ],
)
def test_show_only(monkeypatch, visible, gpus, single, expected) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    show_only(gpus, single=single)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected
