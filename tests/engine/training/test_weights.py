"""The weights of answers in the loss: against values put together by hand from a plain forward pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, Example, render_conversation
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.training.batches import end_to_end, padded
from medicalgpt_cli.engine.training.losses import target_loss
from tests.cli import medgpt
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl

WEIGHTS = ((None, 0.25), (0, 3), (2, None), (1, 1))  # of both answers of four conversations


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_model(folder / "model")
    rows = []
    for number, pair in enumerate(WEIGHTS):
        turns = []
        for place, weight in enumerate(pair):
            turns.append({"role": "user", "content": f"What helps against cough {number} {place}?"})
            answer = {"role": "assistant", "content": f"Tea {'and honey ' * number}helps {place}."}
            turns.append(answer if weight is None else {**answer, "weight": weight})
        rows.append({"messages": turns})
    write_jsonl(folder / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def examples(place: Path) -> list[Example]:
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    conversations = [Conversation(tuple(row["messages"]), "train.jsonl:1") for row in rows]
    return [one for c in conversations for one in render_conversation(tiny_tokenizer(), c, 512, Counts())]


@pytest.fixture(scope="module")
def by_hand(place: Path, examples: list[Example]) -> float:
    """sum(weight · nll) / sum(weight), one example after the other, without any of our batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    total = weight_sum = 0.0
    for one, pair in zip(examples, WEIGHTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.input_ids])).logits[0]
        nll = -logits.log_softmax(-1)[:-1].gather(1, torch.tensor(one.input_ids[1:])[:, None])[:, 0]
        stretches, learnt = [], False
        for at, label in enumerate(one.labels):
            if label != IGNORED and not learnt:
                stretches.append([])
            learnt = label != IGNORED
            if learnt:
                stretches[-1].append(at)
        weights = [1 if weight is None else weight for weight in pair if weight != 0]
        for stretch, weight in zip(stretches, weights, strict=True):
            total += weight * float(sum(nll[at - 1] for at in stretch))
            weight_sum += weight * len(stretch)
    return total / weight_sum


def test_the_loss_of_a_batch_in_both_layouts(place, examples, by_hand):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    for batch in (end_to_end(examples, weighted=True), padded(examples, 0, weighted=True)):
        weight = batch["loss_weights"][batch["labels"] != IGNORED].sum()
        # sdpa without a mask tells rows apart by their positions, which end-to-end batches carry
        assert float(target_loss(model, batch).detach() / weight) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("layout", ["padding-free", "padded"])
@pytest.mark.parametrize("batch, accumulated", [(4, 1), (1, 4), (2, 2)])
def test_the_loss_of_an_update_is_the_weighted_mean_over_all_its_batches(
    place, by_hand, layout, batch, accumulated
):
    out = f"{layout}-{batch}-{accumulated}"
    options = ("--batch-size", batch, "--gradient-accumulation", accumulated, "--layout", layout)
    done = medgpt(
        *("sft", "--base-model", "model", "--train-data", "train.jsonl", "--eval-fraction", 0, "--max-steps", 1),
        *(*options, "--log-steps", 1, "--output-dir", out, "--lora-dropout", 0, "--use-cpu"),
        cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [line["loss"] for line in lines if "loss" in line]
    assert loss == pytest.approx(by_hand, rel=1e-4)
