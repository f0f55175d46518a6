"""Which encoding a text has, and its bytes as UTF-8, so that everything behind reads UTF-8 only.

UTF-8 is read strictly. A file that is none is taken for GB18030 (which includes GBK and GB 2312) or for UTF-16 where
its text speaks for it; whatever fits nothing stays UTF-8, and the strict reading names the line that is wrong.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from medicalgpt_cli.engine.data import limits
from medicalgpt_cli.engine.data.containers import open_bytes
from medicalgpt_cli.engine.data.read_options import AS_FOUND, ReadOptions
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.fields import did_you_mean

KNOWN = (
    "utf-8", "gb18030", "gbk", "gb2312", "big5", "big5hkscs", "utf-16", "utf-16-le", "utf-16-be", "utf-32",
    "utf-32-le", "utf-32-be", "latin-1", "iso8859-15", "cp1250", "cp1251", "cp1252", "koi8-r", "shift_jis", "cp932",
    "euc_jp", "euc_kr", "cp949",
)  # fmt: skip
_SINGLE_BYTE = {"latin-1", "iso8859-15", "cp1250", "cp1251", "cp1252", "koi8-r"}
_CHUNK = 1 << 16
_ASCII = 1 << 24  # bytes from the front of a file in which a character beyond ASCII is looked for
_SAMPLE = 1 << 18  # bytes behind the first such character that are looked at
_OF_A_STREAM = 1 << 22  # bytes of a stream, which cannot be read twice
_EVERYDAY = 0.9  # share of a text's characters that speak for the encoding it is read in
_MANY, _BEHIND_HANGUL = 24, 0.15  # characters that tell Chinese from Korean, and the share of them
_BLANKS = "\t\n\v\f\r"


def check_encoding(name: str) -> str:
    """The encoding's own name: `GBK`, `utf8` and `cp936` are spellings.

    Raises:
        UsageError: no encoding, or none of a text.
    """
    own = {_codec(one): one for one in KNOWN} | {"utf-8-sig": "utf-8"}
    found = own.get(_codec(name))
    if found is None:
        near = did_you_mean(name.lower(), KNOWN)
        hint = f"did you mean {near}?" if near else f"one of: {', '.join(KNOWN)}"
        raise UsageError(f"--encoding {name}: no encoding that is known", hint)
    return found


def _codec(name: str) -> str:
    """Python's own name of an encoding, "" for one that it does not know."""
    try:
        return codecs.lookup(name).name
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        return ""


@contextmanager
def open_utf8(
    path: Path, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None
) -> Iterator[IO[bytes]]:
    """A file's text as UTF-8 bytes, unpacked and recoded. A line stays a line.

    Args:
        notices: takes a line where the text is read in another encoding than UTF-8.

    Raises:
        DataError, UnsafeRefused: as `open_bytes` does; while reading, a line that the encoding does not have.
    """
    encoding = reading.encoding
    if encoding is None:
        with open_bytes(path) as file:
            encoding = encoding_of(file)
        _note(str(path), encoding, notices)
    with open_bytes(path) as file:
        yield _recoded(file, encoding, str(path))


def stream_as_utf8(
    file: IO[bytes], name: str, reading: ReadOptions = AS_FOUND, notices: list[str] | None = None
) -> IO[bytes]:
    """As `open_utf8`, of a stream that can be read only once."""
    encoding = reading.encoding
    if encoding is None:
        head = file.read(_OF_A_STREAM)
        encoding = encoding_of(io.BytesIO(head))
        _note(name, encoding, notices)
        file = io.BufferedReader(_Joined(head, file))
    return _recoded(file, encoding, name)


def _recoded(file: IO[bytes], encoding: str, name: str) -> IO[bytes]:
    return file if encoding == "utf-8" else io.BufferedReader(_Recoded(file, encoding, name), 1 << 20)


def _note(name: str, encoding: str, notices: list[str] | None) -> None:
    said = f"{name}: read as {encoding.upper()}, because it is not UTF-8"
    if encoding != "utf-8" and notices is not None and said not in notices:
        notices.append(said)


# -- which encoding ----------------------------------------------------------------------------------------


def encoding_of(file: IO[bytes]) -> str:
    """utf-8, gb18030, utf-16, utf-16-le, utf-16-be or utf-32, from the front of a file.

    Looked at is the text behind the first character beyond ASCII. utf-8 is also the answer where none fits.
    """
    head = file.read(_CHUNK)
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8"
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\x00" in head:
        fitting = [one for one in ("utf-16-le", "utf-16-be") if _reads_well(head, one)]
        return max(fitting, key=lambda one: _ascii_of(head, one), default="utf-8")
    seen = 0
    while head.isascii():
        seen += len(head)
        head = file.read(_CHUNK)
        if not head or seen > _ASCII:
            return "utf-8"
    sample = head + file.read(_SAMPLE)
    return "gb18030" if _decoded(sample, "utf-8") is None and _is_gb18030(sample) else "utf-8"


def _is_gb18030(sample: bytes) -> bool:
    """Whether most lines beyond ASCII are no UTF-8 and together read well as GB18030.

    A few lines may be UTF-8: of either sort there can be some that are both, and reading names those that are not.
    """
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    others = [line for line in lines if _decoded(line, "utf-8") is None]
    read = [line for line in others if _decoded(line, "gb18030") is not None]
    most = len(read) > len(lines) - len(others) and len(read) >= _EVERYDAY * len(others)
    return most and _reads_well(b"\n".join(read), "gb18030")


def _ascii_of(raw: bytes, encoding: str) -> int:
    return sum(char < "\x80" for char in _decoded(raw, encoding) or "")


def _decoded(raw: bytes, encoding: str) -> str | None:
    """The text of bytes that may end within a character; None where they are none of this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(raw)
    except UnicodeDecodeError:
        return None


def _reads_well(raw: bytes, encoding: str) -> bool:
    """Whether it decodes to a text of everyday characters: Chinese (GB 2312) or, in UTF-16, also an alphabet's.

    GB18030 and UTF-16 give some character to nearly every byte, so that decoding alone proves nothing. Controls other
    than tabs and line ends are no text.
    """
    text = _decoded(raw, encoding)
    if text is None or any(char < " " and char not in _BLANKS for char in text):
        return False
    foreign = [char for char in text if char > "\x7f"]
    known = sum(_in_gb2312(char) or (encoding != "gb18030" and "\xa0" <= char < "\u0530") for char in foreign)
    return known >= _EVERYDAY * len(foreign) and not (encoding == "gb18030" and _is_of_a_neighbour(foreign))


def _is_of_a_neighbour(characters: list[str]) -> bool:
    """Whether it is Korean (EUC-KR) or Japanese (EUC-JP), whose bytes are all characters of GB 2312, too.

    GB 2312 has its everyday characters in the order of their pronunciation, from the lead byte 0xB0 to 0xD7, and a
    Chinese text has more than a third of its own behind 0xC8, where Hangul ends. It has no kana.
    """
    if sum("\u3041" <= char <= "\u30ff" for char in characters) > len(characters) // 10:
        return True
    leads = [char.encode("gb18030")[0] for char in characters if "\u4e00" <= char <= "\u9fff"]
    return len(leads) >= _MANY and sum(lead > 0xC8 for lead in leads) < _BEHIND_HANGUL * len(leads)


def _in_gb2312(char: str) -> bool:
    try:
        char.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


# -- to UTF-8 ----------------------------------------------------------------------------------------------


class _Recoded(io.RawIOBase):
    """The text of a file as UTF-8. A line that is wrong is named behind all lines in front of it."""

    def __init__(self, file: IO[bytes], encoding: str, name: str):
        self.file, self.encoding, self.name = file, encoding, name
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.by_lines = not encoding.startswith(("utf-16", "utf-32"))
        self.line, self.ready = 1, memoryview(b"")
        self.wrong: DataError | None = None
        self.at_start = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            if self.wrong is not None:
                raise self.wrong
            raw = self._read()
            text = self._decode(raw)
            if self.at_start and text:
                text, self.at_start = text.removeprefix("\ufeff"), False
            self.ready = memoryview(text.encode())
            if not raw and not self.ready and self.wrong is None:
                return 0
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def _read(self) -> bytes:
        raw = self.file.read(_CHUNK)
        if self.by_lines and raw and not raw.endswith(b"\n"):
            raw += self.file.readline(limits.LONGEST_RECORD)
        return raw

    def _decode(self, raw: bytes) -> str:
        if self.by_lines and not raw.isascii():
            raw = self._up_to_utf8(raw)
        try:
            text = self.decoder.decode(raw, final=not raw or self.wrong is not None)
        except UnicodeDecodeError as problem:
            text = problem.object[: problem.start].decode(problem.encoding, "replace")
            self.wrong = self._problem(f"not {self.encoding.upper()}", text.count("\n"))
        self.line += text.count("\n")
        return text

    def _up_to_utf8(self, raw: bytes) -> bytes:
        """What stands in front of the first line that is UTF-8: two files of two encodings were joined."""
        end = 0
        for number, line in enumerate(raw.split(b"\n")):
            if not line.isascii() and self._is_utf8(line):
                self.wrong = self._problem(f"this line is UTF-8, and not {self.encoding.upper()}", number)
                return raw[:end]
            end += len(line) + 1
        return raw

    def _is_utf8(self, line: bytes) -> bool:
        """Whether a line is UTF-8 and no text in the file's own encoding: a few bytes can be both."""
        text = _decoded(line + b"\n", "utf-8")  # behind an end of line nothing is cut short
        if text is None or self.encoding in _SINGLE_BYTE:
            return text is not None
        if self.encoding.startswith("gb"):
            return not _reads_well(line, self.encoding)
        return any(char > "\u07ff" for char in text)

    def _problem(self, message: str, lines: int) -> DataError:
        return DataError(
            message,
            "is it of another encoding, or of two? iconv converts a file; --encoding names one",
            at=f"{self.name}:{self.line + lines}",
        )


class _Joined(io.RawIOBase):
    """What was read of a stream already, and the rest of it."""

    def __init__(self, head: bytes, rest: IO[bytes]):
        self.head, self.rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.head[: len(buffer)] if self.head else self.rest.read(min(len(buffer), _CHUNK))
        self.head = self.head[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)
