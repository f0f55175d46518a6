"""`medgpt env` in a real process."""

from __future__ import annotations

import json

from medicalgpt_cli import __version__
from tests.cli import medgpt


def test_env_prints_what_a_bug_report_needs() -> None:
    done = medgpt("env", env={"CUDA_VISIBLE_DEVICES": "0,1", "TRANSFORMERS_OFFLINE": "1"})
    assert done.returncode == 0 and done.stderr == ""
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["medgpt"] == __version__ and lines["torch"] and lines["gpu"]
    assert lines["CUDA_VISIBLE_DEVICES"] == "0,1" and lines["TRANSFORMERS_OFFLINE"] == "1"
    assert "cores" in lines["processor"] and "free of" in lines["memory"]


def test_env_as_json_is_one_object_and_nothing_else() -> None:
    done = medgpt("env", "--json")
    assert done.stderr == ""
    assert json.loads(done.stdout)["medgpt"] == __version__
