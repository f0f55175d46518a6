"""Adapter and merged model, `infer`, `chat` and the API: the same question gives the same greedy answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.tool_messages import as_functions
from medicalgpt_cli.engine.generation.conversation import Conversation
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import ChatSettings
from tests.cli import medgpt
from tests.serving.running import running
from tests.talker import CALL, QUESTION, RESULT, TOOLS, talker
from tests.tiny import text, tiny_model, write_jsonl


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


def test_thoughts_and_calls_are_the_same_everywhere(tmp_path: Path) -> None:
    """A record with tools and reasoning in `infer`, `chat` and the API: the same tokens, taken apart the same way."""
    folder = talker(tmp_path / "model", "qwen3")
    tools = as_functions(TOOLS)
    call = {"id": "c1", "type": "function", "function": {
        "name": "dose", "arguments": json.dumps(CALL["tool_calls"][0]["arguments"])}}  # fmt: skip
    called = {
        "role": "assistant",
        "content": None,
        "reasoning_content": CALL["reasoning"],
        "tool_calls": [call],
    }
    result = {"role": "tool", "tool_call_id": "c1", "content": RESULT["content"]}
    asked = [[QUESTION], [QUESTION, called, result]]
    write_jsonl(tmp_path / "in.jsonl", [{"messages": one, "tools": tools} for one in asked])
    done = medgpt(
        *("infer", "--base-model", folder, "--data-file", "in.jsonl", "--predictions-file", "out.jsonl"),
        *("--max-new-tokens", 120, "--dtype", "fp32", "--use-cpu"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with running(folder, max_new_tokens=120) as server, server.client() as client:
        for row, messages in zip(rows, asked, strict=True):
            body = {"model": "model", "messages": messages, "tools": tools}
            reply = client.post("/v1/chat/completions", json=body).json()
            choice = reply["choices"][0]
            message = choice["message"]
            assert (message["content"] or "") == row["output"]
            assert message["reasoning_content"] == row["reasoning_content"]
            assert [one["function"] for one in message.get("tool_calls", ())] == [
                one["function"] for one in row.get("tool_calls", ())
            ]
            assert choice["finish_reason"] == row["finish_reason"]
            assert reply["usage"]["completion_tokens"] == row["completion_tokens"]
            assert reply["usage"]["prompt_tokens"] == row["prompt_tokens"]
    settings = ChatSettings(base_model=str(folder), max_new_tokens=120, dtype="fp32", use_cpu=True)
    conversation = Conversation.open(settings, Observer())
    conversation.tools = TOOLS
    first = text(conversation.ask(QUESTION["content"])), conversation.turns[-1], conversation.last
    second = text(conversation.give_result(RESULT["content"])), conversation.turns[-1], conversation.last
    for row, (said, turn, last) in zip(rows, (first, second), strict=True):
        assert (said, turn["reasoning"]) == (row["output"], row["reasoning_content"])
        assert (last.completion_tokens, last.prompt_tokens) == (
            row["completion_tokens"],
            row["prompt_tokens"],
        )
    assert first[1]["tool_calls"][0]["arguments"] == CALL["tool_calls"][0]["arguments"]
