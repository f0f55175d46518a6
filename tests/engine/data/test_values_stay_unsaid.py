"""No value of a record, and no key or role that could be one, in any message, log or record of a run."""

from __future__ import annotations

import copy
import json
import string
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data import formats
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.known_keys import KEYS, is_known
from medicalgpt_cli.engine.data.naming import keys_found, looks_like_a_name, role_name
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.data.prompts import load_rl_prompts
from medicalgpt_cli.engine.data.records import ANSWERS, QUESTIONS
from medicalgpt_cli.engine.generation.questions import read_questions
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import MedgptError
from tests.cli import medgpt
from tests.conftest import DATA
from tests.engine.data import office
from tests.tiny import tiny_model, write_jsonl

# No names by their looks; the last one looks like one, and stands in too few records.
SECRETS = ("Zorblatt Q. has a fever", "病人王小明住在解放路十七号三楼", "zorblatt@clinic", "Zorblatt")
GOOD_ROWS = 29  # with one bad one: a thirtieth is less than 5 %

FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]], "system": "s"},
    "qa": {"question": "a", "answer": "b"},
    "prompt": {"prompt": "a"},
    "text": {"text": "a"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "pair of messages": {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    },
    "mcq": {"question": "a", "options": {"A": "b", "B": "c"}, "answer": "A"},
}

READERS: dict[str, Callable[[str], Any]] = {
    "conversations": lambda path: _counted(formats.load_conversations, path),
    "prompts": lambda path: _counted(formats.load_prompts, path),
    "texts": lambda path: _counted(lambda *given: list(formats.iterate_texts(*given)), path),
    "pairs": lambda path: _counted(load_pairs, path),
    "rl": lambda path: _counted(load_rl_prompts, path),
    "first format": lambda path: formats.first_format([path]),
    "questions": read_questions,
}


def _counted(load: Callable, path: str) -> Any:
    counts = Counts()
    load([path], counts, Observer())
    return counts.as_dict()


def mutations(record: Any, secret: str) -> Iterator[Any]:
    """`record` with the secret as a key, as a value, as a role, and as values of every wrong kind."""
    if isinstance(record, dict):
        for key in record:
            kept = {name: value for name, value in record.items() if name != key}
            yield {secret: record[key], **kept}
            yield {**record, secret: record[key]}
            for wrong in (secret, None, 1, [secret], {secret: secret}, [[secret]], "", {}):
                yield {**record, key: wrong}
            for inner in mutations(record[key], secret):
                yield {**record, key: inner}
        yield {secret: secret}
    elif isinstance(record, list):
        for place, one in enumerate(record):
            for inner in mutations(one, secret):
                changed = copy.copy(record)
                changed[place] = inner
                yield changed


def broken_texts(record: Any, secret: str) -> Iterator[bytes]:
    """The record's line as no JSON, or as JSON that is refused."""
    line = json.dumps({**record, "note": secret}, ensure_ascii=False)
    quoted = json.dumps(secret, ensure_ascii=False)
    for text in (
        line[: len(line) - 3],
        line.replace('"', "'"),
        line[:-1] + ",}",
        f"{{{quoted}: 1, {quoted}: 2, {line[1:]}",
        f"{{{quoted}: NaN, {line[1:]}",
        f"{{{quoted}: {'[' * 5000}",
        line + quoted,
        quoted,
        f"[{line}]",
        line.replace(quoted, '"\\ud800' + quoted[1:]),
    ):
        yield text.encode()
    yield line.encode() + b"\xff"
    yield line.encode()[:-1] + b"\x00}"
    yield line.encode("utf-16")


def check(place: Path, secrets: tuple[str, ...]) -> None:
    for name, read in READERS.items():
        try:
            said = json.dumps(read(str(place)), default=lambda _: "", ensure_ascii=False)
        except MedgptError as problem:
            said = f"{problem.message}\n{problem.hint}\n" + "".join(traceback.format_exception(problem))
            assert "\n" not in problem.message, (name, problem.message)
            assert problem.hint, (name, problem.message)
        if name == "questions" and "Error" not in said:
            continue  # the questions themselves
        for secret in secrets:
            assert secret not in said, (name, place.read_bytes()[-300:])


@pytest.mark.parametrize("kind", FORMATS)
def test_records_of_every_format_with_something_wrong(kind, tmp_path):
    record = FORMATS[kind]
    good = "".join(json.dumps({**record, "id": number}) + "\n" for number in range(GOOD_ROWS)).encode()
    for place, secret in enumerate(SECRETS):
        lines = [json.dumps(one, ensure_ascii=False).encode() for one in mutations(record, secret)]
        for line in [*lines, *broken_texts(record, secret)][place :: len(SECRETS)]:  # each with one of them
            path = tmp_path / "data.jsonl"
            path.write_bytes(good + line + b"\n")
            check(path, (secret,))


@pytest.mark.parametrize("file", sorted(one.name for one in (DATA / "bad").glob("*.jsonl")))
def test_bad_files_with_a_secret_in_every_text(file, tmp_path):
    """Every Chinese word of the records is a patient's; none stands in what is said about the file."""
    raw = (DATA / "bad" / file).read_bytes()
    path = tmp_path / file
    path.write_bytes(raw)
    text = raw.decode("utf-8", "ignore")
    words = {
        text[at : at + 4]
        for at in range(len(text))
        if all("\u4e00" <= c <= "\u9fff" for c in text[at : at + 4])
    }
    check(path, tuple(word for word in words if len(word) == 4))


@pytest.mark.parametrize("secret", SECRETS[:3])
def test_tables_and_arrays(secret, tmp_path):
    for name, text in {
        "a.csv": f"question,{secret}\na,b\n",
        "b.csv": f'question,answer\na,b\n"{secret},b\n',
        "c.csv": f"question,answer\na,b\n{secret},b,c\n",
        "d.tsv": f"{secret}\tb\n{secret}\tc\n",
        "e.json": json.dumps([{"question": "a", secret: "b"}], ensure_ascii=False),
        "f.json": json.dumps({"data": [{"question": "a", secret: "b"}]}, ensure_ascii=False, indent=1),
        "g.json": f'[{{"question": "a", "answer": "{secret}"',
        "h.json": f'{{\n"question": "a", "{secret}": 1, "{secret}": 2}}',
    }.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        check(path, (secret,))


@pytest.mark.parametrize("secret", SECRETS[:3])
def test_workbooks_and_documents(secret, tmp_path):
    """As a header, twice, beside a cell without a header, as a sheet's name, and in a document that is damaged."""
    sheet = secret[:31]
    for number, rows in enumerate(
        (
            [[secret, "b"], ["a", "b"]],
            [[secret, secret], ["a", "b"]],
            [["question", ""], ["a", secret]],
            [[], [secret]],
        )
    ):
        check(
            office.xlsx(tmp_path / f"{number}.xlsx", {sheet: rows, f"{sheet[:30]}2": rows}), (secret, sheet)
        )
    (tmp_path / "a.docx").write_text(secret)
    (tmp_path / "b.pdf").write_text(secret)
    for name in ("a.docx", "b.pdf"):
        check(tmp_path / name, (secret,))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for number, secret in enumerate(SECRETS[:3]):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({secret: [secret]}), path)
        check(path, (secret,))


# -- what may be named --------------------------------------------------------------------------------------


def test_a_key_of_many_records_is_named_and_a_rare_one_is_not(tmp_path):
    rows = [{"question": "a", "outcome": "b"}] * 19 + [{"question": "a", "outcome": "b", "rare": "c"}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert keys_found(rows[-1], f"{path}:20") == "question, outcome, rare"  # 1 of 20 is 5 %
    path = write_jsonl(tmp_path / "more.jsonl", [rows[0]] * 20 + rows[-1:])
    assert keys_found(rows[-1], f"{path}:21") == "question, outcome, key 3"
    assert keys_found(rows[-1], "<stdin>:1") == "question, key 2, key 3"  # of a stream nothing is counted


def test_a_role_of_many_records_is_named(tmp_path):
    turns = [{"role": "doctor", "content": "a"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}] * 3)
    assert role_name("doctor", f"{path}:1") == "'doctor'"
    assert role_name("Dr. Zorblatt of ward 7", f"{path}:1") is None
    assert role_name("nurse", f"{path}:1") is None


def test_looks_of_a_name():
    assert all(looks_like_a_name(one) for one in ("a", "_x", "meta.Source-2", "A" * 32, "现病史", "病" * 12))
    for one in ("", "A" * 33, "2nd", "病" * 13, "a b", "é", "病a", "a\n", "病\n"):
        assert not looks_like_a_name(one)


def test_every_key_that_a_format_is_read_by_is_known():
    for record in FORMATS.values():
        assert set(record) <= KEYS
    assert {*QUESTIONS, *ANSWERS, "response_rejected", "system_prompt", "id"} <= KEYS


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=40), st.sampled_from(string.ascii_letters))
def test_no_key_of_a_single_record_of_a_stream_is_named(key, _):
    if not is_known(key):
        assert keys_found({key: 1}, "<stdin>:7") == "key 1"


# -- the whole program --------------------------------------------------------------------------------------


def test_two_records_with_one_id(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"id": SECRETS[1], "prompt": "a"}] * 2)
    with pytest.raises(MedgptError) as caught:
        read_questions(str(path))
    assert SECRETS[1] not in caught.value.message
    assert f"{path}:2" in caught.value.message and f"{path}:1" in caught.value.message


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("command", ["sft", "infer", "template"])
def test_streams_and_run_folders_of_a_failed_run(command, model, tmp_path):
    """With --debug, too: the traceback says where, and not what the record held."""
    secret = SECRETS[0]
    good = [{"id": n, "messages": FORMATS["messages"]["messages"]} for n in range(3)]
    bad = {"id": 9, "messages": [{"role": secret, "content": secret, secret: 1}]}
    options: list[Any] = ["--base-model", model, "--debug"]
    if command == "template":  # one that says what it was given
        said = [{"role": "user", "content": secret}, {"role": "assistant", "content": secret}]
        bad, command = {"id": 9, "messages": said}, "sft"
        template = tmp_path / "t.jinja"
        template.write_text("{{ raise_exception(messages[0]['content']) }}", encoding="utf-8")
        options = ["--base-model", tiny_model(tmp_path / "bare", "none"), "--debug", "--template", template]
        good = []
    data = write_jsonl(tmp_path / "data.jsonl", [*good, bad])
    if command == "sft":
        options += ["--train-data", data, "--output-dir", tmp_path / "run", "--max-steps", 1]
    else:
        options += ["--data-file", data, "--predictions-file", tmp_path / "out.jsonl"]
    done = medgpt(command, *options)
    assert done.returncode == 2, done.stderr
    written = [
        one.read_text("utf-8", "replace") for one in tmp_path.rglob("*") if one.is_file() and one != data
    ]
    for text in (done.stdout, done.stderr, *written):
        assert "Zorblatt" not in text


def test_a_foreign_error_in_the_data_keeps_its_text(tmp_path):
    """The traceback of --debug: lines and kinds, and no text of an error that arose over a record."""
    from medicalgpt_cli.terminal.traceback import safe_traceback

    class Broken(Observer):
        def on_task_start(self, *_: Any) -> None:
            raise KeyError(SECRETS[0])

    path = write_jsonl(tmp_path / "data.jsonl", [FORMATS["qa"]])
    try:
        try:
            formats.load_conversations([str(path)], Counts(), Broken())
        except KeyError as problem:
            raise RuntimeError(f"behind it: {problem}") from problem
    except RuntimeError as problem:
        said = safe_traceback(problem)
    assert SECRETS[0] not in said
    assert "KeyError" in said and "on_task_start" in said and "RuntimeError" in said
    try:
        raise RuntimeError("shapes differ")
    except RuntimeError as problem:
        assert "RuntimeError: shapes differ" in safe_traceback(problem)
