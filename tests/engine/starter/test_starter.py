"""The embedded model: its size, its tokenizer, its samples, and that commands fall back to it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from medicalgpt_cli.engine import starter
from medicalgpt_cli.engine.model.references import resolve, resolve_models
from medicalgpt_cli.settings.groups import ModelSettings
from tests.cli import medgpt, start
from tests.tiny import write_jsonl

DATA = Path(__file__).parents[2] / "data"
TOKENIZER = AutoTokenizer.from_pretrained(starter.MODEL)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_is_small() -> None:
    files = [one for one in starter.FOLDER.rglob("*") if one.is_file() and "__pycache__" not in one.parts]
    assert sum(one.stat().st_size for one in files) <= 12_000_000


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_real_text_comes_back_in_few_tokens() -> None:
    for name, least in (("cmtmedqa_zh_dev.jsonl", 1.3), ("medquad_en_dev.jsonl", 3.5)):
        texts = [text for row in rows(DATA / name) for text in _texts(row)]
        ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [TOKENIZER.decode(one) for one in ids] == texts
        assert sum(map(len, texts)) / sum(map(len, ids)) >= least


def _texts(value) -> list[str]:
    if isinstance(value, dict):
        value = [one for key, one in value.items() if key not in ("id", "source", "lang", "from", "role")]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) and value else []


def test_control_tokens_and_template() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Rest."}]
    text = TOKENIZER.apply_chat_template(talk, tokenize=False)
    assert text == "<|user|>\nHi\n<|assistant|>\nRest.<|endoftext|>\n"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids.count(TOKENIZER.eos_token_id) == 1 and TOKENIZER.decode(ids) == text


def test_every_sample_is_attributed_and_no_held_out_record_is_trained_on() -> None:
    told = (starter.SAMPLES / "SOURCES.md").read_text(encoding="utf-8")
    seen: dict[str, str] = {}
    for file in sorted(starter.SAMPLES.glob("*.jsonl")):
        for row in rows(file):
            assert row["id"] not in seen, f"{row['id']} in {seen.get(row['id'])} and {file.name}"
            seen[row["id"]] = file.name
            assert row["source"].split("/")[0].split(" ")[0] in told
    assert len(seen) >= 300
    for file in starter.FOLDER.glob("*/*"):
        if file.suffix in (".jsonl", ".safetensors"):
            assert hashlib.sha256(file.read_bytes()).hexdigest() in told


def test_a_name_is_not_needed() -> None:
    resolved = resolve_models(ModelSettings())
    assert resolved.is_starter and resolved.label == "starter"
    assert resolve("starter").folder == starter.MODEL


def test_an_adapter_finds_the_starter_of_another_installation(tmp_path: Path) -> None:
    elsewhere = Path("/elsewhere", *starter.MODEL.parts[-4:])
    config = {"base_model_name_or_path": str(elsewhere), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert resolve(str(tmp_path)).base.folder == starter.MODEL


def test_a_command_that_falls_back_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "ask.jsonl", [{"prompt": "What helps against a cough?"}])
    asked = ("--data-file", "ask.jsonl", "--predictions-file", "-", "--max-new-tokens", "2")
    done = medgpt("infer", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "demonstration model" in done.stderr and "knows next to nothing" in done.stderr
    assert json.loads(done.stdout)["completion_tokens"] <= 2


@pytest.mark.slow
def test_quickstart_moves_every_figure_the_right_way(tmp_path: Path) -> None:
    done = medgpt("quickstart", "--output-dir", "out", "--json", cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for one in result["figures"]:
        assert one["better"] is not False, one
    again = json.loads(medgpt("quickstart", "--output-dir", "out", "--json", cwd=tmp_path).stdout)
    assert again["done"] == 0 and again["figures"] == result["figures"]

    killed = start("quickstart", "--output-dir", "killed", cwd=tmp_path)
    log = tmp_path / "killed" / "reward" / "metrics.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) > 25):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    rest = medgpt("quickstart", "--output-dir", "killed", "--json", cwd=tmp_path, timeout=1800)
    assert rest.returncode == 0, rest.stderr
    assert json.loads(rest.stdout)["figures"] == result["figures"]
