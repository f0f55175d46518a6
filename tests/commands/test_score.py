"""`medgpt score`: files of pairs and of answers, scored by a reward model that PEFT alone made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli import medgpt
from tests.tiny import tiny_model, write_jsonl

PAIRS = [
    {
        "id": f"p{n}",
        "conversations": [{"from": "human", "value": f"Fever {n}?" * (n + 1)}],
        "chosen": "Drink water. " * (n % 3 + 1),
        "rejected": "No. " * (n % 2 + 1),
    }
    for n in range(7)
]
TOO_LONG = {"prompt": "Cough?", "chosen": "Rest. " * 400, "rejected": "No."}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("score")
    tiny_model(folder / "model")
    for kind, task, modules in (
        (AutoModelForSequenceClassification, "SEQ_CLS", ["score"]),
        (AutoModelForCausalLM, "CAUSAL_LM", None),
    ):
        torch.manual_seed(1)
        options = {"num_labels": 1} if modules else {}
        model = kind.from_pretrained(folder / "model", dtype=torch.float32, **options)
        config = LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], task_type=task, modules_to_save=modules
        )
        wrapped = get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        wrapped.save_pretrained(folder / task)
        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / task)
    write_jsonl(folder / "pairs.jsonl", [*PAIRS[:3], TOO_LONG, *PAIRS[3:]])
    return folder


def score(place: Path, *more: object, model: str = "SEQ_CLS"):
    return medgpt(*("score", "--reward-model", model, "--use-cpu", "--max-length", "400", *more), cwd=place)


def by_hand(place: Path, row: dict, answer: str) -> float:
    """The score of one answer by plain PEFT and transformers: the head on the last hidden state."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        place / "model", num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, place / "SEQ_CLS").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    said = [
        {"role": "user", "content": row["conversations"][0]["value"]},
        {"role": "assistant", "content": answer},
    ]
    text = tokenizer.apply_chat_template(said, tokenize=False).removesuffix("\n")
    with torch.no_grad():
        hidden = model.get_base_model().model(torch.tensor([tokenizer.encode(text)])).last_hidden_state
        return float(model.get_base_model().score(hidden[0, -1]))


def test_pairs_into_a_file(place: Path) -> None:
    target = place / "out.jsonl"
    done = score(place, "--data-file", "pairs.jsonl", "--predictions-file", "out.jsonl", "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    assert "skipped: 1 (longer than --max-length)" in done.stderr
    assert "pairs 7, accuracy " in done.stderr and "before" not in done.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"p{n}" for n in range(7)]
    assert [line["at"] for line in lines] == [f"pairs.jsonl:{n}" for n in (1, 2, 3, 5, 6, 7, 8)]
    for line, row in zip(lines, PAIRS, strict=True):
        assert set(line) == {"id", "at", "score_chosen", "score_rejected"}
        assert line["score_chosen"] == pytest.approx(by_hand(place, row, row["chosen"]), abs=1e-5)
        assert line["score_rejected"] == pytest.approx(by_hand(place, row, row["rejected"]), abs=1e-5)
    again = score(place, "--data-file", "pairs.jsonl", "--predictions-file", "out.jsonl")
    assert again.returncode == 2
    assert "out.jsonl exists already" in again.stderr and "Traceback" not in again.stderr
    assert [json.loads(line) for line in target.read_text().splitlines()] == lines


def test_the_figures_as_json(place: Path) -> None:
    done = score(place, "--data-file", "pairs.jsonl", "--predictions-file", "json.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    lines = [json.loads(line) for line in (place / "json.jsonl").read_text().splitlines()]
    right = sum(line["score_chosen"] > line["score_rejected"] for line in lines)
    (part,) = report["parts"]
    assert report["rows"] == report["pairs"] == part["pairs"] == 7
    assert report["data"]["read"] == 8 and report["data"]["skipped"] == {"longer than --max-length": 1}
    assert part["accuracy"] == right / 7
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in PAIRS)
    assert part["longer_wins"] == longer / 7
    assert report["predictions_file"] == "json.jsonl"


def test_answers_to_standard_output(place: Path) -> None:
    """The last answer of each conversation, the same numbers as in pairs."""
    rows = [
        {"id": row["id"], "question": row["conversations"][0]["value"], "answer": row["chosen"]}
        for row in PAIRS
    ]
    write_jsonl(
        place / "answers.jsonl",
        [*rows, {"question": "Cough?", "answer": "Rest. " * 400}, {"question": "Cough?", "answer": " "}],
    )
    done = score(place, "--data-file", "answers.jsonl", "--predictions-file", "-")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [f"p{n}" for n in range(7)]
    for line, row in zip(lines, PAIRS, strict=True):
        assert set(line) == {"id", "at", "score"}
        assert line["score"] == pytest.approx(by_hand(place, row, row["chosen"]), abs=1e-5)
    assert "skipped: 1 (longer than --max-length)" in done.stderr
    assert "skipped: 1 (an empty answer)" in done.stderr


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("model", "is a language model, not a reward model"),
        ("CAUSAL_LM", "is an adapter without a score head"),
        ("untrained", "head of this reward model was never trained"),
        ("torn", "missing or damaged"),
        ("misfit", "does not fit its base"),
    ],
)
def test_what_is_no_reward_model_is_refused(place: Path, model: str, word: str) -> None:
    if model in ("untrained", "torn", "misfit"):
        shutil.copytree(place / "SEQ_CLS", place / model)
        if model == "untrained":
            (place / model / "reward.json").write_text('{"format": 1, "head_trained": false}')
        elif model == "torn":
            file = place / model / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-64])
        else:
            config = json.loads((place / model / "adapter_config.json").read_text())
            config["r"] = 4
            (place / model / "adapter_config.json").write_text(json.dumps(config))
    done = score(place, "--data-file", "pairs.jsonl", "--predictions-file", "never.jsonl", model=model)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr and "hint:" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "never.jsonl").exists()


def test_nothing_that_fits_is_an_error(place: Path) -> None:
    write_jsonl(place / "long.jsonl", [TOO_LONG])
    done = score(place, "--data-file", "long.jsonl", "--predictions-file", "never.jsonl")
    assert done.returncode == 2
    assert "no answer fits --max-length 400" in done.stderr
