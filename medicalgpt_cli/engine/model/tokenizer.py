"""Tokenizers with a chat template, and the fingerprint that locks both into what a run leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.model.template_check import check_template
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import did_you_mean

# For models that come without a template. Each turn ends with the end-of-text token, which the model knows.
TEMPLATES = {
    "plain": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\n' }}"
        "{% else %}{{ 'Answer: ' + m['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
FALLBACK = "plain"

# What splits differently where merges, digits, spaces or normalisation are handled differently.
_SAMPLE = "Take 1250mg  twice (b.i.d.) — COVID19, don't! 患者体温38.5℃，\n\n\tＡ naïve éè"


def apply_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, *, fallback: bool = True
) -> str | None:
    """Give a tokenizer without a chat template the one asked for, or the plain one.

    Returns:
        A notice for the user, or None where the tokenizer's own template is used.

    Raises:
        UsageError: the tokenizer has another template already, or `template` names nothing.
        UnsafeRefused: the template does an unbounded amount of work.
    """
    begin = _template_start(tokenizer)
    wanted = None if template is None else _source(template)
    if wanted in TEMPLATES.values():
        wanted = begin + str(wanted)
    if tokenizer.chat_template:
        if wanted is not None and wanted != tokenizer.chat_template:
            raise UsageError(
                f"--template {template}: the model has a chat template of its own",
                "leave --template out; a model answers well only in the template that it learnt",
            )
        _check_bounds(tokenizer, tokenizer.name_or_path)
        return None
    if wanted is None and not fallback:
        return None
    tokenizer.chat_template = wanted or begin + TEMPLATES[FALLBACK]
    if wanted:
        if template not in TEMPLATES:
            _check_bounds(tokenizer, f"--template {template}")
        return None
    return (
        f"the model has no chat template; using {FALLBACK!r} (choose with --template {'|'.join(TEMPLATES)})"
    )


def _check_bounds(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    given = tokenizer.chat_template
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    for template in given.values() if isinstance(given, dict) else [given]:
        if not isinstance(template, str):
            raise UsageError(f"{place}: the chat template is no text", "was the file changed by hand?")
        check_template(template, tokens, place)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that this tokenizer puts in front of a plain text; most put one there or none, GLM-4 two."""
    text = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    places = range(len(whole) - len(text) + 1)
    return tuple(whole[: next((at for at in places if whole[at : at + len(text)] == text), 0)])


def _template_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The start tokens as a piece of a template, which has to set them itself."""
    start = start_tokens(tokenizer)
    if not start:
        return ""
    if start == (tokenizer.bos_token_id,):
        return "{{ bos_token }}"
    return "{{ '" + "".join(tokenizer.convert_ids_to_tokens(start)) + "' }}"


def _source(template: str) -> str:
    if template in TEMPLATES:
        return TEMPLATES[template]
    path = Path(template)
    if path.is_file():
        return _checked(path)
    near = did_you_mean(template, TEMPLATES)
    raise UsageError(
        f"--template {template}: no such template or file",
        f"did you mean {near}?" if near else f"one of {', '.join(TEMPLATES)}, or a Jinja file",
    )


def _checked(path: Path) -> str:
    """The text of a template file; the same engine that will render it has to understand it."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        source = path.read_text(encoding="utf-8")
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    except UnicodeDecodeError:
        raise UsageError(f"--template {path}: not UTF-8 text", "name a Jinja file") from None
    except TemplateSyntaxError as problem:
        raise UsageError(
            f"--template {path}:{problem.lineno}: {problem.message}", "name a Jinja file"
        ) from None
    if "messages" not in source:
        raise UsageError(f"--template {path}: it never uses `messages`", "name a Jinja chat template")
    return source


def fingerprint(tokenizer: PreTrainedTokenizerBase, *, with_template: bool = True) -> str:
    """SHA-256 over vocabulary, special tokens, template and a sample's ids: equal means equal token ids."""
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "template": tokenizer.chat_template if with_template else None,
        "sample": tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"],
    }
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def check_fingerprint(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer or template that is not the one a run was made with.

    Raises:
        UsageError: they differ.
    """
    from medicalgpt_cli.engine.run import manifest

    place = folder.parent if folder.name == "model" else folder
    if not (place / manifest.NAME).is_file():
        return
    recorded = manifest.read(place).get("fingerprints", {}).get("tokenizer")
    # A run that had no template (pretraining of a base model) locks none.
    fits = (fingerprint(tokenizer), fingerprint(tokenizer, with_template=False))
    if recorded and recorded not in fits:
        raise UsageError(
            f"the tokenizer or chat template is not the one that {place} was trained with",
            "leave out --tokenizer-path and --template: the run brings its own",
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer with its template, as any Hugging Face program reads it."""
    tokenizer.save_pretrained(folder)
