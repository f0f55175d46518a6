"""What a chat template puts between the generation prompt and an answer is no part of the answer."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.prompts import Prompt
from medicalgpt_cli.engine.data.rendering import encode_prompt, stop_token_ids
from medicalgpt_cli.engine.evaluation.samples import answer_questions
from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.decoding import Row, Sampler, answer_of
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.generation.scheduler import Limits, Scheduler
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.ppo.rollout import Asked, draw
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.cli import medgpt
from tests.tiny import tiny_tokenizer, write_jsonl

# In the manner of gpt-oss: each turn names its channel, and the generation prompt stops before it.
CHANNELS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{% if loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# An empty block of reasoning that the generation prompt has already: the answer comes at once.
THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
# A header in plain words, no special token in it.
NAMED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\\n' }}{% if m['role'] == 'assistant' %}{{ 'Doctor: ' }}{% endif %}"
    "{{ m['content'] + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "What helps?"}]


def tokenizer_with(template: str | None, style: str = "chatml"):
    tokenizer = tiny_tokenizer(style)
    if template == CHANNELS:
        special = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
        tokenizer.add_special_tokens({"extra_special_tokens": special})
        tokenizer.eos_token = "<|return|>"
    if template:
        tokenizer.chat_template = template
    return tokenizer


def said(tokenizer, text: str, *, prompt: list[int] | None = None) -> Row:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = encode_prompt(tokenizer, QUESTION) if prompt is None else prompt
    return Row(0, prompt, 99, Sampler(SamplingSettings()), None, said=ids)


FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("template", "whole", "answer"),
    [
        (CHANNELS, f"{FINAL}Rest. final", "Rest. final"),
        (CHANNELS, f"<|channel|>analysis<|message|>Say final.<|end|><|start|>assistant{FINAL}Rest.", "Rest."),
        (CHANNELS, "<|channel|>analysis<|message|>Never an answer", ""),
        (CHANNELS, "<|channel|>fin", ""),
        (CHANNELS, "Rest, said without a channel.", "Rest, said without a channel."),
        (CHANNELS, "final", "final"),
        (THOUGHT, "Rest.", "Rest."),
        (THOUGHT, "<think>\n\n</think>\n\nRest.", "Rest."),  # the block a second time is as empty
        (NAMED, "Doctor: Rest.", "Rest."),
        (NAMED, "Doctor", "Doctor"),
        (NAMED, "Doctors rest.", "Doctors rest."),
        (None, "final Rest.", "final Rest."),
    ],
)
def test_the_answer_begins_behind_the_header(template, whole, answer):
    tokenizer = tokenizer_with(template)
    assert answer_of(tokenizer, said(tokenizer, whole), "stop").text == answer


def test_reasoning_that_the_template_leaves_empty_is_no_part_of_an_answer():
    tokenizer = tiny_tokenizer(
        "qwen3"
    )  # an answer stands behind an empty block; the generation prompt has none
    row = said(tokenizer, "<think>\n\n</think>\n\nRest.")
    assert answer_of(tokenizer, row, "stop").text == "Rest."
    row = said(tokenizer, "<think>\nWhy?\n</think>\n\nRest.")
    answer = answer_of(tokenizer, row, "stop")
    assert (answer.reasoning, answer.text) == ("Why?", "Rest.")


def test_raw_text_that_is_continued_has_no_header():
    tokenizer = tokenizer_with(NAMED)
    row = said(tokenizer, "Doctor: Rest.", prompt=tokenizer("The transcript:")["input_ids"])
    assert answer_of(tokenizer, row, "stop").text == "Doctor: Rest."


@pytest.mark.parametrize(
    "whole",
    [
        f"{FINAL}Rest and drink.",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{FINAL}Rest and drink.",
    ],
)
def test_what_is_shown_only_grows(whole):
    tokenizer = tokenizer_with(CHANNELS)
    ids = said(tokenizer, whole).said
    row = said(tokenizer, "")
    shown = [""]
    for token in ids:
        row.said.append(token)
        reader = row.reader(tokenizer)
        reader.read(row.said)
        shown.append(shown[-1] + content_of(reader.take()))
    assert shown[-1] == "Rest and drink." and len(set(shown)) > 2


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> tuple[Path, str]:
    """A model that answers every prompt with the final channel: each token leads to the one behind it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_with(CHANNELS)
    text = "医院"
    prompt = encode_prompt(tokenizer, QUESTION)
    chain = [prompt[-1], *said(tokenizer, f"{FINAL}{text}<|return|>").said]
    assert len(set(chain)) == len(chain)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        table = model.model.embed_tokens.weight
        table.normal_()
        model.lm_head.weight.zero_()
        for one, following in itertools.pairwise(chain):
            model.lm_head.weight[following] = table[one]
    folder = tmp_path_factory.mktemp("speaker") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, text


@pytest.fixture(scope="module")
def backend(speaker) -> LocalBackend:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(speaker[0]).eval()
    return LocalBackend(model, AutoTokenizer.from_pretrained(speaker[0]), SamplingSettings(max_new_tokens=40))


def test_infer_writes_the_answer_alone(speaker, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"instruction": "What helps?"}])
    done = medgpt(
        *("infer", "--base-model", speaker[0], "--data-file", tmp_path / "in.jsonl"),
        *("--predictions-file", tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())[0]["output"] == speaker[1]


def test_chat_the_server_and_training_see_the_answer_alone(speaker, backend):
    text, prompt = speaker[1], encode_prompt(backend.tokenizer, QUESTION)
    assert "".join(backend.stream(prompt)) == text == backend.last.text

    pieces, done = [], threading.Event()
    scheduler = Scheduler(backend, Limits())
    try:
        scheduler.submit(
            prompt,
            backend.sampling,
            lambda deltas, answer: (pieces.append(content_of(deltas)), answer and done.set()),
        )
        assert done.wait(60)
    finally:
        scheduler.close()
    assert "".join(pieces) == text

    asked = Conversation((*QUESTION, {"role": "assistant", "content": "?"}), at="a:1")
    samples = answer_questions(backend.model, backend.tokenizer, [asked], 40, Observer())
    assert samples[0]["answer"] == text
    rollout = draw(backend, [Asked(Prompt(tuple(QUESTION), at="a:1", source="a"), prompt)], 1, [0])
    assert rollout[0].text == text
    assert rollout[0].end in stop_token_ids(backend.tokenizer)
