"""`medgpt plan` on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medicalgpt_cli.terminal.console import one_line, results

if TYPE_CHECKING:
    from rich.console import Console

_PARTS = {
    "program": "the program itself",
    "frozen": "weights that stay",
    "learning": "weights that learn",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "exchange": "buffers between devices",
    "cache": "keys and values of the largest batch",
    "batch": "activations of the largest batch",
    "slack": "allowance for the allocator",
}
_WAYS = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP2"}


def show_plan(plan: Mapping[str, Any]) -> None:
    console = results()
    answers = plan["stage"] == "infer"
    learn = (
        ""
        if answers
        else f"{plan['trainable']:,} learn ({plan['trainable'] / max(plan['parameters'], 1):.1%}), "
    )
    bits = f", base in {plan['quantization'].replace('bit', ' bits')}" if plan["quantization"] else ""
    console.print(
        f"{plan['stage']}: {one_line(plan['model'])}, {plan['parameters']:,} parameters, "
        f"{learn}{plan['dtype']}{bits}, {plan['device']}",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    _show_memory(console, plan)
    _show_batch(console, plan)
    if answers:
        _show_answers(console, plan)
    else:
        _show_several(console, plan)
        _show_amount(console, plan)


def _line(console: Console, label: str, value: str, style: str = "") -> None:
    console.print(f"  {label:<36}{value}", style=style, markup=False, soft_wrap=True)


def _show_memory(console: Console, plan: Mapping[str, Any]) -> None:
    of = "one device"
    if plan["devices"] > 1:
        way = f"devices, {_WAYS[plan['parallel']]}" if "parallel" in plan else "processes"
        of = f"each of {plan['devices']} {way}"
    console.print(f"\nmemory of {of}", style="bold")
    memory = plan["memory"]
    roles = plan.get("roles")
    for part, label in _PARTS.items():
        # The cache of rl is a part of its largest batch.
        if memory.get(part) and not (part == "cache" and "learning" in memory):
            _line(console, label, f"{size(memory[part]):>10}")
    if roles:
        apart = roles["reward_model_apart"]
        _line(
            console,
            "  of it, of the roles",
            f"one base {size(roles['one_base'])}, policy {size(roles['policy'])}, value {size(roles['value'])}, "
            f"reference and reward {size(roles['frozen_adapters'])}"
            + (f", reward model apart {size(apart)}" if apart else ""),
        )
        _line(
            console, "  while answers are drawn", f"{size(roles['drawing'])}, cache {size(memory['cache'])}"
        )
    have = plan["device_memory"]
    told = "" if have is None else f"  of {size(have)}: " + ("fits" if plan["fits"] else "does not fit")
    _line(console, "at most", f"{size(memory['peak']):>10}{told}", "bold" if plan["fits"] else "bold red")


def _show_batch(console: Console, plan: Mapping[str, Any]) -> None:
    batch = plan["batch"]
    if "new_tokens" in batch:
        how = f", each with up to {batch['new_tokens']:,} of an answer"
    else:
        how = ", padded" if batch["padded"] else ", end to end"
    _line(
        console,
        "largest batch",
        f"{batch['tokens']:,} tokens in {batch['rows']} rows of up to {batch['longest']:,}{how}",
    )
    if plan["device_memory"] is None:
        return
    most, flag = plan["largest_batch"], plan["batch_flag"]
    if most is None:
        _line(console, "what fits", f"not even {flag} 1", "red")
    elif most >= plan["examples"]:
        _line(console, "what fits", f"all {most:,} in one batch")
    else:
        _line(console, "what fits", f"{flag} {most:,}, of the longest")


def _show_several(console: Console, plan: Mapping[str, Any]) -> None:
    console.print("\nmemory of each of several devices, each with such a batch", style="bold")
    console.print(f"  {'devices':<12}" + "".join(f"{name:>12}" for name in _WAYS.values()), markup=False)
    for number, peaks in plan["several"].items():
        said = ("refused" if peaks[way] is None else size(peaks[way]) for way in _WAYS)
        console.print(f"  {number:<12}" + "".join(f"{one:>12}" for one in said), markup=False)


def _show_amount(console: Console, plan: Mapping[str, Any]) -> None:
    console.print("\nthe run", style="bold")
    _line(console, "updates", f"{plan['updates']:,}, {plan['updates_per_epoch']:,} an epoch")
    _line(console, "tokens", f"{plan['tokens']:,}")
    _line(console, "operations", f"{plan['flops']:.2e}")
    _show_time(console, "time", plan)
    disk = plan["disk"]
    free = "" if disk["free"] is None else f" of {size(disk['free'])} free"
    _line(
        console,
        "disk",
        f"{size(disk['total'])}{free}: checkpoints {size(disk['checkpoint'])} each, the result {size(disk['result'])}",
        "" if disk["free"] is None or disk["total"] < disk["free"] else "red",
    )


def _show_answers(console: Console, plan: Mapping[str, Any]) -> None:
    console.print("\nthe answers", style="bold")
    left = plan["cannot_be_answered"]
    without = f", {left:,} of them too long or not for the template" if left else ""
    _line(console, "questions", f"{plan['questions']:,}, of {plan['tokens']:,} tokens{without}")
    _line(console, "answers at their longest", f"{plan['answer_tokens']:,} tokens")
    _line(console, "operations", f"{plan['flops']:.2e}")
    _show_time(console, "time of these", plan)


def _show_time(console: Console, label: str, plan: Mapping[str, Any]) -> None:
    took = plan["time"]
    if took["seconds"] is None:
        _line(console, label, f"unknown: {took['source']}; --throughput says how fast it goes")
    elif took["source"] == "measured products":
        speed = took["flops_a_second"] / 1e9
        _line(
            console,
            label,
            f"no faster than {duration(took['seconds'])} ({speed:,.0f} GFLOP/s, measured here)",
        )
    else:
        _line(console, label, f"about {duration(took['seconds'])} (throughput: {one_line(took['source'])})")


def size(count: int) -> str:
    """Bytes as a person reads them: 3.1 GiB, 512 MiB."""
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def duration(seconds: float) -> str:
    """A time of two units at most: 2 d 3 h, 12 min, 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = round(seconds / 3600)
    return f"{seconds / 3600:.1f} h" if hours < 24 else f"{hours // 24} d {hours % 24} h"
