"""Turn a document into text: `document_child.py FILE ENCODING`, within limits, as one JSON object.

A script of its own, that imports nothing of medgpt (engine/run/bounded.py). It opens no connection, starts no program
and reads no file but the document and the libraries' own: an audit hook ends it, whatever a document asks for.
"""

from __future__ import annotations

import importlib.util
import json
import mimetypes
import os
import re
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO
from xml.parsers import expat

NO_DOCUMENT = 65
LONG = 66
LOCKED = 67
OTHER_ENCODING = 68
NESTED = 69
REACHES_OUT = 70
_LONGEST = 64 * 1024 * 1024  # bytes of text
# An Office file may unpack to so many bytes, and beyond that to so many for each of its own.
_UNPACKED, _RATIO = 1 << 30, 200
_DEEPEST = 256  # elements within each other
# How an Office file begins that is locked, or older than its ending says.
_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_LIBRARIES = ("markitdown", "mammoth", "pptx", "lxml", "bs4", "markdownify", "pdfplumber", "pdfminer", "PIL")
_CID = re.compile(r"\(cid:\d+\)")  # a letter whose font does not say which it is
_PICTURE = re.compile(r"!\[([^\]\n]*)\]\([^)\n]*\)")
_SLIDE = re.compile(r"<!-- Slide number: \d+ -->\n?")


def stay_inside(document: Path) -> None:
    """From here on, nothing but the document and the installed libraries is opened."""
    mimetypes.init()  # which reads the system's list once, where there is one
    folders = {sysconfig.get_path(one) for one in ("stdlib", "platstdlib")}
    found = [importlib.util.find_spec(name) for name in _LIBRARIES]
    folders |= {str(Path(one.origin).parent.parent) for one in found if one is not None and one.origin}
    inside = tuple(os.path.realpath(one) + os.sep for one in folders)
    own, status = os.path.realpath(document), os.path.realpath("/proc/self/status")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib.")):
            os._exit(REACHES_OUT)
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes or not (path in (own, status) or path.startswith(inside)):
                os._exit(REACHES_OUT)

    sys.addaudithook(watch)


def convert(path: Path, encoding: str) -> dict[str, Any]:
    """The document's text, and for a PDF how many pages it has and which of them hold no text."""
    kind = path.suffix.lower()
    if kind == ".pdf":
        return _pdf(path)
    if kind in (".html", ".htm"):
        return _plain(_html(path.read_bytes(), encoding))
    with path.open("rb") as file:
        _check_zip(file, path.stat().st_size)
        return _plain(_office(file, kind))


def _plain(text: str) -> dict[str, Any]:
    text = _PICTURE.sub(r"\1", _SLIDE.sub("", text))
    return {"text": text.strip(), "pages": 0, "empty": []}


def _html(raw: bytes, encoding: str) -> str:
    try:
        text = raw.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError:
        sys.exit(OTHER_ENCODING)
    from markitdown.converters import HtmlConverter

    stay_inside(Path(sys.argv[1]))
    return HtmlConverter().convert_string(text, strict=True).markdown


def _check_zip(file: BinaryIO, size: int) -> None:
    """Refuse what the libraries would mend or follow: XML that is cut short, has entities or is a tower of elements."""
    if file.read(8).startswith(_OFFICE):
        sys.exit(LOCKED)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        if any(one.flag_bits & 1 for one in archive.infolist()):
            sys.exit(LOCKED)
        if sum(one.file_size for one in archive.infolist()) > max(_UNPACKED, _RATIO * size):
            raise MemoryError
        for one in archive.namelist():
            if one.endswith((".xml", ".rels")):
                with archive.open(one) as part:
                    _check_xml(part)
    file.seek(0)


def _check_xml(part: IO[bytes]) -> None:
    depth = 0

    def start(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            sys.exit(NESTED)

    def end(*_: object) -> None:
        nonlocal depth
        depth -= 1

    def doctype(*_: object) -> None:
        sys.exit(NO_DOCUMENT)

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = doctype  # Office files have none: it could only declare entities
    parser.ParseFile(part)


def _office(file: BinaryIO, kind: str) -> str:
    from markitdown import StreamInfo
    from markitdown.converters import DocxConverter, PptxConverter

    stay_inside(Path(sys.argv[1]))
    converter = DocxConverter() if kind == ".docx" else PptxConverter()
    return converter.convert(file, StreamInfo(extension=kind), strict=True).markdown


def _check_pdf(path: Path) -> None:
    """Refuse a file without its beginning or its end: the library would give the pages that it finds."""
    with path.open("rb") as file:
        head = file.read(1024)
        file.seek(max(0, path.stat().st_size - 4096))
        if b"%PDF-" not in head or b"%%EOF" not in file.read():
            sys.exit(NO_DOCUMENT)


def _pdf(path: Path) -> dict[str, Any]:
    _check_pdf(path)
    import pdfplumber
    from pdfminer.pdfdocument import PDFPasswordIncorrect
    from pdfplumber.utils.exceptions import PdfminerException

    stay_inside(path)
    texts, empty, size = [], [], 0
    try:
        with pdfplumber.open(path) as document:
            for number, page in enumerate(document.pages, 1):
                text = (page.extract_text() or "").strip()
                page.close()  # its letters take much more memory than its text
                letters = len(_CID.sub("", text))
                if not text or len(_CID.findall(text)) > letters // 4:
                    empty.append(number)
                    continue
                texts.append(text)
                size += len(text)
                if size > _LONGEST:
                    sys.exit(LONG)
    except PdfminerException as problem:
        if any(isinstance(one, PDFPasswordIncorrect) for one in problem.args):
            sys.exit(LOCKED)
        raise
    if not texts and not empty:
        sys.exit(NO_DOCUMENT)
    return {"text": "\n".join(texts), "pages": len(texts) + len(empty), "empty": empty}


def _memory_is_full() -> bool:
    """Whether the memory was nearly used up: libraries in C say in other words that they got none."""
    try:
        import resource

        peak = re.search(r"VmPeak:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return peak is not None and int(peak[1]) * 1024 > 0.9 * resource.getrlimit(resource.RLIMIT_AS)[0] > 0
    except (ImportError, OSError):
        return False


def main(path: Path, encoding: str) -> None:
    try:
        found = convert(path, encoding)
    except (MemoryError, ImportError, NameError):  # no fault of the document
        raise
    except RecursionError:
        sys.exit(NESTED)
    except Exception:  # a library says in its own way that a document is broken; never what stands in it
        if _memory_is_full():
            raise MemoryError from None
        sys.exit(NO_DOCUMENT)
    if len(found["text"].encode("utf-8", "replace")) > _LONGEST:
        sys.exit(LONG)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
