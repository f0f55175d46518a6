"""Which language a text is in, as far as figures by language need to know: by its script."""

from __future__ import annotations

import re

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
_READ = 20_000  # characters that are looked at


def language_of(text: str) -> str:
    """ "zh" where Han characters make up over 30% of the letters, "en" where Latin ones over 50%, else "other"."""
    text = text[:_READ]
    letters = len(_LETTER.findall(text))
    if letters == 0:
        return "other"
    if len(_HAN.findall(text)) > 0.3 * letters:
        return "zh"
    return "en" if len(_LATIN.findall(text)) > 0.5 * letters else "other"
