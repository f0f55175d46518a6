"""Make the starter: `python -m medicalgpt_cli.engine.starter.make CORPUS WORK`.

CORPUS is a folder with the files that docs/starter.md lists; WORK a new folder, in which `package/` becomes
what ships. The steps: choose the samples, train the tokenizer on the rest, pretrain with `medgpt pretrain
--from-config`, and let the result write the rejected answers of the sample pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from medicalgpt_cli.engine.starter import samples
from medicalgpt_cli.engine.starter.sources import write_sources
from medicalgpt_cli.engine.starter.tokenizer import CONTEXT, train_tokenizer
from medicalgpt_cli.working_folder import environment, python

VOCABULARY = 12_288
CHINESE_COUNTS = 5  # times as much as English in the tokenizer's training: the corpus has a fifth of it
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
}
HELD_OUT = ("pretrain/openstax_en_valid.jsonl", "pretrain/mixed_zh_valid.jsonl")


def texts(corpus: Path, without: set[str]) -> Iterator[tuple[str, str]]:
    """(language, text): textbooks, abstracts, classical books, and questions with their answers."""
    for name in ("openstax_en", "csl_zh", "tcm_classics_zh"):
        for row in samples.read(corpus, f"pretrain/{name}_train.jsonl"):
            if row["id"] not in without:
                yield row["lang"][:2], row["text"]
    for name in ("medquad_en", "huatuo26m_zh"):
        ask, say = ("Question: ", "Answer: ") if name.endswith("en") else ("问：", "答：")
        for row in samples.read(corpus, f"sft/{name}_alpaca.jsonl"):
            if row["id"] not in without:
                yield row["lang"], f"{ask}{row['instruction']}\n{say}{row['output']}"
    for row in samples.read(corpus, "sft/cmtmedqa_zh_sharegpt.jsonl"):
        if row["id"] not in without:
            speakers = {"human": "问：", "gpt": "答："}
            yield (
                row["lang"],
                "\n".join(speakers[turn["from"]] + turn["value"] for turn in row["conversations"]),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1900, help="updates of 4 blocks of 512 tokens")
    options = parser.parse_args()
    corpus, work = options.corpus, options.work
    files, taken = samples.choose(corpus)
    if not (work / "run" / "model").is_dir():
        train(corpus, work, taken, options.steps)
    package(work, files)


def train(corpus: Path, work: Path, without: set[str], steps: int) -> None:
    """Write the texts, the tokenizer and the configuration, and pretrain."""
    work.mkdir(parents=True)
    documents = list(texts(corpus, without))
    weighted = (
        text for language, text in documents for _ in range(CHINESE_COUNTS if language == "zh" else 1)
    )
    train_tokenizer(weighted, VOCABULARY).save_pretrained(work / "tokenizer")
    (work / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    for language in ("en", "zh"):
        rows = [{"text": text} for spoken, text in documents if spoken == language]
        samples.write(work / f"{language}.jsonl", rows)
    medgpt(
        "pretrain", "--from-config", work / "config.json", "--tokenizer-path", work / "tokenizer",
        "--train-data", f"{work / 'en.jsonl'}:0.5", "--train-data", f"{work / 'zh.jsonl'}:0.5",
        *(part for name in HELD_OUT for part in ("--eval-data", corpus / name)),
        "--block-size", 512, "--batch-size", 4, "--max-steps", steps, "--learning-rate", 1.5e-3,
        "--warmup-ratio", 0.02, "--weight-decay", 0.1, "--save-steps", 200, "--log-steps", 10,
        "--output-dir", work / "run",
    )  # fmt: skip


def package(work: Path, files: dict[str, list[samples.Row]]) -> None:
    """Write `package/model` in bf16 and `package/samples`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = work / "run" / "model"
    model, tokenizer = (one.from_pretrained(trained) for one in (AutoModelForCausalLM, AutoTokenizer))
    target = work / "package"
    model.to(torch.bfloat16).save_pretrained(target / "model")
    tokenizer.save_pretrained(target / "model")
    pairs = [row for name in ("pairs", "pairs_dev") for row in files[name]]
    samples.write(
        work / "ask.jsonl", [{"id": row["id"], "question": row["conversations"][0]["value"]} for row in pairs]
    )
    medgpt(
        "infer", "--base-model", target / "model", "--data-file", work / "ask.jsonl",
        "--predictions-file", work / "said.jsonl", "--max-new-tokens", 96, "--temperature", 0.8, "--seed", 1,
        "--overwrite",
    )  # fmt: skip
    said = {row["id"]: row["output"].strip() for row in samples.read(work, "said.jsonl")}
    (target / "samples").mkdir(exist_ok=True)
    for name, rows in files.items():
        if name.startswith("pairs"):
            rows = [samples.pair(row, said[row["id"]]) for row in rows]
        samples.write(target / "samples" / f"{name}.jsonl", rows)
    shutil.copyfile(Path(__file__).with_name("questions.txt"), target / "samples" / "questions.txt")
    for file in target.rglob("*.safetensors"):
        file.chmod(0o644)
    write_sources(target)


def medgpt(*arguments: object) -> None:
    command = python("-m", "medicalgpt_cli", *map(str, arguments))
    subprocess.run(command, env=environment(), check=True)


if __name__ == "__main__":
    main()
