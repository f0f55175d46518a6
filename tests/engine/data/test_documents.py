"""Documents become text, one a file, by a child process that reaches nothing else; hostile ones end at a bound."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data import document_child, documents, limits
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.documents import document_text
from medicalgpt_cli.engine.data.formats import first_format, iterate_texts, load_conversations, load_prompts
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.data.readers import expand_sources, read_rows
from medicalgpt_cli.engine.generation.questions import read_questions
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, EnvironmentFailure, UnsafeRefused
from tests.engine.data import office

HTML = (
    "<!doctype html><html><head><title>t</title><style>p {}</style></head><body><script>alert(1)</script>"
    "<h1>糖尿病</h1><p>控制&nbsp;饮食 &amp; 运动</p>"
    "<table><tr><th>药</th></tr><tr><td>二甲双胍</td></tr></table></body></html>"
)


def refused(path, kind, *words, notices=None):
    with pytest.raises(kind) as caught:
        document_text(path, notices=notices)
    said = f"{caught.value.message} {caught.value.hint}"
    assert str(path) in caught.value.message and caught.value.hint and "\n" not in said
    for word in words:
        assert word in said, said
    return said


def of_every_kind(folder: Path) -> dict[str, Path]:
    (folder / "d.html").write_text(HTML, encoding="utf-8")
    return {
        "docx": office.docx(
            folder / "a.docx", office.paragraph("糖尿病 <饮食>") + office.paragraph("第二段")
        ),
        "pptx": office.pptx(folder / "b.pptx", [["Title", "one", "two"], ["糖尿病", "three"]]),
        "pdf": office.pdf(folder / "c.pdf", ["First page\nof two lines", "Second page"]),
        "html": folder / "d.html",
    }


def test_the_text_of_every_kind(tmp_path):
    files = of_every_kind(tmp_path)
    text = {kind: document_text(path) for kind, path in files.items()}
    assert text["docx"] == "糖尿病 <饮食>\n\n第二段"
    assert text["pptx"] == "# Title\none\ntwo\n\n# 糖尿病\nthree"
    assert text["pdf"] == "First page\nof two lines\nSecond page"
    assert text["html"].startswith("# 糖尿病\n\n控制\xa0饮食 & 运动") and "二甲双胍" in text["html"]
    assert "alert" not in text["html"] and "p {" not in text["html"]


def test_one_document_a_file_for_pretraining_and_none_for_conversations(tmp_path):
    files = {kind: path for kind, path in of_every_kind(tmp_path).items() if kind in ("pdf", "html")}
    for kind in ("a.docx", "b.pptx"):
        (tmp_path / kind).unlink()  # these two take seconds
    counts = Counts()
    found = list(iterate_texts([str(tmp_path)], counts, Observer(), text_unit="line"))
    assert [one.at for one in found] == [f"{path}:1" for path in files.values()]
    assert first_format([str(tmp_path)]) == "text"
    for path in of_every_kind(tmp_path).values():
        for load in (load_conversations, load_prompts, load_pairs):
            with pytest.raises(DataError, match="a document has no questions and answers"):
                load([str(path)], Counts(), Observer())
        with pytest.raises(DataError, match="a document has no questions and answers"):
            read_questions(str(path))


def test_documents_of_a_folder_are_counted_where_they_are_of_no_use(tmp_path):
    of_every_kind(tmp_path)
    (tmp_path / "z.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    counts = Counts()
    assert len(load_conversations([str(tmp_path)], counts, Observer())) == 1
    assert any("4 files that hold no records" in one for one in counts.notices)
    assert len(expand_sources([str(tmp_path)], with_documents=True)[0]) == 5


def test_pages_without_text_are_counted(tmp_path):
    notices: list[str] = []
    path = office.pdf(tmp_path / "a.pdf", ["One", None, "Three", None])
    assert document_text(path, notices=notices) == "One\nThree"
    assert len(notices) == 1 and "2 of 4 pages hold no text" in notices[0] and "page 2" in notices[0]
    refused(office.pdf(tmp_path / "b.pdf", [None, None]), DataError, "none of its 2 pages holds text", "OCR")


def test_a_page_in_a_font_that_does_not_say_its_letters_holds_no_text(tmp_path):
    path = office.pdf(tmp_path / "a.pdf", ["\\(cid:12\\)\\(cid:7\\)\\(cid:88\\)"])
    refused(path, DataError, "none of its 1 pages holds text")


def test_a_web_page_in_gb18030_and_one_of_an_unknown_encoding(tmp_path):
    path = tmp_path / "a.html"
    path.write_bytes(HTML.encode("gb18030"))
    notices: list[str] = []
    assert "糖尿病" in document_text(path, notices=notices) and "GB18030" in notices[0]
    path.write_bytes("<p>élevé</p>".encode("latin-1"))
    refused(path, DataError, "another encoding", "--encoding")
    (tmp_path / "a.txt").write_text(HTML, encoding="utf-8")
    with pytest.raises(DataError, match="this is a web page"):
        list(read_rows(tmp_path / "a.txt"))


@pytest.mark.parametrize("kind", ["docx", "pptx", "pdf"])
def test_damaged_and_locked_documents(kind, tmp_path):
    path = of_every_kind(tmp_path)[kind]
    whole = path.read_bytes()
    for broken in (b"", b"no document", whole[: len(whole) // 2], whole[:-40], b"PK\x03\x04" + whole[40:]):
        path.write_bytes(broken)
        refused(path, DataError, "not a document of its kind")
    if kind != "pdf":
        refused(office.locked(path), DataError, "locked with a password")


def test_a_pdf_with_a_password(tmp_path):
    path = office.pdf(tmp_path / "a.pdf", ["One"])
    locked = path.read_bytes().replace(
        b"/Root 1 0 R",
        b"/Root 1 0 R /ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"41" * 32 + b"> /U <"
        + b"42" * 32 + b"> >>",
    )  # fmt: skip
    path.write_bytes(locked)
    refused(path, DataError, "locked with a password")


@pytest.mark.parametrize(
    "name", ["a.xml", "a.doc", "a.rtf", "a.wps", "a.ppt", "a.docx.gz", "a.xlsx.zst", "a.dat"]
)
def test_files_that_are_not_read_say_what_to_do(name, tmp_path):
    (tmp_path / name).write_bytes(b"<a/>")
    with pytest.raises(DataError) as caught:
        expand_sources([str(tmp_path / name)])
    expected = {
        ".doc": ".docx",
        ".rtf": ".docx",
        ".wps": ".docx",
        ".ppt": ".pptx",
        ".xml": ".jsonl",
        ".gz": "a.docx",
    }
    assert expected.get(Path(name).suffix, "") in caught.value.hint and name in caught.value.message


def test_without_the_extra(tmp_path, monkeypatch):
    path = of_every_kind(tmp_path)["docx"]
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    refused(path, EnvironmentFailure, "pip install 'medicalgpt-cli[documents]'")


def test_an_archive_that_says_it_unpacks_to_gigabytes(tmp_path):
    path = office.docx(tmp_path / "a.docx", office.paragraph("a"))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(
        b"PK\x01\x02"
    )  # of the last file in the archive's directory; its size stands 24 bytes behind
    raw[entry + 24 : entry + 28] = b"\xf0\xff\xff\x7f"
    path.write_bytes(raw)
    refused(path, UnsafeRefused, "MiB of memory")


@pytest.mark.slow
def test_a_document_beyond_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CHILD_MEMORY", 1 << 29)
    path = office.docx(tmp_path / "b.docx", office.paragraph("a") * 200_000)
    assert path.stat().st_size < 100_000
    refused(path, UnsafeRefused, "MiB of memory")


# -- hostile ones -------------------------------------------------------------------------------------------


def bomb(path: Path, part: str, content: bytes, times: int) -> Path:
    """A document with a part that is as long as one likes."""
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(path.with_suffix(".new"), "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            if name != part:
                new.writestr(name, old.read(name))
        with new.open(part, "w", force_zip64=True) as file:
            for _ in range(times):
                file.write(content)
    return path.with_suffix(".new").rename(path)


@pytest.mark.slow
def test_documents_that_unpack_to_gigabytes(tmp_path):
    path = bomb(office.docx(tmp_path / "a.docx", ""), "word/document.xml", b"<w:p/>" * 2**16, 3000)
    assert path.stat().st_size < 3_000_000
    refused(path, UnsafeRefused, "of memory")  # as the archive itself says


def test_a_document_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "DOCUMENT_SECONDS", 1)
    monkeypatch.setattr(limits, "DOCUMENT_SECONDS_A_MIB", 0)
    path = office.pdf(tmp_path / "a.pdf", ["Many words " * 200] * 100)
    refused(path, UnsafeRefused, "1 s")


def test_deeply_nested_pages(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<div>" * 5_000 + "text" + "</div>" * 5_000)
    refused(path, DataError, "nested too deeply")
    path = office.docx(tmp_path / "a.docx", "<w:sdt>" * 500 + "</w:sdt>" * 500)
    refused(path, DataError, "nested too deeply")


def test_entities_that_grow_and_entities_of_files(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("ZORBLATT")
    grown = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    head = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e0 "lol">{grown}]>'
    path = office.docx(tmp_path / "a.docx", "<w:p><w:r><w:t>&e9;</w:t></w:r></w:p>", head=head)
    refused(path, DataError, "not a document of its kind")
    head = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY f SYSTEM "file://{secret}">]>'
    path = office.docx(tmp_path / "b.docx", "<w:p><w:r><w:t>x&f;y</w:t></w:r></w:p>", head=head)
    refused(path, DataError, "not a document of its kind")


def test_links_are_not_followed(tmp_path):
    """Pictures, a style sheet and a frame somewhere else: nobody is asked, and no other file is read."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "secret.png").write_bytes(b"ZORBLATT")
        page = tmp_path / "a.html"
        page.write_text(
            f'<html><head><link rel=stylesheet href="{address}/css"></head><body><img src="{address}/img">'
            f'<iframe src="file://{tmp_path}/secret.png"></iframe><p>text</p></body></html>'
        )
        assert document_text(page).endswith("text")
        targets = [f"{address}/picture.png", f"file://{tmp_path}/secret.png", f"{tmp_path}/secret.png"]
        body = office.paragraph("text") + "".join(map(_linked_picture, range(len(targets))))
        path = office.docx(tmp_path / "a.docx", body, parts=_relations(targets))
        assert document_text(path) == "text"
    finally:
        server.shutdown()
    assert asked == []


def _linked_picture(number: int) -> str:
    drawing = "http://schemas.openxmlformats.org/drawingml/2006"
    return (
        f'<w:p><w:r><w:drawing><wp:inline xmlns:wp="{drawing}/wordprocessingDrawing"><wp:docPr id="1" name="p"/>'
        f'<a:graphic xmlns:a="{drawing}/main"><a:graphicData><pic:pic xmlns:pic="{drawing}/picture"><pic:blipFill>'
        f'<a:blip r:link="rId{number}"/></pic:blipFill></pic:pic></a:graphicData></a:graphic>'
        "</wp:inline></w:drawing></w:r>"
        "</w:p>"
    )


def _relations(targets: list[str]) -> dict[str, str]:
    office_relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006/relationships"
    entries = "".join(
        f'<Relationship Id="rId{number}" Type="{office_relation}/image" Target="{target}" TargetMode="External"/>'
        for number, target in enumerate(targets)
    )
    return {"word/_rels/document.xml.rels": f'<Relationships xmlns="{package}">{entries}</Relationships>'}


@pytest.mark.parametrize(
    "act",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "open('/etc/hostname').read()",
        "open('out.txt', 'w')",
        "import os; os.open('out.txt', os.O_WRONLY | os.O_CREAT)",
        "import pathlib; pathlib.Path('../../../../../../etc/passwd').read_text()",
    ],
)
def test_the_child_reaches_nothing_but_the_document(act, tmp_path):
    """Whatever a library did for a document: the audit hook ends the program in front of it."""
    document = tmp_path / "a.txt"
    document.write_text("text")
    folder = Path(document_child.__file__).parent
    start = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import document_child; from pathlib import Path\n"
    )
    start += f"document_child.stay_inside(Path({str(document)!r})); assert open({str(document)!r}).read() == 'text'\n"
    done = subprocess.run([sys.executable, "-c", start + act], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == document_child.REACHES_OUT, done.stderr
    assert not (tmp_path / "out.txt").exists()


def test_a_document_says_nothing_of_itself_in_an_error(tmp_path):
    path = office.docx(tmp_path / "a.docx", "<w:p>ZORBLATT")
    assert "ZORBLATT" not in refused(path, DataError, "not a document")
