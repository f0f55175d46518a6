"""Which prompts are answered together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], batch_size: int, window: int = 64) -> Iterator[list[int]]:
    """Indices in batches of similar prompt length, so that little is padded.

    Lengths are sorted within windows of `window` batches: the first answers come soon, and an interrupted
    run has lost no more than a batch.
    """
    for start in range(0, len(lengths), window * batch_size):
        piece = range(start, min(start + window * batch_size, len(lengths)))
        ordered = sorted(piece, key=lambda index: lengths[index])
        for at in range(0, len(ordered), batch_size):
            yield ordered[at : at + batch_size]
