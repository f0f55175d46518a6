"""Which GPUs the libraries see. Decided before they are imported, because they look only once."""

from __future__ import annotations

import os
from collections.abc import Sequence


def show_only(gpus: Sequence[int], *, single: bool) -> None:
    """Hide all GPUs but those of `--gpus`, which numbers the visible ones.

    Without `--gpus` a training command (`single`) sees the first one only: several visible GPUs in one
    process would make the library split each batch between them behind our back.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in visible.split(",") if name] if visible is not None else None
    if not gpus and single:
        os.environ["CUDA_VISIBLE_DEVICES"] = named[0] if named else "0" if named is None else ""
    elif gpus:
        # a number that is not there stays as it is: loading then says so
        chosen = [named[n] if named is not None and n < len(named) else str(n) for n in gpus]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
