"""The first so many characters of plain-text records, for comparisons at equal training text.

    python tests/benchmarks/first_characters.py 80000 csl_zh_train.jsonl tcm_classics_zh_train.jsonl > zh80k.jsonl

Takes records in order, file by file; the last one is cut.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    left = int(sys.argv[1])
    for name in sys.argv[2:]:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"][:left]
            left -= len(text)
            if text:
                print(json.dumps({"text": text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
