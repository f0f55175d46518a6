"""Small workbooks and documents, written anew for each test: where a library would hide what matters, by hand."""

from __future__ import annotations

import datetime
import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_OFFICE = "urn:oasis:names:tc:opendocument:xmlns"


def xlsx(path: Path, sheets: Mapping[str, Sequence[Sequence[Any]]], *, merged=(), hidden=()) -> Path:
    """A workbook. A cell can be a date or time, a truth value, `("=1+2", 3)` for a formula and its value, or None.

    Args:
        merged: (first row, first column, last row, last column, text) in the first sheet, from 0.
    """
    import xlsxwriter

    book = xlsxwriter.Workbook(str(path))
    formats = {
        datetime.datetime: book.add_format({"num_format": "yyyy-mm-dd hh:mm"}),
        datetime.date: book.add_format({"num_format": "yyyy-mm-dd"}),
        datetime.time: book.add_format({"num_format": "hh:mm:ss"}),
        datetime.timedelta: book.add_format({"num_format": "[h]:mm:ss"}),
    }
    for number, (name, rows) in enumerate(sheets.items()):
        sheet = book.add_worksheet(name)
        if name in hidden:
            sheet.hide()
        for place, row in enumerate(rows):
            for column, cell in enumerate(row):
                if isinstance(cell, tuple):
                    sheet.write_formula(place, column, cell[0], None, cell[1])
                elif type(cell) in formats:
                    sheet.write_datetime(place, column, cell, formats[type(cell)])
                elif cell is not None:
                    sheet.write(place, column, cell)
        for one in merged if number == 0 else ():
            sheet.merge_range(*one)
    book.close()
    return path


def ods(path: Path, sheets: Mapping[str, Sequence[Sequence[Any]]]) -> Path:
    """An OpenDocument spreadsheet of texts, numbers, truth values and dates."""
    tables = "".join(
        f'<table:table table:name="{escape(name)}">'
        + "".join(f"<table:table-row>{''.join(map(_ods_cell, row))}</table:table-row>" for row in rows)
        + "</table:table>"
        for name, rows in sheets.items()
    )
    names = " ".join(f'xmlns:{one}="{_OFFICE}:{one}:1.0"' for one in ("office", "table", "text"))
    body = f"<office:body><office:spreadsheet>{tables}</office:spreadsheet></office:body>"
    content = f'<?xml version="1.0"?><office:document-content {names}>{body}</office:document-content>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr("content.xml", content)
        archive.writestr("META-INF/manifest.xml", "<?xml version='1.0'?><manifest/>")
    return path


def _ods_cell(value: Any) -> str:
    if value is None:
        return "<table:table-cell/>"
    kind, attribute = {
        bool: ("boolean", "boolean-value"),
        int: ("float", "value"),
        float: ("float", "value"),
        datetime.date: ("date", "date-value"),
    }.get(type(value), ("string", ""))
    said = str(value).lower() if isinstance(value, bool) else str(value)
    about = f' office:{attribute}="{said}"' if attribute else ""
    inner = escape(said)
    return f'<table:table-cell office:value-type="{kind}"{about}><text:p>{inner}</text:p></table:table-cell>'


def locked(path: Path) -> Path:
    """What an Office program writes where a file has a password: a compound file with an encrypted package in it."""
    free, end, fat = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
    header = struct.pack(
        "<8s16xHHHHH6xIIIIIIIII", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0x3E, 3, 0xFFFE, 9, 6, 0, 1, 1, 0, 4096, end, 0,
        end, 0,
    )  # fmt: skip
    header += struct.pack("<109I", 0, *[free] * 108)
    size = 4096
    chain = [fat, end, *range(3, 2 + size // 512), end]
    table = struct.pack("<128I", *chain, *[free] * (128 - len(chain)))

    def entry(name: str, kind: int, child: int, start: int, length: int) -> bytes:
        spelt = name.encode("utf-16-le") + b"\0\0"
        return struct.pack(
            "<64sHBBIII16xIQQIQ", spelt if name else b"", len(spelt) if name else 0, kind, 1, free, free, child, 0, 0,
            0, start, length,
        )  # fmt: skip

    entries = entry("Root Entry", 5, 1, end, 0) + entry("EncryptedPackage", 2, free, 2, size)
    entries += entry("", 0, free, 0, 0) * 2
    path.write_bytes(header + table + entries + b"\0" * size)
    return path


def docx(path: Path, body: str, *, parts: Mapping[str, str] | None = None, head: str = "") -> Path:
    """A Word document. `body` is its XML, with paragraphs made by `paragraph`."""
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    types = (
        f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/><Override PartName="/word/document.xml" ContentType='
        '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
    )
    files = {
        "[Content_Types].xml": types,
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" '
        f'Type="{relation}/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'{head}<w:document xmlns:w="{word}" xmlns:r="{relation}"><w:body>{body}</w:body>'
        "</w:document>",
        **(parts or {}),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{escape(text)}</w:t></w:r></w:p>"


def pptx(path: Path, slides: Sequence[Sequence[str]]) -> Path:
    """Slides with a title and texts below it."""
    import pptx as library

    show = library.Presentation()
    for title, *texts in slides:
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = "\n".join(texts)
    show.save(str(path))
    return path


def pdf(path: Path, pages: Sequence[str | None], *, more: str = "") -> Path:
    """A PDF in Helvetica, a page a text; None is a page that holds a drawing only.

    Args:
        more: further entries of the catalogue.
    """
    objects = [f"<< /Type /Catalog /Pages 2 0 R {more} >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects += [f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    objects += ["<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for number, text in enumerate(pages):
        lines = "" if text is None else "".join(f"({line}) Tj 0 -20 Td " for line in text.split("\n"))
        stream = f"BT /F1 12 Tf 72 720 Td {lines}ET" if lines else "0 0 100 100 re f"
        objects += [
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            f"/Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * number} 0 R >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    out = io.BytesIO(b"")
    out.write(b"%PDF-1.4\n")
    places = []
    for number, one in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{one}\nendobj\n".encode("latin-1"))
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010} 00000 n \n" for place in places).encode())
    out.write(f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode())
    path.write_bytes(out.getvalue())
    return path
