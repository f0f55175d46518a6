"""Which records of the corpus ship as samples. They are left out of what the starter is trained on.

Every sample comes under CC BY 4.0, MIT or Apache-2.0; `samples/SOURCES.md` attributes them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_SHORT = 320  # characters of an answer in English; a Chinese one has a third


def read(corpus: Path, name: str) -> list[Row]:
    with (corpus / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def choose(corpus: Path) -> tuple[dict[str, list[Row]], set[str]]:
    """The sample files by name, and the ids of all records in them.

    Rejected answers of the pairs are not here yet: the starter writes them.
    """
    draw = random.Random(20261124)
    taken: set[str] = set()

    def some(rows: list[Row], count: int, fits: Callable[[Row], bool]) -> list[Row]:
        fitting = [row for row in rows if row["id"] not in taken and fits(row)]
        chosen = draw.sample(fitting, count)
        taken.update(row["id"] for row in chosen)
        return chosen

    def short(row: Row) -> bool:
        limit = _SHORT if row["lang"] == "en" else _SHORT // 3
        return (
            not row["input"] and limit // 4 < len(row["output"]) < limit and len(row["instruction"]) < limit
        )

    abstracts, modules = (
        read(corpus, "pretrain/csl_zh_train.jsonl"),
        read(corpus, "pretrain/openstax_en_train.jsonl"),
    )
    english, chinese = (
        read(corpus, "sft/medquad_en_alpaca.jsonl"),
        read(corpus, "sft/huatuo26m_zh_alpaca.jsonl"),
    )
    visits = read(corpus, "sft/cmtmedqa_zh_sharegpt.jsonl")
    files: dict[str, list[Row]] = {}
    for name, texts, talks, turns in (("", (36, 8), 60, 12), ("_dev", (12, 3), 20, 4)):
        files[f"pretrain{name}"] = [
            {key: row[key] for key in ("id", "source", "lang", "text")}
            for row in some(abstracts, texts[0], lambda row: True)
            + some(modules, texts[1], lambda row: 6_000 < len(row["text"]) < 14_000)
        ]
        files[f"sft{name}"] = [
            *map(_conversation, some(english, talks, short) + some(chinese, talks, short)),
            *some(visits, turns, lambda row: len(row["conversations"]) == 4 and _length(row) < 900),
        ]
        files[f"pairs{name}"] = list(
            map(_conversation, some(english, talks, short) + some(chinese, talks, short))
        )
    prompts = [
        row for row in read(corpus, "preference/ppo_prompts_en.jsonl") if 30 < len(row["prompt"]) < 120
    ]
    for name, count in (("", 64), ("_dev", 16)):
        files[f"prompts{name}"] = [
            *some(prompts, count, lambda row: True),
            *(
                {"id": row["id"], "source": row["source"], "lang": "zh", "prompt": row["instruction"]}
                for row in some(chinese, count, short)
            ),
        ]
    return files, taken


def _conversation(row: Row) -> Row:
    turns = [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]
    return {"id": row["id"], "source": row["source"], "lang": row["lang"], "conversations": turns}


def _length(row: Row) -> int:
    return sum(len(turn["value"]) for turn in row["conversations"])


def pair(row: Row, rejected: str) -> Row:
    """A conversation with the answer that a person wrote, and a worse one, cut to the same length."""
    question, answer = row["conversations"]
    chosen = answer["value"]
    return {
        **row,
        "conversations": [question],
        "chosen": chosen,
        "rejected": rejected[: len(chosen)].strip() or "…",
    }


def write(path: Path, rows: list[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
