"""Every text kind in every encoding that is recognised gives the same records; the line that fits none is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.encodings import check_encoding, encoding_of
from medicalgpt_cli.engine.data.read_options import ReadOptions
from medicalgpt_cli.engine.data.readers import read_rows
from medicalgpt_cli.engine.generation.questions import read_questions
from medicalgpt_cli.errors import DataError, UsageError

ROWS = [
    {"question": "孩子发烧三十九度怎么办？", "answer": "先物理降温，多喝水，\n必要时服用退烧药。"},
    {"question": "What is 高血压?", "answer": 'Blood pressure above 140/90, "high".'},
    {"question": "头痛，伴恶心", "answer": "建议到神经内科就诊"},
]
TEXT = "糖尿病患者应控制饮食。\n\nMetformin 是一线用药。\n第二段的第二行\n"


def spelled(name: str) -> str:
    if name.endswith((".txt", ".md")):
        return TEXT
    if name.endswith((".csv", ".tsv")):
        table = io.StringIO()
        writer = csv.DictWriter(
            table, ["question", "answer"], delimiter="\t" if name.endswith("tsv") else ","
        )
        writer.writeheader()
        writer.writerows(ROWS)
        return table.getvalue()
    if name.endswith(".json"):
        return json.dumps(ROWS, ensure_ascii=False, indent=1)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


MARKED = {
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-8": b"\xef\xbb\xbf",
    "utf-32-le": b"\xff\xfe\0\0",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.txt", "a.md"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_every_text_kind_in_every_encoding(name, packed, tmp_path):
    path = tmp_path / (name + packed)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    path.write_bytes(pack(spelled(name).encode()))
    expected = [(row.line, row.value) for row in read_rows(path)]
    assert len(expected) == 3
    for encoding in ("gb18030", "gbk", "utf-16-le", "utf-16-be"):
        for mark in (b"", MARKED.get(encoding, b"")):
            path.write_bytes(pack(mark + spelled(name).encode(encoding)))
            notices: list[str] = []
            assert [(row.line, row.value) for row in read_rows(path, notices=notices)] == expected, encoding
            assert len(notices) == 1 and str(path) in notices[0]
            assert ("GB18030" if encoding.startswith("gb") else "UTF-16") in notices[0]
    for encoding in ("utf-8", "utf-32-le"):
        path.write_bytes(pack(MARKED[encoding] + spelled(name).encode(encoding)))
        notices = []
        assert [(row.line, row.value) for row in read_rows(path, notices=notices)] == expected
        assert len(notices) == (encoding != "utf-8")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_questions_of_infer_from_files_and_from_a_stream(encoding, tmp_path, monkeypatch):
    raw = spelled("a.jsonl").encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(raw)
    counts = Counts()
    texts = [one.input for one in read_questions(str(tmp_path / "a.jsonl"), counts)]
    assert texts == [row["question"] for row in ROWS]
    assert any(encoding.upper()[:6] in one for one in counts.notices)

    class Standard:
        buffer = io.BytesIO(raw)

    monkeypatch.setattr(sys, "stdin", Standard)
    streamed = Counts()
    assert [one.input for one in read_questions("-", streamed)] == texts
    assert any("<stdin>" in one for one in streamed.notices)


# -- what is refused ----------------------------------------------------------------------------------------


def refused(path, line: int, *words: str, reading=None) -> list:
    rows = []
    with pytest.raises(DataError) as caught:
        for row in read_rows(path, reading=reading or ReadOptions()):
            rows.append(row.line)
    assert f"{path.name}:{line}: " in caught.value.message, caught.value.message
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"
    return rows


def test_two_encodings_in_one_file_are_refused_where_the_second_begins(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS * 40]
    path = tmp_path / "a.jsonl"
    for number, (first, second) in enumerate([("utf-8", "gb18030"), ("gb18030", "utf-8")]):
        for border in (1, 3, 60, 119):
            whole = [one.encode(first) for one in lines[:border]] + [
                one.encode(second) for one in lines[border:]
            ]
            path.write_bytes(b"\n".join(whole) + b"\n")
            try:
                rows = list(read_rows(path))
            except DataError as problem:
                at = int(problem.message.split(".jsonl:")[1].split(":")[0])
                assert at in (border + 1, 1) or (number == 1 and border < 5), (first, border, problem.message)
            else:
                raise AssertionError(f"{first}, then {second} from line {border + 1}: {len(rows)} rows")


def test_a_file_that_is_gb18030_but_for_one_line_keeps_the_rows_in_front(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False).encode("gb18030") for row in ROWS * 400]
    lines[1000] = json.dumps(ROWS[0], ensure_ascii=False).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert refused(path, 1001, "UTF-8", "GB18030") == list(range(1, 1001))
    lines[1000] = b'{"question": "\xff\xff"}'
    path.write_bytes(b"\n".join(lines))
    assert refused(path, 1001, "not GB18030") == list(range(1, 1001))


def test_bytes_that_are_no_text_are_no_gb18030(tmp_path):
    path = tmp_path / "a.txt"
    for seed in range(200):
        path.write_bytes(random.Random(seed).randbytes(seed + 8))
        with pytest.raises(DataError, match=r"a\.txt:\d+: "):
            list(read_rows(path))


def test_text_of_other_encodings_is_refused_and_read_where_it_is_named(tmp_path):
    path = tmp_path / "a.txt"
    for text, encoding in [
        ("Le médecin a prescrit un traitement à l'hôpital. Très élevé", "latin-1"),
        ("病患頭痛發燒，請問應該掛哪一科？醫師建議先觀察", "big5"),
        ("患者は頭痛を訴えている。検査が必要です", "shift_jis"),
        ("Пациент жалуется на боль", "cp1251"),
        (
            "환자는 두통과 발열을 호소하고 있으며 검사가 필요합니다. 충분한 휴식과 수분 섭취를 권합니다.",
            "euc_kr",
        ),
        ("患者は頭痛を訴えている。検査が必要です。十分な休息をとってください。", "euc_jp"),
    ]:
        path.write_bytes(text.encode(encoding))
        refused(path, 1, "not UTF-8", "--encoding")
        (row,) = read_rows(path, reading=ReadOptions(encoding=encoding))
        assert row.value == text


def test_a_forced_encoding_that_the_file_does_not_have(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("good\n" * 3 + "糖尿病\n", encoding="utf-8")
    for forced in ("gb18030", "big5", "latin-1", "shift_jis"):
        assert refused(path, 4, reading=ReadOptions(encoding=forced)) == [1, 2, 3], forced
    path.write_bytes("good\n糖尿病\n".encode("gb18030"))
    assert refused(path, 2, "not UTF-8", reading=ReadOptions(encoding="utf-8")) == [1]
    path.write_bytes("一\n二".encode("utf-16-le") + b"\x41")
    assert refused(path, 2, "UTF-16-LE", reading=ReadOptions(encoding="utf-16-le")) == [1]


def test_an_encoding_nobody_knows():
    assert [check_encoding(one) for one in ("GBK", "utf8", "UTF-8-SIG", "cp936", "Latin1")] == [
        *("gbk", "utf-8", "utf-8", "gbk", "latin-1")
    ]
    for name, hint in [("gb18300", "gb18030"), ("utf-61", "utf-16"), ("rot13", "one of"), ("idna", "one of")]:
        with pytest.raises(UsageError) as caught:
            check_encoding(name)
        assert hint in caught.value.hint
    for name in ("a\0b", "unicode_escape", "base64", "zlib", "", "utf-7"):
        with pytest.raises(UsageError):
            check_encoding(name)


# -- properties ---------------------------------------------------------------------------------------------

EVERYDAY = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少图山统接知较将组见计别她手角期根论运农指几九区强放决西被干做必战先回则任取据处理世车打南石七界府口究今办象"  # noqa: E501


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=EVERYDAY, min_size=4, max_size=60), st.text(alphabet="abc ,.\n1", max_size=40))
def test_everyday_chinese_is_recognised(chinese, ascii_text):
    for encoding, found in (("gb18030", "gb18030"), ("utf-8", "utf-8")):
        text = ascii_text + chinese
        raw = text.encode(encoding)
        try:
            both = raw.decode("utf-8") and encoding != "utf-8"
        except UnicodeDecodeError:
            both = False
        assert both or encoding_of(io.BytesIO(raw)) == found


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_no_utf8_file_is_taken_for_another_encoding(text):
    text = text.replace("\x00", "").removeprefix("\ufeff")
    assert encoding_of(io.BytesIO(text.encode())) == "utf-8"


def test_a_character_that_a_chunk_cuts_in_two(tmp_path):
    """Bytes around the borders of what is read at once."""
    path = tmp_path / "a.txt"
    for encoding in ("gb18030", "utf-16-le", "utf-16-be"):
        for front in range((1 << 16) - 3, (1 << 16) + 2):
            text = "x" * (front // (2 if "16" in encoding else 1)) + "糖尿病患者" * 30 + "\n第二行"
            path.write_bytes(text.encode(encoding))
            assert "\n".join(row.value for row in read_rows(path)) == text


def test_iconv_reads_the_same(tmp_path):
    """An independent program's idea of the same bytes."""
    text = "".join(chr(c) for c in range(0x4E00, 0x9FA6) if _in_gb2312(chr(c)))
    lines = [text[i : i + 40] for i in range(0, len(text), 40)]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode("gb18030"))
    done = subprocess.run(
        ["iconv", "-f", "GB18030", "-t", "UTF-8", str(tmp_path / "a.txt")], capture_output=True, check=True
    )
    assert [row.value for row in read_rows(tmp_path / "a.txt")] == done.stdout.decode().split("\n")


def _in_gb2312(char: str) -> bool:
    try:
        return bool(char.encode("gb2312"))
    except UnicodeEncodeError:
        return False
