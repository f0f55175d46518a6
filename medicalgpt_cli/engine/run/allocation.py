"""How the C library hands out memory while a model is trained on a processor."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of mallopt(3)


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory for the next tensors instead of giving it back at once.

    Each step frees and wants the same tensors again. By default glibc gives those above 128 KiB back to the
    system, which then has to map and clear the pages anew. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc takes
    library.mallopt(_TRIM_THRESHOLD, 2**30)
    library.mallopt(_TOP_PAD, 64 * 2**20)
