"""`vocabulary.json`: what was added to a model's vocabulary, beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medicalgpt_cli import __version__
from medicalgpt_cli.engine.model.references import VOCABULARY
from medicalgpt_cli.engine.model.vocabulary_merge import Extension
from medicalgpt_cli.engine.model.vocabulary_pieces import Corpus
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import VocabularySettings

FORMAT = 1


def new_token_ids(folder: Path) -> list[int]:
    """The ids that `medgpt vocabulary` added to the model in `folder`; none where it added nothing.

    Raises:
        UsageError: its record is damaged.
    """
    path = folder / VOCABULARY
    if not path.is_file():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        first = record["first_new_id"]
        return list(range(first, first + len(record["new_tokens"]) + record["intermediate"]))
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is damaged", "was the copy complete?") from None


def sizes_of(base: int, extension: Extension, base_rows: int, rows: int) -> dict[str, int]:
    """Tokens and rows before (`base`, `base_rows`) and now, for the report."""
    end = extension.first_id + len(extension.ids)
    return {
        "base": base,
        "base_rows": base_rows,
        "new": len(extension.pieces),
        "intermediate": len(extension.ids) - len(extension.pieces),
        "rows": rows,
        "padding_rows": rows - end,
    }


def write_record(
    folder: Path, settings: VocabularySettings, corpus: Corpus, extension: Extension, report: dict[str, Any]
) -> None:
    """vocabulary.json. No time and no path stands in it: the same input gives the same file."""
    sizes = report["vocabulary"]
    trained = settings.sentencepiece_model is None
    record = {
        "format": FORMAT,
        "medgpt": __version__,
        "base": report["base"],
        "base_vocabulary": sizes["base"],
        "base_rows": sizes["base_rows"],
        "first_new_id": extension.first_id,
        "new_tokens": sorted(
            (
                {
                    "id": extension.ids[piece.symbols],
                    "token": piece.text,
                    "count": piece.count,
                    "was": piece.was,
                }
                for piece in extension.pieces
            ),
            key=lambda one: one["id"],
        ),
        "intermediate": sizes["intermediate"],
        "rows": sizes["rows"],
        "padding_rows": sizes["padding_rows"],
        "settings": {
            "algorithm": settings.algorithm if trained else None,
            "size": settings.size if trained else None,
            "character_coverage": settings.character_coverage if trained else None,
            "sentencepiece_model": report["sentencepiece"]["given"],
            "text_unit": settings.text_unit,
            "encoding": settings.encoding,
            "sheet": settings.sheet,
            "columns": list(settings.columns),
            "min_count": settings.min_count,
            "max_new": settings.max_new,
            "pad_to_multiple": settings.pad_to_multiple,
            "dtype": report["dtype"],
        },
        "corpus": asdict(corpus),
        "report": report,
    }
    (folder / VOCABULARY).write_text(
        json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
