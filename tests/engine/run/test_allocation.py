"""Memory on a processor: the cache of threads and huge pages, and what is kept and given back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli import command, environment
from tests.tiny import tiny_model, write_jsonl


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_training_starts_without_the_thread_cache_and_with_huge_pages(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_jsonl(
        tmp_path / "talk.jsonl", [{"question": f"What helps {n}?", "answer": "Rest."} for n in range(8)]
    )
    flags = ("--base-model", "model", "--train-data", "talk.jsonl", "--max-steps", "2", "--use-cpu", "--json")
    ours = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    variables = {name: value for name, value in environment().items() if name not in ours}
    process = subprocess.Popen(
        command("sft", *flags),
        env=variables,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    seen = False
    while process.poll() is None and not seen:
        found = Path(f"/proc/{process.pid}/environ").read_bytes()
        seen = b"tcache_count=0" in found and b"THP_MEM_ALLOC_ENABLE=1" in found
        time.sleep(0.05)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert seen and json.loads(out)["steps"] == 2


HOLDS_AND_GIVES_BACK = """
import os, sys, torch
from pathlib import Path
from medicalgpt_cli.engine.run.allocation import give_back_freed_memory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

keep_freed_memory(int(sys.argv[1]) * 2**20)
empty = resident()
held = [torch.ones(4 * 2**20) for _ in range(30)]  # 16 MiB each
full = resident()
del held
freed = resident()
give_back_freed_memory()
print(empty, full, freed, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(("largest", "is_kept"), [("32", True), ("2", False)])
def test_freed_memory_is_kept_until_it_is_given_back(largest: str, is_kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_AND_GIVES_BACK, largest],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    empty, full, freed, given_back = map(int, done.stdout.split())
    assert full - empty > 450  # MiB
    assert freed > full - 50 if is_kept else freed < empty + 100
    assert given_back < empty + 100
