"""Adapter and merged model, `infer` and `chat`: the same question gives the same greedy answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl


def answers(place: Path, flags: tuple[str, ...], questions: Path, name: str, tokens: int) -> list[str]:
    done = medgpt(
        *(
            "infer",
            *flags,
            "--data-file",
            questions,
            "--predictions-file",
            f"{name}.jsonl",
            "--dtype",
            "fp32",
        ),
        *("--max-new-tokens", tokens, "--use-cpu"),
        cwd=place,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / f"{name}.jsonl").read_text().split("\n") if line]
    return [row["output"] for row in rows]


def near_tie(base: Path, adapter: Path, question: str, ours: str, theirs: str) -> float:
    """How far apart the two likeliest tokens are where two answers part."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in (ours, theirs))
    same = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    with torch.no_grad():
        top = model.eval()(torch.tensor([prompt + one[:same]])).logits[0, -1].topk(2).values
    return float(top[0] - top[1])


def check(place: Path, base: Path, run: Path, questions: Path, tokens: int) -> None:
    merged = medgpt("merge-lora", "--lora-model", run, "--output-dir", "merged", cwd=place)
    assert merged.returncode == 0, merged.stderr
    print(merged.stderr)
    asked = questions.read_text(encoding="utf-8").splitlines()
    ours = answers(place, ("--lora-model", str(run)), questions, "adapter", tokens)
    theirs = answers(place, ("--base-model", "merged"), questions, "merged", tokens)
    plain = answers(place, ("--base-model", str(base)), questions, "base", tokens)
    assert ours != plain  # the adapter does something, so the comparison says something
    for question, a, b in zip(asked, ours, theirs, strict=True):
        if a != b:
            gap = near_tie(base, run / "model", question, a, b)
            print(f"differs behind a near-tie of {gap:.1e}: {question}")
            assert gap < 1e-4
    print(f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} answers are identical")
    said = medgpt(
        *("chat", "--lora-model", run, "--max-new-tokens", tokens, "--dtype", "fp32", "--use-cpu"),
        cwd=place,
        input=asked[0] + "\n",
    )
    assert said.stdout == ours[0] + "\n"


def test_a_tiny_model(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    rows = [{"question": f"What is {n}?", "answer": f"It is disease {n}. See a doctor."} for n in range(40)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    done = medgpt(
        *("sft", "--base-model", "model", "--train-data", train, "--learning-rate", "0.01", "--epochs", "2"),
        *("--eval-questions", "0", "--output-dir", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    questions = tmp_path / "q.txt"
    questions.write_text("".join(f"What is {'very ' * (n % 4)}{n}?\n" for n in range(12)))
    check(tmp_path, tmp_path / "model", tmp_path / "run", questions, 12)


@pytest.mark.slow
def test_fifty_real_questions(real_model: Path, full_data: Path, tmp_path: Path) -> None:
    done = medgpt(
        *("sft", "--base-model", real_model, "--train-data", full_data / "sft" / "medquad_en_alpaca.jsonl"),
        *(
            "--max-steps",
            "30",
            "--max-length",
            "256",
            "--batch-size",
            "2",
            "--eval-fraction",
            "0",
            "--use-cpu",
        ),
        *("--dtype", "fp32", "--output-dir", "run"),
        cwd=tmp_path,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    lines = (full_data / "eval" / "medquad_en_dev.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    questions = tmp_path / "q.txt"
    questions.write_text("".join(json.loads(line)["question"] + "\n" for line in lines), encoding="utf-8")
    check(tmp_path, real_model, tmp_path / "run", questions, 64)
