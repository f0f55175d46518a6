"""Match patterns with names as layers have them, and with worse: `pattern_child.py`, within limits.

A script of its own, that imports nothing of medgpt (engine/run/bounded.py). The answer is whether all are patterns.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator

_LAYERS = ("model.layers.17.self_attn.q_proj", "transformer.h.5.mlp.dense_4h_to_h", "lm_head", "score")
_RUNS = ("a", "0", ".", "_", "a.", ".0.", "layers.", "attn", "proj", "q_proj.", "Aa0_.")


def names() -> Iterator[str]:
    yield from _LAYERS
    for run, end in itertools.product(_RUNS, ("", "!", ".weight", "proj")):
        text = run * (64 // len(run)) + end
        yield text
        yield from (f"{front}.{text}" for front in _LAYERS)


def are_patterns(patterns: list[str]) -> bool:
    try:
        compiled = [re.compile(one) for one in patterns]
    except (re.error, OverflowError, RecursionError):
        return False
    for pattern, name in itertools.product(compiled, names()):
        pattern.fullmatch(name)
        re.match(rf"(.*\.)?({pattern.pattern})$", name)
    return True


if __name__ == "__main__":
    print(json.dumps(are_patterns(json.load(sys.stdin))))
