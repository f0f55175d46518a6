"""In several processes each scores and looks back over its share of the answers, and all have the same rollout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medicalgpt_cli.engine.run.processes import free_port
from tests.tiny import tiny_model, write_jsonl


def rollouts(place: Path, processes: int, prompts: int) -> list[dict]:
    """What each process reports."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "tests.engine.training.ppo.shared_work", str(place), str(prompts)]
    started = [
        subprocess.Popen(
            command,
            env={**shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return [json.loads(one.splitlines()[-1]) for one in said]


@pytest.mark.slow
def test_processes_share_the_work_and_have_the_same_rollout(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What about {n}?"} for n in range(12)])
    for prompts in (5, 1):  # with one the second process has nothing to do, and still gets everything
        (alone,) = rollouts(tmp_path, 1, prompts)
        first, second = rollouts(tmp_path, 2, prompts)
        assert alone["scored"] == prompts
        assert [first["scored"], second["scored"]] == [-(-prompts // 2), prompts // 2]
        assert first["tokens"] + second["tokens"] == alone["tokens"]
        for name in alone.keys() - {"scored", "tokens"}:
            assert first[name] == second[name], name
        assert first["texts"] == alone["texts"] and first["scores"] == alone["scores"]
        for name in ("logp", "ref_logp", "values", "entropy", "again"):
            for one, other in zip(alone[name], first[name], strict=True):
                assert one == pytest.approx(other, abs=1e-5), name
