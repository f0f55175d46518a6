"""How the C library hands out memory while a model is trained on a processor."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # names of mallopt(3)
_TUNABLES = "GLIBC_TUNABLES"


def start_without_thread_cache() -> None:
    """Start this program anew with glibc's cache of each thread off, which glibc reads only as a process starts.

    torch asks for aligned memory. glibc (2.36) cuts it out of a larger piece, and the few bytes in front stay behind in
    that cache, so that what is freed never grows together again. SFT of SmolLM2 on 4 x 512 tokens takes 5.5 to 6.2
    GiB without the cache and 7.3 with it, and with recomputation 1.8 to 2.4 and 3.9, in the same time. Does nothing
    where the C library is another one, or the user has tuned it.
    """
    if platform.libc_ver()[0] != "glibc" or _TUNABLES in os.environ:
        return
    os.environ[_TUNABLES] = "glibc.malloc.tcache_count=0"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory for the next tensors instead of giving it back at once.

    Each step frees and wants the same tensors again. By default glibc gives those above 128 KiB back to the
    system, which then has to map and clear the pages anew: with a limit of 1 MiB instead of 32 a step takes half as
    long again. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc takes
    library.mallopt(_TRIM_THRESHOLD, 2**30)
    library.mallopt(_TOP_PAD, 64 * 2**20)


def give_back_freed_memory() -> None:
    """Give all freed memory back to the system: a tenth of a second, and as much until it is there again.

    Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
