"""A path that was mistyped is told from a hub name, and never asked for on the network."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from medicalgpt_cli.engine.data.readers import HubDataset, expand_sources
from medicalgpt_cli.engine.model.references import resolve
from medicalgpt_cli.errors import DataError, UsageError
from tests.cli import environment

PATHS = [
    *("runs/sft", "Runs/sft", "runs/stf", "rusn/sft", "owner/data", "Data/own", "data/trian"),
    *("models/foo.gguf", "models/foo.GGUF", "owner/name.safetensors", "owner/train.jsonl", "owner/x.csv.gz"),
    *("./x/y", "../x", "~/x/y", "/x/y", "a/b/", "/a/b", "a//b", "a/b/c", "a/", "/a"),
    *("a b/c", "a/b c", "-a/b", "a/..", "a/.b"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    for one in ("runs/sft", "data"):
        (tmp_path / one).mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_no_hub_name(here, name):
    with pytest.raises(UsageError) as refused:
        resolve(name)
    assert refused.value.exit_code == 2
    with pytest.raises(DataError):
        expand_sources([name if name != "Runs/sft" else "Data/sft"])


def test_hub_names_stay_hub_names(here):
    for name in ("Qwen/Qwen2.5-7B-Instruct", "owner/name", "a/b", "01-ai/Yi_1.5", "meta-llama/Llama-3.1-8B"):
        assert resolve(name).kind == "hub"
    assert expand_sources(["owner/name", "owner/name:test"])[0] == [
        HubDataset("owner/name", "train"),
        HubDataset("owner/name", "test"),
    ]


def test_the_nearest_path_is_named(here):
    for name, near in (("rusn/sft", "runs/sft"), ("runs/stf", "runs/sft")):
        (here / "runs" / "sft" / "config.json").write_text("{}")
        with pytest.raises(UsageError, match="the hub is not asked") as refused:
            resolve(name)
        assert refused.value.hint == f"did you mean {near}?"
    with pytest.raises(DataError) as refused:
        expand_sources(["dta/train.jsonl"])
    assert refused.value.hint == "did you mean data/train.jsonl?"


class _Recorder(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_nothing_is_asked_on_the_network_for_a_path(here):
    """The real commands, with a hub of our own that notes who asks; a hub name shows that it would."""
    server = HTTPServer(("127.0.0.1", 0), _Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tries = [
        ["infer", "--base-model", "rusn/sft", "--data-file", "q.txt", "--predictions-file", "o.json"],
        ["infer", "--tokenizer-path", "data/tok", "--data-file", "q.txt", "--predictions-file", "o.json"],
        ["sft", "--base-model", "models/foo.gguf", "--train-data", "data/train.jsonl"],
        ["sft", "--train-data", "data/trian"],
        ["sft", "--train-data", "dta/train.jsonl"],
        ["sft", "--train-data", "data/train.jsonl", "--eval-data", "runs/dev"],
        ["rl", "--train-data", "data/train.jsonl", "--reward-model", "runs/reward"],
        ["merge-lora", "--lora-model", "runs/sft/", "--output-dir", "merged"],
        ["plan", "sft", "--base-model", "runs/stf"],
        ["pretrain", "--train-data", "owner/name"],
    ]
    (here / "q.txt").write_text("Why?\n")
    program = (
        "import json, sys\nfrom medicalgpt_cli.app import main\n"
        "for one in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['medgpt', *one]\n"
        "    try: main()\n"
        "    except SystemExit as end: print(end.code, flush=True)\n"
    )
    env = environment({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"})
    codes = []
    for batch in (tries[:-1], tries[-1:]):
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(batch)],
            env=env,
            cwd=here,
            capture_output=True,
            text=True,
            timeout=300,
        )
        codes += done.stdout.split()
        if batch[-1] is not tries[-1]:
            assert _Recorder.asked == [], done.stderr
    server.shutdown()
    assert codes == ["2"] * len(tries), codes
    assert any("owner/name" in one for one in _Recorder.asked)
