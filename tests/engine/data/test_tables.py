"""Tables of every kind: what divides the columns, what a header may be, which sheet, and how cells become text."""

from __future__ import annotations

import csv
import datetime
import io
import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.read_options import ReadOptions
from medicalgpt_cli.engine.data.readers import read_rows
from medicalgpt_cli.engine.data.reading import parse_columns, reading_options
from medicalgpt_cli.engine.data.tables import find_delimiter
from medicalgpt_cli.engine.generation.questions import counts_of_questions, read_questions
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, UnsafeRefused, UsageError
from medicalgpt_cli.settings.stages import InferSettings, InspectDataSettings
from tests.conftest import DATA
from tests.engine.data import office


def rows(path, notices=None, **reading):
    return [(row.line, row.value) for row in read_rows(path, notices=notices, reading=ReadOptions(**reading))]


def values(path, notices=None, **reading):
    return [value for _, value in rows(path, notices, **reading)]


def refused(path, *words, kind=DataError, **reading):
    with pytest.raises(kind) as caught:
        rows(path, **reading)
    said = f"{caught.value.message} {caught.value.hint}"
    assert str(path) in caught.value.message and caught.value.hint and "\n" not in caught.value.message
    for word in words:
        assert word in said, said
    return said


# -- what divides the columns -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("delimiter", "said"), [(",", "commas"), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
)
def test_the_delimiter_is_found_and_said(name, delimiter, said, tmp_path):
    path = tmp_path / name
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    expected = [["问题", "回答"], ["头痛, 发烧; 咳嗽|\t?", 'one "two"\nthree'], ["b", "c; d, e | f\tg"]]
    writer.writerows(expected)
    path.write_text(table.getvalue(), encoding="utf-8", newline="")
    notices: list[str] = []
    assert values(path, notices) == [dict(zip(expected[0], row, strict=True)) for row in expected[1:]]
    own = {"a.csv": ",", "a.tsv": "\t"}[name] == delimiter
    assert (notices == []) == own and (own or said in notices[0])


def test_a_table_of_one_column_stays_one(tmp_path):
    path = tmp_path / "a.csv"
    for header in ("text", "text; and more", '"a, b"'):
        path.write_text(f'{header}\none; two\n"three, four | five"\n')
        notices: list[str] = []
        assert [list(row.values()) for row in values(path, notices)] == [["one; two"], ["three, four | five"]]
        assert notices == []
    path.write_text("text\none, two\n")
    refused(path, ":2:", "1 columns were expected, this row has 2")


def test_the_ending_decides_where_two_would_do_and_a_stated_delimiter_everywhere(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a;b,c;d\n1;2,3;4\n")
    assert values(path) == [{"a;b": "1;2", "c;d": "3;4"}]
    path.write_text("a;b|c;d\n1;2|3;4\n")
    refused(path, "semicolons or vertical bars")
    path.write_text("sep=|\r\na;b|c;d\r\n1;2|3;4\r\n")
    assert rows(path) == [(3, {"a;b": "1;2", "c;d": "3;4"})]
    path.write_text("question,answer\na,b\nc\n")  # a mistake in a row is no other delimiter
    refused(path, ":3:", "2 columns were expected, this row has 1")


def test_a_delimiter_is_found_from_a_bounded_part(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question;answer\n" + "a, b;c\n" * 5000 + "x;y;z\n")
    refused(path, ":5002:", "2 columns")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(",;\t|"),
    st.lists(
        st.lists(st.text("ab,;|\t\"\n '问", min_size=1, max_size=8), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    ),
)
def test_what_the_csv_module_writes_is_read_back(delimiter, cells):
    table = io.StringIO()
    csv.writer(table, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["q", "a", "c"], *cells])
    lines = table.getvalue().splitlines(keepends=True)
    assert find_delimiter(lines, ",", "a.csv") == (delimiter, False)


# -- header and rows ----------------------------------------------------------------------------------------


def test_names_are_trimmed_and_empty_rows_and_columns_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n,,\n \u3000问题 ,\ufeffanswer\u200b,\na, b ,\n,,\n\nc,d,\n", encoding="utf-8-sig")
    notices: list[str] = []
    assert rows(path, notices) == [(4, {"问题": "a", "answer": " b "}), (7, {"问题": "c", "answer": "d"})]
    assert len(notices) == 1 and "1 rows are empty" in notices[0]


def test_tables_that_were_joined_with_their_headers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\na,b\n question,answer\nc,d\nquestion,e\n")
    notices: list[str] = []
    assert [row["question"] for row in values(path, notices)] == ["a", "c", "question"]
    assert notices == [f"{path}: 1 rows repeat the header and are left out"]
    path.write_text("text\ntext\n")  # of one column it may be a text
    assert values(path) == [{"text": "text"}]


def test_two_columns_of_one_name_and_one_without(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,x,question\na,b,c\n")
    assert "columns 1 and 3 have the same name, question" in refused(path, ":1:")
    path.write_text("王小明,x, 王小明\na,b,c\n", encoding="utf-8")
    assert "王小明" not in refused(path, "columns 1 and 3 have the same name")
    path.write_text("question,,answer\na,,c\nd,e,f\n")
    refused(path, ":3:", "column 2 holds a value here and has no name")


def test_a_header_of_a_million_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"c{number}" for number in range(1_000_000)) + "\n")
    refused(path, ":1:", "more than 16,384 columns")


def test_line_ends_of_every_kind(tmp_path):
    path = tmp_path / "a.csv"
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(f'q,a{end}1,"two{end}lines"{end}3,4{end}'.encode())
        assert [row["q"] for row in values(path)] == ["1", "3"]
        assert rows(path)[-1][0] == 4  # the record's last line


# -- workbooks ----------------------------------------------------------------------------------------------

CELLS = {
    12.0: "12", 12.5: "12.5", 0.1 + 0.2: "0.3", -3: "-3", 1e15: "1000000000000000", 2**53: "9007199254740992",
    1.5e-7: "1.5e-07", True: "true", False: "false", "12": "12", " spaced ": " spaced ",
    "第一行\n第二行": "第一行\n第二行",
    datetime.date(2026, 1, 31): "2026-01-31",
}  # fmt: skip


def test_cells_become_text_in_one_way(tmp_path):
    only_xlsx = {
        datetime.datetime(2026, 1, 31, 8, 30): "2026-01-31 08:30:00",
        datetime.datetime(2026, 1, 31, 23, 59, 59): "2026-01-31 23:59:59",
        datetime.time(8, 30): "08:30:00",
        datetime.timedelta(hours=26, minutes=5): "26:05:00",
        ("=1+2", 3): "3",
        ('="a"&"b"', "ab"): "ab",
    }
    path = office.xlsx(
        tmp_path / "a.xlsx", {"S": [["q", "a"], *([key, "x"] for key in [*CELLS, *only_xlsx])]}
    )
    assert [row["q"] for row in values(path)] == [*CELLS.values(), *only_xlsx.values()]
    path = office.ods(
        tmp_path / "a.ods", {"S": [["q", "a"], *([key, "x"] for key in CELLS if "\n" not in str(key))]}
    )
    assert [row["q"] for row in values(path)] == [text for text in CELLS.values() if "\n" not in text]


@pytest.mark.parametrize("write", [office.xlsx, office.ods])
def test_the_first_sheet_with_data_is_read_and_the_others_are_named(write, tmp_path):
    book = {
        "cover": [],
        "问答": [[], ["question", "answer"], ["a", "b"], [None, None], ["c", "d"]],
        "more": [["question", "answer"], ["e", "f"]],
        "last": [["question"], ["g"], ["h"]],
    }
    path = write(tmp_path / f"a.{write.__name__}", book)
    notices: list[str] = []
    assert rows(path, notices) == [
        (3, {"question": "a", "answer": "b"}),
        (5, {"question": "c", "answer": "d"}),
    ]
    assert f"{path}: sheet 2 of 4 is read; left out: sheet 3 (2 rows), sheet 4 (3 rows)" in notices[0]
    assert "--sheet" in notices[0] and "1 rows are empty" in notices[1]
    assert values(path, sheet="more") == values(path, sheet="3") == [{"question": "e", "answer": "f"}]
    refused(path, "no sheet moree", "did you mean more?", sheet="moree")
    refused(path, "numbers: 1 to 4", sheet="9")
    assert values(path, sheet="cover") == []


def test_one_sheet_needs_no_word_and_a_hidden_one_comes_last(tmp_path):
    path = office.xlsx(tmp_path / "a.xlsx", {"S": [["q"], ["a"]]})
    notices: list[str] = []
    assert values(path, notices) == [{"q": "a"}] and notices == []
    path = office.xlsx(tmp_path / "b.xlsx", {"X": [["q"], ["a"]], "Y": [["q"], ["b"]]}, hidden=("Y",))
    assert values(path, notices) == [{"q": "a"}] and "sheet 2 (2 rows, hidden)" in notices[0]
    path = office.xlsx(tmp_path / "c.xlsx", {"S": [], "T": []})
    assert values(path) == []


def test_merged_cells_count_in_each_row_and_over_columns_are_refused(tmp_path):
    table = [["dept", "q"], [None, "a"], [None, "b"], ["eye", "c"], [None, None], [None, "d"]]
    path = office.xlsx(tmp_path / "a.xlsx", {"S": table}, merged=[(1, 0, 2, 0, "heart"), (3, 0, 5, 0, "eye")])
    notices: list[str] = []
    found = values(path, notices)
    assert [(row["dept"], row["q"]) for row in found] == [
        ("heart", "a"),
        ("heart", "b"),
        ("eye", "c"),
        ("eye", "d"),
    ]
    assert any("2 cells that are merged over rows" in one for one in notices)
    path = office.xlsx(
        tmp_path / "b.xlsx", {"S": [["q", "a"], ["x", "y"]]}, merged=[(2, 0, 2, 1, "part two")]
    )
    refused(path, f"{path}:3:", "merged over several columns")
    path = office.xlsx(
        tmp_path / "c.xlsx", {"S": [[], ["q", "a"], ["x", "y"]]}, merged=[(0, 0, 0, 1, "A title")]
    )
    refused(path, f"{path}:1:", "title")


def test_merged_cells_of_an_opendocument_sheet_are_said(tmp_path):
    path = office.ods(tmp_path / "a.ods", {"S": [["dept", "q"], ["eye", "a"], [None, "b"]]})
    notices: list[str] = []
    assert len(values(path, notices)) == 2 and notices == []
    merged = tmp_path / "b.ods"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(merged, "w") as new:
        for name in old.namelist():
            spanned = (
                b'<table:table-cell table:number-rows-spanned="2" office:value-type="string"><text:p>eye'
            )
            content = old.read(name).replace(
                b'<table:table-cell office:value-type="string"><text:p>eye', spanned
            )
            new.writestr(name, content)
    assert [row["dept"] for row in values(merged, notices)] == ["eye", ""]
    assert "cells are merged" in notices[0] and ".xlsx" in notices[0]


def test_an_old_workbook_and_what_only_looks_like_one(tmp_path):
    assert values(DATA / "tables" / "old.xls") == [
        {"问题": "头痛怎么办？", "回答": "先休息，再观察。", "年龄": "12", "日期": "2026-01-31"}
    ]
    for name in ("a.xlsx", "a.xls", "a.ods"):
        path = tmp_path / name
        for content in (
            b"",
            b"question,answer\na,b\n",
            b"PK\x03\x04 broken",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 100,
        ):
            path.write_bytes(content)
            refused(path, "not a workbook")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("xl/workbook.xml", "<no")
        refused(path, "not a workbook")
    refused(office.locked(tmp_path / "locked.xlsx"), "locked with a password")


def test_a_small_workbook_of_gigabytes(tmp_path, monkeypatch):
    """A gigabyte of one text, and a sheet whose cells stand for it a million times."""
    path = office.xlsx(tmp_path / "a.xlsx", {"S": [["q"], ["a"]]})
    bomb = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "xl/sharedStrings.xml":
                content = content.replace(b"<t>a</t>", b"<t>" + b"a" * 100_000 + b"</t>")
            if name == "xl/worksheets/sheet1.xml":
                cells = "".join(
                    f'<row r="{row}"><c r="A{row}" t="s"><v>1</v></c></row>' for row in range(3, 60_000)
                )
                content = content.replace(b"</sheetData>", cells.encode() + b"</sheetData>")
            new.writestr(name, content)
    assert bomb.stat().st_size < 1_000_000
    monkeypatch.setattr(limits, "CHILD_MEMORY", 1 << 29)  # reached sooner than the real one
    refused(bomb, "MiB of memory", kind=UnsafeRefused)


def test_a_workbook_with_one_cell_in_the_last_corner(tmp_path):
    """Seventeen billion empty cells lie in front of it."""
    path = office.xlsx(tmp_path / "a.xlsx", {"S": [["q"], ["a"]]})
    far = tmp_path / "far.xlsx"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(far, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "xl/worksheets/sheet1.xml":
                content = content.replace(
                    b"</sheetData>", b'<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData>'
                )
            new.writestr(name, content)
    refused(far, "MiB of memory", ".csv", kind=UnsafeRefused)


# -- other names for columns --------------------------------------------------------------------------------


def test_columns_are_renamed_in_tables_and_records(tmp_path):
    table = [["患者描述", "医生意见", "备注"], ["头痛", "休息", "x"]]
    (tmp_path / "a.csv").write_text("\n".join(map(",".join, table)), encoding="utf-8")
    office.xlsx(tmp_path / "a.xlsx", {"S": table})
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(zip(*table, strict=True))), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([dict(zip(*table, strict=True))]), encoding="utf-8")
    columns = parse_columns(["question=患者描述,answer=医生意见"])
    for name in ("a.csv", "a.xlsx", "a.jsonl", "a.json"):
        path = tmp_path / name
        assert values(path, columns=columns) == [{"question": "头痛", "answer": "休息", "备注": "x"}]
        (one,) = load_conversations([str(path)], Counts(reading=ReadOptions(columns=columns)), Observer())
        assert [turn["content"] for turn in one.messages] == ["头痛", "休息"]
        asked = InferSettings(
            data_file=str(path), predictions_file="-", columns=("question=患者描述", "answer=医生意见")
        )
        (question,) = read_questions(str(path), counts_of_questions(asked))
        assert question.input == "头痛"


def test_names_that_are_swapped_and_names_that_collide(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"x": "b", "answer": "c"}\n')
    swap = (("question", "answer"), ("answer", "question"))
    assert values(path, columns=swap)[0] == {"answer": "q", "question": "a"}
    refused(path, ":2:", "has a key answer of its own", columns=(("answer", "x"),))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question", "no key=column"),
        ("question=", "no key=column"),
        ("=x", "no key=column"),
        ("qestion=x", "did you mean question?"),
        ("患者描述=question", "the key stands in front: question=患者描述"),
        ("question=a,question=b", "question is named twice"),
        ("question=a,answer=a", "a is named twice"),
        ("question=question", "it changes nothing"),
        ("zorblatt=x", "for example question, answer"),
        ("category=x", "category is no key that records are read by"),
    ],
)
def test_columns_that_make_no_sense(text, words):
    with pytest.raises(UsageError) as caught:
        parse_columns([text])
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_a_name_with_commas_and_spaces():
    assert parse_columns(["question=Name, as given (a=b), answer = x y", "system=s"]) == (
        *(("question", "Name, as given (a=b)"), ("answer", "x y"), ("system", "s")),
    )


def test_signs_of_a_chinese_keyboard():
    assert parse_columns(["question＝患者问题，answer=医生回答"]) == (
        ("question", "患者问题"),
        ("answer", "医生回答"),
    )


def asked(path, **options):
    return reading_options(InspectDataSettings(files=(str(path),), **options), [str(path)])


def test_a_column_that_is_nowhere(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("患者描述,answer,Zorblatt of ward 7\n" + "a,b,c\n" * 20, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        asked(path, columns=("question=患者叙述",))
    assert "has a 患者叙述" in caught.value.message and "did you mean 患者描述?" in caught.value.hint
    with pytest.raises(DataError) as caught:
        asked(path, columns=("question=Zorblatt of ward 6",))
    assert "ward 7" not in caught.value.hint and "key 3" in caught.value.hint  # it looks like no name
    assert asked(path, columns=("question=患者描述",)).columns == (("question", "患者描述"),)


def test_options_that_are_about_no_file(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\nc,d\n")
    office.xlsx(tmp_path / "a.xlsx", {"S": [["q"], ["a"]]})
    for name, options, words in [
        ("a.csv", {"sheet": "S"}, "is no workbook"),
        ("a.xlsx", {"encoding": "gbk"}, "says itself"),
        ("a.csv", {"encoding": "gbkk"}, "no encoding"),
    ]:
        with pytest.raises(UsageError) as caught:
            asked(tmp_path / name, **options)
        assert words in caught.value.message and caught.value.hint


def test_a_second_look_at_a_file_reads_it_as_the_first(tmp_path):
    """Whether the numbers of an exam count from 0 or 1 is found from all of its records: of the sheet that is read."""
    head = ["题目", "opa", "opb", "opc", "opd", "cop"]
    first = [head, ["1?", "a", "b", "c", "d", 4]]
    second = [head, ["2?", "e", "f", "g", "h", 0], ["3?", "i", "j", "k", "l", 2]]
    path = office.xlsx(tmp_path / "a.xlsx", {"one": first, "two": second})
    counts = Counts(reading=ReadOptions(sheet="two"))
    found = load_conversations([str(path)], counts, Observer())
    assert "e" in found[0].messages[-1]["content"] and "k" in found[1].messages[-1]["content"]
