"""Chat templates that would run without end, fill the memory or recurse are refused; those in use pass."""

from __future__ import annotations

import pytest

from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.model.template_check import check_rendered, check_template
from medicalgpt_cli.engine.model.tokenizer import TEMPLATES
from medicalgpt_cli.errors import UnsafeRefused, UsageError
from tests.cli import medgpt
from tests.tiny import _STYLES, tiny_model, tiny_tokenizer, write_jsonl

_TAIL = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
BOMBS = {
    "loops": ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "10,000 times"),
    "loops over texts": (
        "{% set t = 'x' * 30000 %}{% for a in t %}{% for b in t %}{% endfor %}{% endfor %}",
        "5 s",
    ),
    "loop of a late branch": (
        "{% if messages | length == 17 %}{% for a in range(99999) %}{% endfor %}{% endif %}",
        "10,000 times",
    ),
    "doubling": (
        "{% set n = namespace(s='abcdefgh') %}{% for a in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "512 MiB",
    ),
    "padding of tools": ("{% if tools is defined %}{{ 'a' | center(30000000) }}{% endif %}", "writes"),
    "padding of reasoning": (
        "{% if enable_thinking is false %}{{ 'a' | center(30000000) }}{% endif %}",
        "writes",
    ),
    "product": ("{{ 'a' * 10000000000 }}", "multiplies"),
    "padding": ("{{ 'a' | center(30000000) }}", "writes"),
    "format": ("{{ '%3000000000d' % 1 }}", "512 MiB"),
    "power": ("{{ 9 ** 9 ** 9 ** 9 }}", "power"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself"),
    "nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("MEDGPT_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("kind", BOMBS)
def test_bomb(kind):
    template, word = BOMBS[kind]
    with pytest.raises(UnsafeRefused) as caught:
        check_template(template + _TAIL, {}, "the model")
    assert word in caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message


def test_templates_in_use_pass(tmp_path):
    check_template(
        "".join(f"{{# {name} #}}" for name in TEMPLATES) + TEMPLATES["chatml"], {"eos_token": "e"}, "x"
    )
    for template, *_ in _STYLES.values():
        if template:
            check_template(template, {"bos_token": "<s>", "eos_token": "</s>"}, "x")
    generation = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    check_template(generation, {}, "x")
    assert len(list((tmp_path / "home" / "checked").iterdir())) >= 6  # found once a machine


def test_a_template_that_raises_is_not_refused_here():
    for template in ("{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[99].content.x.y }}"):
        check_template(template, {}, "x")
    with pytest.raises(UsageError, match="line 2 of the chat template is not valid Jinja"):
        check_template("\n{% if %}", {}, "x")


def test_what_is_written_is_bounded():
    check_rendered("a" * 2**20, 0)
    with pytest.raises(UnsafeRefused, match="for a conversation of 3"):
        check_rendered("a" * (2**20 + 100), 3)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{% if %}", "{{ [] | first + 1 }}"]
)
def test_an_error_of_a_template_is_one_line(template):
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = template + _TAIL
    with pytest.raises(UsageError, match="refuses the roles user"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


def test_a_model_with_a_bomb_and_a_template_file_with_one(tmp_path):
    folder = tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(BOMBS["recursion"][0] + _TAIL)
    asked = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a"}])
    done = medgpt(
        "infer", "--base-model", folder, "--data-file", asked, "--predictions-file", tmp_path / "o.json"
    )
    assert done.returncode == 4
    assert "calls itself" in done.stderr and "hint:" in done.stderr and str(folder) in done.stderr
    file = tmp_path / "t.jinja"
    file.write_text(BOMBS["power"][0] + _TAIL)
    bare = tiny_model(tmp_path / "bare", "none")
    done = medgpt("data", asked, "--base-model", bare, "--template", file)
    assert done.returncode == 4 and "--template" in done.stderr
