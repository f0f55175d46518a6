"""Templates, the lock on them, and the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.rendering import encode_prompt, stop_token_ids
from medicalgpt_cli.engine.model.loading import load_tokenizer
from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.model.tokenizer import TEMPLATES, apply_template, fingerprint, save_tokenizer
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import ModelSettings
from tests.tiny import STYLES, tiny_model, tiny_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "咳嗽怎么办？"},
    {"role": "assistant", "content": "Drink water."},
    {"role": "user", "content": "And fever?"},
]


class Notices(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_notice(self, text: str) -> None:
        self.seen.append(text)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_templates_end_turns_and_open_the_answer(template: str) -> None:
    tokenizer = tiny_tokenizer("none")
    assert apply_template(tokenizer, template) is None
    text = tokenizer.decode(encode_prompt(tokenizer, CONVERSATION))
    assert text.count(tokenizer.eos_token) == 1
    for part in ("Be brief.", "咳嗽怎么办？", "Drink water.<|endoftext|>", "And fever?"):
        assert part in text
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    assert text.index("And fever?") < len(text.rstrip()) - len("And fever?")  # something opens the answer


def test_chatml_does_not_end_a_turn_twice() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = None
    apply_template(tokenizer, "chatml")
    assert tokenizer.decode(encode_prompt(tokenizer, CONVERSATION)).count("<|im_end|>") == 4


def test_a_begin_token_that_the_tokenizer_adds_is_in_the_template() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = None
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    apply_template(tokenizer, "plain")
    assert encode_prompt(tokenizer, CONVERSATION).count(bos[1]) == 1
    assert encode_prompt(tokenizer, CONVERSATION)[0] == bos[1]


def test_all_tokens_that_the_tokenizer_puts_in_front_are_in_the_template() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = None
    start = [
        (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|end_of_text|>", "<|begin_of_text|>")
    ]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start[0][0]} {start[1][0]} $A", special_tokens=start
    )
    apply_template(tokenizer, "plain")
    assert encode_prompt(tokenizer, CONVERSATION)[:2] == [number for _, number in start]


def test_a_model_without_a_template_gets_the_plain_one_and_says_so(tmp_path: Path) -> None:
    tiny_model(tmp_path / "m", "none")
    settings = ModelSettings(base_model=str(tmp_path / "m"))
    notices = Notices()
    tokenizer = load_tokenizer(settings, resolve_models(settings), notices)
    assert tokenizer.chat_template == TEMPLATES["plain"]
    assert "no chat template" in notices.seen[0]
    assert tokenizer.pad_token_id is not None


def test_a_template_of_its_own_is_locked(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    with pytest.raises(UsageError, match="template of its own"):
        apply_template(tokenizer, "alpaca")
    (tmp_path / "same.jinja").write_text(tokenizer.chat_template)
    assert apply_template(tokenizer, str(tmp_path / "same.jinja")) is None


def test_a_template_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}\n{{ m[ }}")
    (tmp_path / "other.jinja").write_text("hello")
    for given, words in {
        "alpacca": "no such template",
        str(tmp_path / "broken.jinja"): "broken.jinja:2",
        str(tmp_path / "other.jinja"): "never uses `messages`",
    }.items():
        with pytest.raises(UsageError, match=words):
            apply_template(tiny_tokenizer("none"), given)


@pytest.mark.parametrize("style", STYLES)
def test_the_fingerprint_survives_saving_and_sees_changes(style: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(style)
    apply_template(tokenizer, None)
    before = fingerprint(tokenizer)
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(again) == before
    again.chat_template += " "
    assert fingerprint(again) != before


def test_the_fingerprint_sees_another_splitting_of_digits() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer("chatml")
    before = fingerprint(tokenizer)
    own = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), own]
    )
    assert fingerprint(tokenizer) != before


def test_a_run_refuses_another_tokenizer(tmp_path: Path) -> None:
    """The lock: what a run was trained with is what it is used with."""
    model = tiny_model(tmp_path / "run" / "model", "chatml")
    right = fingerprint(tiny_tokenizer("chatml"))
    manifest = {"format": 1, "stage": "sft", "status": "done", "fingerprints": {"tokenizer": right}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    settings = ModelSettings(base_model=str(tmp_path / "run"))
    load_tokenizer(settings, resolve_models(settings))
    (model / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    with pytest.raises(UsageError, match="not the one that"):
        load_tokenizer(settings, resolve_models(settings))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", "chatml")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    settings = ModelSettings(base_model=str(model))
    with pytest.raises(UsageError, match="only 100"):
        load_tokenizer(settings, resolve_models(settings))
