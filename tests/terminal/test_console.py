"""What goes to stderr: lines where there is no terminal, drawing where there is one, nothing with --json."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.terminal import console as console_module
from medicalgpt_cli.terminal.console import TerminalObserver, print_error

PLAN = {"stage": "sft", "model": "tiny", "steps": 10, "trainable": 5000, "device": "cpu", "folder": "runs/x"}
METRICS = {
    "epoch": 0.1, "loss": 2.5, "learning_rate": 2e-4, "grad_norm": 0.5, "target_tokens_per_second": 412.3,
}  # fmt: skip


def screen(terminal: bool = False, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    term = {"TERM": "xterm-256color"} if terminal else {}
    return Console(file=file, force_terminal=terminal, width=width, highlight=False, _environ=term), file


def train(observer: TerminalObserver) -> None:
    with observer:
        observer.on_notice("a notice")
        observer.on_task_start("loading weights", 10, "tensors")
        observer.on_task_advance("loading weights", 10)
        observer.on_task_end("loading weights")
        observer.on_train_start(PLAN)
        observer.on_metrics(1, METRICS)
        observer.on_eval(1, {"eval_loss": 2.25, "eval_perplexity": 9.49, "eval_bits_per_byte": 0.8})
        observer.on_checkpoint(1, "runs/x/checkpoints/checkpoint-1")
        observer.on_warning("a warning")
        observer.on_train_end({"before": {"loss": 3.0}, "after": {"loss": 2.0}, "folder": "runs/x"})


def test_plain_lines_one_a_log_step() -> None:
    console, file = screen()
    train(TerminalObserver(console=console))
    lines = file.getvalue().splitlines()
    assert "note: a notice" in lines and "warning: a warning" in lines
    (step,) = [line for line in lines if line.startswith("step 1/10")]
    assert "loss 2.5000" in step and "lr 2.00e-04" in step and "412 target tokens/s" in step
    assert "step 1  held-out loss 2.2500  perplexity 9.4900  bits/byte 0.8000" in lines
    assert "held-out loss  3.0000 → 2.0000" in lines
    assert "runs/x/report.html" in lines[-1]
    assert "\x1b" not in file.getvalue()


def test_a_long_line_is_not_broken() -> None:
    console, file = screen()
    TerminalObserver(console=console).on_notice("word " * 60)
    assert len(file.getvalue().splitlines()) == 1


def test_a_terminal_breaks_between_words() -> None:
    console, file = screen(terminal=True, width=40)
    TerminalObserver(console=console).on_notice("consultation " * 8)
    lines = file.getvalue().splitlines()
    assert len(lines) > 1 and all(line.split()[-1] == "consultation" for line in lines)


def test_with_json_nothing_is_said() -> None:
    console, file = screen()
    train(TerminalObserver(quiet=True, console=console))
    console, drawn = screen(terminal=True)
    train(TerminalObserver(quiet=True, console=console))
    assert file.getvalue() == "" and drawn.getvalue() == ""


def test_a_terminal_gets_the_panel_and_it_stays_when_training_is_over() -> None:
    console, file = screen(terminal=True)
    train(TerminalObserver(console=console))
    shown = file.getvalue()
    assert "sft · tiny" in shown and "held-out loss" in shown and "╭" in shown
    assert not [line for line in shown.splitlines() if line.startswith("step 1/10  epoch")]  # no plain line


def test_the_cursor_is_given_back_when_training_fails() -> None:
    console, file = screen(terminal=True)
    with pytest.raises(RuntimeError), TerminalObserver(console=console) as observer:
        observer.on_train_start(PLAN)
        observer.on_metrics(1, METRICS)
        raise RuntimeError
    shown = file.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0  # shown again after it was hidden
    assert "2.5000" in shown


def test_results_on_stdout_are_not_caught_by_the_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    console, _ = screen(terminal=True)
    with TerminalObserver(console=console) as observer:
        observer.on_task_start("answering", 2)
        print('{"id": 1}')
        observer.on_task_end("answering")
    assert capsys.readouterr().out == '{"id": 1}\n'


def test_an_error_is_two_lines_without_markup_or_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_error(UsageError("no file [bold]x[/bold]\n\x1b[2Jy", "try z"))
    out, err = capsys.readouterr()
    assert out == "" and err == "error: no file [bold]x[/bold]  [2Jy\nhint: try z\n"
    print_error(UsageError("no hint"))
    assert capsys.readouterr().err == "error: no hint\n"


def test_a_slow_task_reports_now_and_then_where_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "_PLAIN_EVERY", 0.0)
    monkeypatch.setattr(console_module, "_WORTH_A_LINE", 0.0)
    console, file = screen()
    observer = TerminalObserver(console=console)
    observer.on_task_start("answering", 1200, "questions")
    observer.on_task_advance("answering", 600)
    observer.on_task_end("answering")
    observer.on_task_end("answering")  # and a second end is harmless
    observer.on_task_advance("unknown", 1)
    lines = file.getvalue().splitlines()
    assert lines[0] == "answering: 600 of 1,200 questions" and lines[1].startswith(
        "answering: 600 questions in"
    )
    assert len(lines) == 2
