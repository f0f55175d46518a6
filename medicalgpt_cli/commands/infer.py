"""`medgpt infer`."""

from __future__ import annotations

from typing import Any

from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import InferSettings


def run(settings: InferSettings, observer: Observer) -> dict[str, Any] | None:
    if settings.interactive:
        from medicalgpt_cli.terminal.chat import ask_single_questions

        return ask_single_questions(settings, observer)
    from medicalgpt_cli.engine.generation.infer import help_infer, run_infer
    from medicalgpt_cli.engine.run import processes

    if processes.rank():
        return help_infer(settings)
    result = run_infer(settings, observer)
    if result["failed"]:
        observer.on_warning(
            f"{result['failed']} of {result['rows']} questions could not be answered: see their error"
        )
    observer.on_notice(
        f"{result['rows']} rows, {result['completion_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s"
        + ("" if result["file"] == "-" else f"  →  {result['file']}")
    )
    return result
