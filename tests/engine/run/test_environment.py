"""What is told about the machine, and what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medicalgpt_cli.engine.run import environment
from tests.cli import ROOT
from tests.tiny import tiny_model


def test_describe_is_plain_data_with_what_a_bug_report_needs() -> None:
    found = json.loads(json.dumps(environment.describe()))
    assert found["versions"]["transformers"] and found["cpu"]["cores"] >= 1
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["disk"]["working_folder"] > 0


def test_no_user_name_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "maria"))
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "maria" / "models"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = json.dumps(environment.describe())
    assert "maria" not in told and "hf_secret" not in told
    assert "~/models" in told
    assert environment.home_relative(f"{tmp_path}/maria2/x") == f"{tmp_path}/maria2/x"


def test_memory_in_use_grows_with_what_is_held() -> None:
    before = environment.memory_used()
    held = bytearray(b"x" * 100_000_000)
    assert environment.memory_used() - before > 90_000_000
    del held


@pytest.mark.parametrize(
    ("line", "group", "names", "prefix"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current"), ""),  # Slurm or systemd, version 2
        ("0::/", "", ("memory.max", "memory.current"), ""),  # a container, version 2
        (
            "4:cpu,memory:/docker/f00",  # a container sees its own group as the root, under its host's path
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_",
        ),
    ],
)
def test_memory_is_what_a_container_or_a_job_may_take(
    tmp_path: Path, line: str, group: str, names: tuple[str, str], prefix: str
) -> None:
    (tmp_path / "own").write_text(f"3:cpuset:/\n{line}\n1:name=systemd:/\n")
    folder = tmp_path / "mounted" / group
    folder.mkdir(parents=True)
    (tmp_path / "mounted" / "job" / "step").mkdir(parents=True, exist_ok=True)
    (tmp_path / "mounted" / "job" / "step" / "memory.max").write_text("max\n")  # no limit of its own
    (folder / names[0]).write_text("8000\n")
    (folder / names[1]).write_text("5000\n")
    (folder / "memory.stat").write_text(f"anon 1000\n{prefix}active_file 1500\n{prefix}inactive_file 2500\n")
    assert list(environment.control_groups(tmp_path / "own", tmp_path / "mounted")) == [(8000, 1000)]


def test_memory_without_control_groups_is_the_machines(tmp_path: Path) -> None:
    assert list(environment.control_groups(tmp_path / "none", tmp_path)) == []


def test_engine_run_needs_no_torch_to_be_imported() -> None:
    code = (
        "import sys\n"
        "from medicalgpt_cli.engine.run import checkpoints, files, folder, manifest, metrics, quiet, report\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


QUIET = """
import sys
from medicalgpt_cli.engine.run.quiet import quieten
quieten()
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import Dataset
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[1] + "-saved")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
Dataset.from_dict({"x": list(range(2000))}).map(lambda row: {"y": len(tokenizer("a").input_ids)})
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY
"""


def test_libraries_are_silent_and_report_to_nobody(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(model)],
        env={
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "0",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
