"""Seconds and peak memory of reading and tokenising many rows of conversations, cold and from the cache.

    python -m tests.benchmarks.many_rows FOLDER [ROWS] [MODEL]

Writes FOLDER/rows-N.jsonl once (own text, made from a list of words), then runs `medgpt sft --dry-run` on it twice with
an empty cache in FOLDER, and prints what each run took. Peak memory is that of the largest process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

WORDS = [
    "fever",
    "cough",
    "thirst",
    "tiredness",
    "headache",
    "rash",
    "swelling",
    "dizziness",
    "nausea",
    "pain",
    "tablet",
    "dose",
    "water",
    "rest",
    "doctor",
    "clinic",
    "week",
    "morning",
    "evening",
    "child",
    "adult",
    "pressure",
    "sugar",
    "heart",
    "lung",
    "kidney",
    "skin",
    "发烧",
    "咳嗽",
    "头痛",
    "乏力",
    "血压",
    "血糖",
    "饮食",
    "休息",
    "复查",
]


def write_rows(path: Path, rows: int) -> None:
    choose = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            question = f"Case {number}: " + " ".join(choose.choices(WORDS, k=choose.randint(3, 8))) + "?"
            answer = " ".join(choose.choices(WORDS, k=choose.randint(4, 14))) + "."
            file.write(json.dumps({"instruction": question, "output": answer}, ensure_ascii=False) + "\n")


def measure(path: Path, home: Path, model: str) -> dict[str, object]:
    """One dry run in a process of its own: seconds, and MiB at the peak."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print('USED', used.ru_maxrss // 1024, int(used.ru_utime + used.ru_stime), file=sys.stderr)\n"
        "sys.exit(done.returncode)"
    )
    command = (
        sys.executable,
        "-m",
        "medicalgpt_cli",
        "sft",
        "--base-model",
        model,
        "--train-data",
        str(path),
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--dry-run", "--json"],
        env={**os.environ, "MEDGPT_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - begin
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    peak, used = next(line.split()[1:] for line in done.stderr.splitlines() if line.startswith("USED"))
    training = json.loads(done.stdout)["data"]["training"]
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": int(used),
        "peak_mib": int(peak),
        **{name: training[name] for name in ("read", "examples", "tokens")},
    }


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3_000_000
    model = sys.argv[3] if len(sys.argv) > 3 else "starter"
    folder.mkdir(parents=True, exist_ok=True)
    path, home = folder / f"rows-{rows}.jsonl", folder / "home"
    if not path.exists():
        write_rows(path, rows)
    shutil.rmtree(home, ignore_errors=True)
    print(json.dumps({"rows": rows, "megabytes": path.stat().st_size // 10**6, "cores": os.cpu_count()}))
    for name in ("cold", "warm"):
        print(json.dumps({"run": name, **measure(path, home, model)}), flush=True)
    size = sum(one.stat().st_size for one in (home / "examples").rglob("*") if one.is_file())
    print(json.dumps({"cache_megabytes": size // 10**6}))


if __name__ == "__main__":
    main()
