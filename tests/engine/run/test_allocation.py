"""Training starts itself anew without glibc's thread cache: the same process, the same command, the same output."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli import command, environment
from tests.tiny import tiny_model, write_jsonl


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_training_starts_without_the_thread_cache(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_jsonl(
        tmp_path / "talk.jsonl", [{"question": f"What helps {n}?", "answer": "Rest."} for n in range(8)]
    )
    flags = ("--base-model", "model", "--train-data", "talk.jsonl", "--max-steps", "2", "--use-cpu", "--json")
    variables = {name: value for name, value in environment().items() if name != "GLIBC_TUNABLES"}
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
        seen = b"tcache_count=0" in Path(f"/proc/{process.pid}/environ").read_bytes()
        time.sleep(0.05)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert seen and json.loads(out)["steps"] == 2
