"""`medgpt data`: what files hold, before anything is trained on them."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import InspectDataSettings


def run(settings: InspectDataSettings, observer: Observer) -> dict[str, Any]:
    """Measure the files with the named model's tokenizer, or in characters where none is named."""
    from medicalgpt_cli.engine.data.reading import reading_options
    from medicalgpt_cli.engine.data.report import inspect

    reading = reading_options(settings, settings.files)
    tokenizer = None
    if settings.base_model or settings.lora_model or settings.tokenizer_path:
        tokenizer = _tokenizer(settings, observer)
    else:
        observer.on_notice(
            "no model is named: lengths are in characters; --base-model NAME shows tokens and the loss mask"
        )
    found = inspect(
        settings.files, tokenizer, settings.max_length, observer, reading=reading, thinking=settings.thinking
    )
    if not settings.json:
        from medicalgpt_cli.terminal.data_view import show_data

        show_data(found.report, found.conversations, found.examples, tokenizer, settings.example)
    return found.report


def _tokenizer(settings: InspectDataSettings, observer: Observer) -> Any:
    from medicalgpt_cli.engine.model.loading import load_tokenizer, read_tokenizer
    from medicalgpt_cli.engine.model.references import resolve_models
    from medicalgpt_cli.engine.model.tokenizer import apply_template

    if settings.base_model or settings.lora_model:
        return load_tokenizer(settings, resolve_models(settings), observer)
    tokenizer = read_tokenizer(settings.tokenizer_path)
    if notice := apply_template(tokenizer, settings.template):
        observer.on_notice(notice)
    return tokenizer
