"""`samples/SOURCES.md`: where the starter and its samples come from, with the SHA-256 of each file."""

from __future__ import annotations

import json
from pathlib import Path

from medicalgpt_cli.engine.run.files import sha256_file

# source as the records name it: (what it is, repository @ commit, licence)
SOURCES = {
    "CSL": ("abstracts of Chinese medical papers", "ydli-ai/CSL @ 0f1ac0626d584", "Apache-2.0"),
    "OpenStax": (
        "Anatomy and Physiology 2e, Microbiology, and the nursing series. Access for free at openstax.org. "
        "Changes: plain text; figures, equations, exercises and glossaries left out",
        "openstax/osbooks-anatomy-physiology @ fdfa6e21ac3bc^, openstax/osbooks-microbiology @ f1d8d4e994141^, "
        "openstax/osbooks-nursing-external-bundle @ 7876f90a3dbdc",
        "CC BY 4.0",
    ),
    "MedQuAD": (
        "questions and answers of the NIH (A. Ben Abacha, D. Demner-Fushman); changed to conversations",
        "abachaa/MedQuAD @ 577bd37b96c02",
        "CC BY 4.0",
    ),
    "Huatuo-26M": (
        "questions of patients and answers",
        "FreedomIntelligence/Huatuo-26M @ 369438b430239, records as in SupritYoung/Zhongjing @ a105934245c26",
        "Apache-2.0",
    ),
    "CMtMedQA": ("consultations of several turns", "SupritYoung/Zhongjing @ a105934245c26", "Apache-2.0"),
    "K-QA": ("questions of patients", "Itaymanes/K-QA @ ef403d012e199", "MIT"),
}
_HEAD = """# Sources of the starter and of its sample records

The text is for trying and testing software. It is no medical advice, and answers from patient forums contain errors.
The rejected answers of `pairs*.jsonl` were written by the starter itself. The starter was trained on other records of
the same sources (K-QA left out) and on six classical books of Chinese medicine (public domain by age).

| records named | what | repository | licence |
|---|---|---|---|
"""


def write_sources(package: Path) -> None:
    rows = [f"| {name} | {what} | {where} | {licence} |" for name, (what, where, licence) in SOURCES.items()]
    files = ["", "| file | records | SHA-256 |", "|---|---:|---|"]
    for file in sorted(package.glob("*/*")):
        if file.suffix in (".jsonl", ".safetensors"):
            count = _records(file) if file.suffix == ".jsonl" else ""
            files.append(f"| `{file.relative_to(package)}` | {count} | `{sha256_file(file)}` |")
    text = _HEAD + "\n".join([*rows, *files]) + "\n"
    (package / "samples" / "SOURCES.md").write_text(text, encoding="utf-8")


def _records(file: Path) -> int:
    return sum(1 for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line))
