"""`medgpt data`: what files hold, before anything is trained on them; and the same, written clean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import InspectDataSettings

if TYPE_CHECKING:
    from medicalgpt_cli.engine.data.inspection import Inspection


def run(settings: InspectDataSettings, observer: Observer) -> dict[str, Any]:
    """Measure the files with the named model's tokenizer, or in characters where none is named.

    Raises:
        DataError: records are wrong; all that can be shown is shown before.
    """
    from medicalgpt_cli.engine.data.cleaning import output_files, parse_split, write_clean
    from medicalgpt_cli.engine.data.inspection import inspect
    from medicalgpt_cli.engine.data.readers import check_text_unit
    from medicalgpt_cli.engine.data.reading import counts_for

    share = parse_split(settings.split) if settings.split else None
    if settings.output:
        output_files(settings.output, share)
    check_text_unit(settings.files, settings.text_unit)
    counts = counts_for(settings, settings.files)
    tokenizer = None
    if settings.base_model or settings.lora_model or settings.tokenizer_path:
        tokenizer = _tokenizer(settings, observer)
    else:
        observer.on_notice(
            "no model is named: lengths are in characters; --base-model NAME shows tokens and the loss mask"
        )
    found = inspect(
        settings.files,
        counts,
        tokenizer,
        settings.max_length,
        observer,
        text_unit=settings.text_unit,
        margin_column=settings.margin_column,
        thinking=settings.thinking,
    )
    report = found.report
    if settings.output and found.problem is None:
        report["written"] = write_clean(
            found, settings.output, share=share, seed=settings.seed, deduplicate=settings.deduplicate
        )
    _show(found, tokenizer, settings)
    if found.problem is None:
        return report
    if settings.output:
        observer.on_warning(f"{settings.output} is not written: what is wrong has to be mended first")
    if not settings.json:
        raise found.problem
    from medicalgpt_cli.terminal.console import print_error

    print_error(found.problem)
    return report | {"exit_code": found.problem.exit_code}


def _show(found: Inspection, tokenizer: Any, settings: InspectDataSettings) -> None:
    if not settings.json:
        from medicalgpt_cli.terminal.data_view import show_data

        show_data(found, tokenizer, settings.example)


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
