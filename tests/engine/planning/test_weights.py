"""Which option makes room for the weights of a model that only answers."""

from __future__ import annotations

import pytest
import torch

from medicalgpt_cli.engine.planning.skeleton import Outline
from medicalgpt_cli.engine.planning.weights import option_that_fits
from tests.engine.planning.configs import llama

GIB = 2**30


@pytest.mark.parametrize(
    ("gib", "can_quantise", "option"),
    [
        # 6.74 thousand million weights: 25.1 GiB in fp32, 12.6 in bf16, about 6.8 in 8 bits and 3.7 in 4
        (13.0, True, "--dtype bf16"),
        (12.0, True, "--load-in-8bit"),
        (6.0, True, "--load-in-4bit"),
        (3.0, True, None),
        (12.0, False, None),
    ],
)
def test_the_first_option_that_fits_is_named(gib: float, can_quantise: bool, option: str | None) -> None:
    shapes = Outline(llama("7B"), torch.float32)
    assert option_that_fits(shapes, round(gib * GIB), can_quantise) == option


def test_what_is_quantised_already_or_in_16_bits_has_fewer_options() -> None:
    assert option_that_fits(Outline(llama("7B"), torch.bfloat16), 12 * GIB, True) == "--load-in-8bit"
    assert option_that_fits(Outline(llama("7B"), torch.float32, quantization="8bit"), 6 * GIB, True) is None
