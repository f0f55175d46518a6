"""Folding an adapter into its base, with a proof that the result answers as the two did together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from medicalgpt_cli.engine.model.base_record import known_base
from medicalgpt_cli.engine.model.loading import (
    DTYPES,
    attach_adapter,
    choose_device,
    load_base,
    load_tokenizer,
    must_be_loadable_alone,
)
from medicalgpt_cli.engine.model.merged_weights import adapted_layers, fold
from medicalgpt_cli.engine.model.positions import positions
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel, resolve_models
from medicalgpt_cli.engine.model.tokenizer import save_tokenizer
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import staged
from medicalgpt_cli.errors import MedgptError, UsageError
from medicalgpt_cli.settings.stages import MergeLoraSettings

# Of fp32 logits, merged against base + adapter; or this many times the model's own noise, where that is more.
TOLERANCE, _TIMES_NOISE = 1e-4, 10

# What both are shown: English, Chinese, numbers, a list. The content does not matter, its variety does.
SAMPLE = (
    "The patient, aged 57, takes 5 mg of amlodipine once a day. Blood pressure: 142/88 mmHg.\n"
    "患者咳嗽三天，体温38.5℃，建议多饮水并及时就医。\n"
    "1. Rest  2. Fluids  3. Paracetamol 500 mg, at most 4 g a day"
)


def merge(settings: MergeLoraSettings, observer: Observer) -> dict[str, Any]:
    """Write base + adapter as one ordinary model folder.

    The weights are merged in fp32 and, without `--dtype`, stored in fp32: rounding them to the base's 16 bits
    would change what the adapter taught. With `--dtype bf16` or `fp16` the cost of the rounding is measured.

    Returns:
        What `--json` prints: the folder, how many layers' merged weights were compared with W + scaling · BA in
        float64 (`layers_compared`), and the largest difference of fp32 logits against base + adapter on sample
        text, of the merged weights (`in_memory`) and of the files read back (`on_disk`), beside the model's own
        `noise` and what was allowed (`tolerance`).

    Raises:
        UsageError: no adapter, an existing or overlapping output, a quantised base, another vocabulary, layers that
            share one weight under different changes.
        MedgptError: the merged model does not compute what base + adapter do; nothing is left on disk.
    """
    resolved = resolve_models(settings)
    output = Path(settings.output_dir or "")
    check_output(output, resolved)
    adapter = _adapter_of(resolved)
    kind = _check_kind(adapter)
    tokenizer = load_tokenizer(settings, resolved, observer)
    device = choose_device(settings)
    stored = torch.float32 if settings.dtype == "auto" else DTYPES[settings.dtype]

    with staged(output) as new:
        with (
            known_base(resolved, observer, accept=settings.accept_other_base) as accepted,
            task(observer, "loading weights"),
        ):
            model = _together(resolved, adapter, device)
        _check_vocabulary(model, tokenizer)
        ids = _sample(tokenizer, device)[:, : positions(model)]
        expected = _logits(model, ids)
        noise = _noise(model, ids, expected)
        with task(observer, "merging"):
            model, compared = fold(model)
        if (Path(adapter.path) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(adapter.path)
        merged = _logits(model, ids)
        tolerance = max(TOLERANCE, _TIMES_NOISE * noise)
        _must_agree(_difference(merged, expected), tolerance)
        rounded = merged
        if stored != torch.float32:
            _round(model, stored)
            rounded = _logits(model, ids)
        with task(observer, "writing"):
            _write(model, tokenizer, new, stored, settings.shard_size)
        del model  # room for the copy that is read back
        with task(observer, "reading back"):
            answered = _logits(_read_back(new, device), ids)
        if not torch.equal(answered, rounded):
            raise MedgptError("the files do not hold the merged weights", "is the disk sound?")
    report = {
        "folder": str(output),
        "base": resolved.base.name,
        "adapter": adapter.name,
        "adapter_kind": kind,
        "accepted_other_base": accepted,
        "dtype": str(stored).removeprefix("torch."),
        "tokens_compared": ids.shape[1],
        "in_memory": _difference(merged, expected),
        "on_disk": _difference(answered, expected),
        "other_first_choice": int((answered.argmax(-1) != expected.argmax(-1)).sum()),
        "layers_compared": compared,
        "noise": noise,
        "tolerance": tolerance,
    }
    _tell(report, observer)
    return report


# -- what is refused ---------------------------------------------------------------------------------------


def _adapter_of(resolved: ResolvedModel) -> ModelReference:
    if resolved.adapter is None:
        raise UsageError(f"{resolved.base.name} has no adapter to merge", "name an adapter with --lora-model")
    return resolved.adapter


def check_output(output: Path, resolved: ResolvedModel) -> None:
    """The output is a new folder, and neither an input nor inside one."""
    place = output.expanduser().resolve()
    for role, source in (("base model", resolved.base), ("adapter", resolved.adapter)):
        if source is None or source.folder is None:
            continue
        used = source.folder.resolve()
        if place == used or used in place.parents:
            raise UsageError(
                f"--output-dir {output} is the folder of the {role}, or inside it",
                "name a new folder elsewhere",
            )
    if output.exists():
        raise UsageError(f"--output-dir {output} exists already", "name a new folder; nothing is overwritten")


def _check_kind(adapter: ModelReference) -> str:
    """DoRA, rsLoRA or LoRA, for the report.

    Raises:
        UsageError: not an adapter of a language model.
    """
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(adapter.path)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UsageError(
            f"{adapter.name} is an adapter for {config.task_type}, not for a language model",
            "name an adapter that sft or pretrain made",
        )
    if getattr(config, "use_dora", False):
        return "DoRA"
    return "rsLoRA" if getattr(config, "use_rslora", False) else str(config.peft_type.value)


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}",
            "they do not belong together: check --tokenizer-path and --base-model",
        )


# -- merging and checking ----------------------------------------------------------------------------------


def _together(resolved: ResolvedModel, adapter: ModelReference, device: torch.device) -> Any:
    """Base and adapter in fp32: also an adapter that was trained on a quantised base goes on the full one."""
    base = load_base(resolved.base, torch.float32, device)
    must_be_loadable_alone(base, resolved.base.name)
    if getattr(base, "is_quantized", False) or getattr(base.config, "quantization_config", None):
        raise UsageError(
            f"{resolved.base.name} is a quantised model: merging into it would round the adapter away",
            "name the full-precision model with --base-model",
        )
    return attach_adapter(base, Path(adapter.path)).eval()


def _sample(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> torch.Tensor:
    """Token ids (1, length) of the sample text behind the chat template's own beginning."""
    messages = [{"role": "user", "content": SAMPLE}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=device)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(length, vocabulary), on the processor, in the format that the model computes in."""
    return model.eval()(input_ids=ids, use_cache=False).logits[0].cpu()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def _must_agree(difference: float, tolerance: float) -> None:
    """
    Raises:
        MedgptError: merged weights and base + adapter differ by more than the tolerance.
    """
    if not difference <= tolerance:  # also refuses NaN
        raise MedgptError(
            f"the merged weights do not compute what base and adapter do: logits differ by {difference:.2g}, "
            f"and rounding explains {tolerance:.2g}",
            "nothing was written; please report this with the adapter's adapter_config.json",
        )


def _noise(model: Any, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """How far fp32 logits move where the result of each layer with an adapter is off by a rounding.

    That is what merging does to a layer that it merges rightly; what becomes of it is the model's doing. A rounding is
    half of fp32's 2⁻²³; sums of products are off by more of them, so four are taken.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(_: torch.nn.Module, given: Any, result: Any) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        signs = torch.randint(0, 2, result.shape, generator=generator).to(result.device, result.dtype) * 2 - 1
        return result * (1 + 2**-22 * signs)

    hooks = [layer.register_forward_hook(shake) for _, layer in adapted_layers(model)]
    try:
        return _difference(_logits(model, ids), expected)
    finally:
        for hook in hooks:
            hook.remove()


def _round(model: Any, stored: torch.dtype) -> None:
    """Give the weights, in fp32, the values that the files will hold."""
    for weight in model.state_dict().values():
        if weight.is_floating_point():
            weight.copy_(weight.to(stored))


def _write(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, stored: torch.dtype, shard_size: str
) -> None:
    model.to(stored).save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(tokenizer, folder)


def _read_back(folder: Path, device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device)


def _tell(report: dict[str, Any], observer: Observer) -> None:
    text = (
        f"checked on {report['tokens_compared']} tokens: fp32 logits of the merged weights differ from "
        f"base + adapter by at most {report['in_memory']:.2e} (allowed {report['tolerance']:.1e})"
    )
    observer.on_notice(text)
    if report["layers_compared"]:
        layers = f"{report['layers_compared']:,} layers"
        observer.on_notice(f"the merged weights of {layers} are W + scaling · BA in float64, rounded to fp32")
    if report["dtype"] == "float32":
        observer.on_notice(
            "the files hold the same weights in fp32; --dtype bf16 halves their size, inexactly"
        )
        return
    observer.on_notice(
        f"storing in {report['dtype']} changed logits by up to {report['on_disk']:.2g} and the likeliest "
        f"token at {report['other_first_choice']} of {report['tokens_compared']} places; "
        "without --dtype the files are exact"
    )


@contextlib.contextmanager
def task(observer: Observer, name: str) -> Iterator[None]:
    """A bounded piece of work, told to the observer, also where it ends in an error."""
    observer.on_task_start(name)
    try:
        yield
    finally:
        observer.on_task_end(name)
