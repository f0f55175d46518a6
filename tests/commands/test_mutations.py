"""Damaged and hostile model, adapter and data files through the program: each ends well, or with one line and a hint.

`-m "slow or not slow"` runs every mutation; the default ones are a selection.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medicalgpt_cli import app
from medicalgpt_cli.engine.run import signals
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl

WRONG: dict[str, Any] = {
    "null": None, "minus": -1, "zero": 0, "huge": 10**9, "beyond": 10**30, "text": "zorblatt", "list": [],
    "lists": [[1]], "object": {}, "true": True, "fraction": 1.5, "nan": float("nan"),
}  # fmt: skip
ROW = {"id": 1, "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, an adapter over it, and the same model in two shards with an index."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("models")
    base = tiny_model(place / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(place / "sharded", max_shard_size="150KB")
    for file in base.iterdir():
        if not (place / "sharded" / file.name).exists() and file.name != "model.safetensors":
            shutil.copy(file, place / "sharded")
    torch.manual_seed(0)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(place / "adapter")
    config = place / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
    tiny_tokenizer().save_pretrained(place / "adapter")
    write_jsonl(place / "data.jsonl", [ROW, {**ROW, "id": 2}, {**ROW, "id": 3}])
    return place


def json_mutations(content: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """A JSON object with each of its values as each wrong thing, or gone."""
    if not isinstance(content, dict) or depth == 0:
        return
    for key in content:
        without = {name: value for name, value in content.items() if name != key}
        yield f"{key} gone", without
        for name, wrong in WRONG.items():
            yield f"{key} {name}", {**content, key: wrong}
        for name, inner in json_mutations(content[key], depth - 1):
            yield f"{key}.{name}", {**content, key: inner}


def byte_mutations(raw: bytes, is_json: bool) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "cut", raw[: len(raw) // 2]
    yield "cut at the end", raw[:-1]
    yield "zeros", b"\0" * len(raw)
    yield "not UTF-8", b"\xff\xfe" + raw
    yield "a page", b"<!doctype html><html><body>404</body></html>"
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    if is_json:
        for text in ("null", "[]", "1", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, raw.decode() * 2):
            yield text[:9], text.encode()
        first = next(iter(json.loads(raw)))
        yield "a key twice", raw.replace(b"{", b'{"%s": null, ' % first.encode(), 1)
    for seed in range(6):
        drawn, changed = random.Random(seed), bytearray(raw)
        for _ in range(1 + 4 * seed):
            changed[drawn.randrange(min(len(raw), 4000))] = drawn.randrange(256)
        yield f"noise {seed}", bytes(changed)


def mutations(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    raw = (folder / name).read_bytes()
    is_json = name.endswith(".json")
    yield from byte_mutations(raw, is_json)
    if is_json:
        for said, changed in json_mutations(json.loads(raw)):
            yield said, json.dumps(changed).encode()


def run(capsys, monkeypatch, *arguments: Any) -> tuple[int, str]:
    """The program in this process: its exit code and what it says of an error."""
    monkeypatch.setattr(sys, "argv", ["medgpt", *map(str, arguments)])
    monkeypatch.setattr(signals, "listen", lambda: None)
    with pytest.raises(SystemExit) as ended:
        app.main()
    return ended.value.code or 0, capsys.readouterr().err


def ended_well(code: int, said: str) -> str | None:
    """What is wrong with an end; None where nothing is."""
    if code == 0:
        return None
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    if code not in (2, 3, 4):
        return f"exit {code}: {' '.join(errors)}"
    if "Traceback" in said or "panicked" in said:
        return "a traceback"
    if len(errors) != 1:
        return f"{len(errors)} error lines"
    if not any(line.startswith("hint:") for line in lines):
        return f"no hint: {errors[0]}"
    return None


def check_all(found: list[tuple[str, str | None]]) -> None:
    wrong = [f"{name}: {what}" for name, what in found if what]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong)


MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip


def model_case(home: Path, name: str) -> tuple[Path, list[str]]:
    if name.startswith("adapter"):
        return home / "adapter", ["--lora-model"]
    return (home / "sharded" if name.endswith("index.json") else home / "base"), ["--base-model"]


def run_model_file(home, name, tmp_path, capsys, monkeypatch, part: slice) -> None:
    folder, option = model_case(home, name)
    found = []
    for said, content in list(mutations(folder, name))[part]:
        changed = tmp_path / "m"
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folder, changed)
        (changed / name).write_bytes(content)
        out = tmp_path / "out.json"
        out.unlink(missing_ok=True)
        code, err = run(
            capsys, monkeypatch, "infer", *option, changed, "--data-file", home / "data.jsonl",
            "--predictions-file", out, "--max-new-tokens", 1, "--use-cpu",
        )  # fmt: skip
        found.append((said, ended_well(code, err)))
    check_all(found)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_some_mutations_of_a_model_file(name, home, tmp_path, capsys, monkeypatch):
    run_model_file(home, name, tmp_path, capsys, monkeypatch, slice(3, None, 60))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_FILES)
def test_every_mutation_of_a_model_file(name, home, tmp_path, capsys, monkeypatch):
    run_model_file(home, name, tmp_path, capsys, monkeypatch, slice(None))


# -- data ---------------------------------------------------------------------------------------------------

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
CHOICE = {"question": "Which?", "options": {"A": "this", "B": "that"}, "answer": "A"}
ALPACA = {"instruction": "Why?", "input": "", "output": "So.", "history": [["a", "b"]], "system": "s"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
    "system": "s",
}
ROWS = {
    "sft": [ROW, ALPACA, SHAREGPT],
    "reward": [PAIR],
    "rl": [CHOICE, PAIR],
    "pretrain": [{"text": "Some words."}],
}
OPTIONS = {
    "rl": ["--reward-rule", "right-option:1"],
    "reward": [],
    "sft": [],
    "pretrain": ["--block-size", "32"],
}


def row_mutations(record: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(record, dict) and depth:
        for key, value in record.items():
            yield {name: one for name, one in record.items() if name != key}
            for wrong in WRONG.values():
                yield {**record, key: wrong}
            for inner in row_mutations(value, depth - 1):
                yield {**record, key: inner}
    elif isinstance(record, list) and depth:
        for place, value in enumerate(record):
            for inner in [*WRONG.values(), *row_mutations(value, depth - 1)]:
                yield [*record[:place], inner, *record[place + 1 :]]


def containers(rows: list[Any]) -> dict[str, bytes]:
    """The rows in every kind of file that is read."""
    import io

    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    texts = [{name: value for name, value in row.items() if isinstance(value, str)} for row in rows]
    head = list(texts[0])
    table = "".join(",".join(one) + "\n" for one in [head, *([row[name] for name in head] for row in texts)])
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
    return {
        "a.jsonl": lines,
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.csv": table.encode(),
        "a.tsv": table.replace(",", "\t").encode(),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": packed.getvalue(),
        "a.txt": lines,
    }


def data_mutations(stage: str) -> Iterator[tuple[str, str, bytes]]:
    """(what, name of the file, its bytes)."""
    for kind, base in enumerate(ROWS[stage]):
        rows = [{**base, "id": number} for number in range(3)]
        for number, changed in enumerate(row_mutations(base)):
            lines = "".join(json.dumps(row) + "\n" for row in [*rows, changed])
            yield f"row {kind}.{number} {changed}"[:80], "a.jsonl", lines.encode()
        for name, raw in containers([base] * 3).items():
            for said, content in byte_mutations(raw, is_json=False):
                yield f"{name} {said}", name, content
        for text in (
            "null",
            "[]",
            "1",
            '"x"',
            "{}",
            "[" * 100_000,
            '{"a":' * 100_000,
            "[" + "[]," * 9,
            "1e999",
        ):
            for name in ("a.json", "a.jsonl"):
                yield f"{name} {text[:9]}", name, text.encode()


def run_data(home, stage, tmp_path, capsys, monkeypatch, part: slice) -> None:
    found = []
    for said, name, content in list(data_mutations(stage))[part]:
        path = tmp_path / name
        path.write_bytes(content)
        commands: list[list[Any]] = [
            [
                stage,
                "--train-data",
                path,
                "--base-model",
                home / "base",
                "--dry-run",
                "--use-cpu",
                *OPTIONS[stage],
            ],
            ["data", path],
        ]
        if stage == "sft":
            commands.append(
                ["infer", "--base-model", home / "base", "--data-file", path, "--max-new-tokens", 1]
            )
            commands[-1] += ["--predictions-file", tmp_path / "out.json", "--overwrite", "--use-cpu"]
        for arguments in commands:
            code, err = run(capsys, monkeypatch, *arguments)
            found.append((f"{arguments[0]}: {said}", ended_well(code, err)))
        path.unlink()
    check_all(found)


@pytest.mark.parametrize("stage", ROWS)
def test_some_mutations_of_data(stage, home, tmp_path, capsys, monkeypatch):
    run_data(home, stage, tmp_path, capsys, monkeypatch, slice(1, None, 150))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ROWS)
def test_every_mutation_of_data(stage, home, tmp_path, capsys, monkeypatch):
    run_data(home, stage, tmp_path, capsys, monkeypatch, slice(None))
