"""Which language a text is in: by its script, and more exactly where a library for that is installed."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable

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


_RECOGNISED = 300  # characters by which the library recognises a language
_NAMES = {"zh": "Chinese", "en": "Latin script", "other": "other"}


def count_languages(texts: Iterable[str]) -> tuple[Counter[str], str]:
    """How many texts are in which language, and by what that was told.

    With lingua installed a text in Latin script is told apart by its words, else only scripts are.
    """
    if importlib.util.find_spec("lingua") is None:
        return Counter(_NAMES[language_of(text)] for text in texts), "by script"
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
    found: Counter[str] = Counter()
    for text in texts:
        language = detector.detect_language_of(text[:_RECOGNISED])
        found["other" if language is None else language.name.capitalize()] += 1
    return found, "by words"
