"""A reward model: a base, an adapter (or full weights) and one number read off an answer's last token.

On disk it is an ordinary PEFT adapter of the kind SEQ_CLS with its `score` head, or a `…ForSequenceClassification`
folder, with the tokenizer and template that it was trained with and reward.json. Where the library has no such class
(`score_head.py`), only medgpt loads them.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.modeling_outputs import SequenceClassifierOutput

from medicalgpt_cli.engine.model.adapters import target_layers
from medicalgpt_cli.engine.model.loading import (
    choose_device,
    choose_dtype,
    config_of,
    load_base,
    must_be_loadable_alone,
)
from medicalgpt_cli.engine.model.merged_weights import fold
from medicalgpt_cli.engine.model.model_files import building, read_object
from medicalgpt_cli.engine.model.parts import body_of
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel
from medicalgpt_cli.engine.model.score_head import HEAD, class_with_head
from medicalgpt_cli.engine.model.spread import written_to
from medicalgpt_cli.engine.model.weight_files import ADAPTER, check_numbers_in
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import AdapterSettings
from medicalgpt_cli.settings.stages import RewardSettings

RECORD = "reward.json"


def new_reward_model(settings: RewardSettings, resolved: ResolvedModel, observer: Observer) -> Any:
    """A reward model to be trained: over a base, or on top of an adapter, which becomes the reward's own.

    The adapter and its head lie over the original base, so that policy, reference, value and reward of `rl` can
    share one copy of its weights. With full tuning all weights learn, in fp32, an adapter merged into them first.
    A head that was trained before is kept.
    """
    from transformers import set_seed  # brings PEFT and bitsandbytes, which take a second

    full, device = settings.tuning == "full", choose_device(settings)
    dtype = torch.float32 if full else choose_dtype(settings, device)
    model = _with_head(resolved.base, dtype, device, quantization=settings.quantization)
    set_seed(settings.seed)
    if not _scores(model.config.architectures):
        _new_head(model)
    if full:
        must_be_loadable_alone(model, resolved.base.name)
        if resolved.adapter is not None:
            model, _ = fold(_with_adapter(model, settings, resolved.adapter))
            observer.on_notice("the adapter was merged into the weights, which are all trained")
        return model.requires_grad_(True)
    if resolved.adapter is None:
        for notice in target_layers(model, settings.target_modules).notices(model.config.model_type):
            observer.on_notice(notice)
    wrapped = _with_adapter(model, settings, resolved.adapter)
    for weight in wrapped.parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            weight.data = weight.data.float()
    return wrapped


def load_reward_model(
    resolved: ResolvedModel, dtype: torch.dtype, device: torch.device, quantization: str | None = None
) -> Any:
    """A trained reward model, in evaluation mode; its forward takes `ends` (`score_at_ends`).

    Raises:
        UsageError: it has no head, none that was trained, or its adapter does not fit its base.
    """
    check_head(resolved.adapter or resolved.base)
    complete = resolved.adapter is None
    model = _with_head(resolved.base, dtype, device, complete=complete, quantization=quantization)
    if resolved.adapter is not None:
        model = _attached(model, resolved.adapter)
    return model.eval().requires_grad_(False)


def check_head(place: ModelReference) -> None:
    """Refuse what cannot score.

    Raises:
        UsageError: not a reward model, or one whose head holds the random numbers that it began with.
    """
    folder = place.folder
    if folder is None:
        return  # a hub model is seen when it is loaded
    record = read_record(place)
    if record and not record.get("head_trained"):
        raise UsageError(
            f"{place.name}: the head of this reward model was never trained", "train it: medgpt reward"
        )
    if place.kind == "adapter":
        if not any(f".{HEAD}." in name for name in _names(folder)):
            raise UsageError(
                f"{place.name} is an adapter without a score head, not a reward model",
                "name a run of `medgpt reward`",
            )
        check_numbers_in(place.name, [folder / ADAPTER])
    elif not _scores(_config(folder).get("architectures")):
        raise UsageError(
            f"{place.name} is a language model, not a reward model", "name a run of `medgpt reward`"
        )


def _names(adapter: Path) -> list[str]:
    """The names of an adapter's weights, read without the weights."""
    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        raise UsageError(
            f"{adapter}: adapter_model.safetensors is missing or damaged", "was the copy complete?"
        ) from None


def _scores(architectures: Sequence[str] | None) -> bool:
    return any("SequenceClassification" in name for name in architectures or [])


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """reward.json: that the head was trained, and on which prompts (as hashes)."""
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(place: ModelReference) -> dict[str, Any]:
    """reward.json of a reward model of ours; empty for others.

    Raises:
        UsageError: it is damaged.
    """
    path = place.folder / RECORD if place.folder else None
    return read_object(path) if path and path.is_file() else {}


# -- scores ------------------------------------------------------------------------------------------------


def score_at_ends(
    self: Any,
    input_ids: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    prefixes: torch.Tensor | None = None,
    **_: Any,
) -> SequenceClassifierOutput:
    """The forward of a reward model: one number for each position in `ends`.

    The library's own finds an answer's end by the padding token's id, which many models use as end of text, too.

    Args:
        input_ids: (rows, length). ends: (answers,) where answers end, counted through all rows.

    Returns:
        logits: (answers,).
    """
    layout = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k, "prefixes": prefixes}
    hidden = body_of(self)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        **{name: value for name, value in layout.items() if value is not None},
    ).last_hidden_state
    head = getattr(self, HEAD)
    last = hidden.flatten(0, 1)[ends]
    with torch.autocast(last.device.type, enabled=False):  # bfloat16 has three digits
        scores = head(last.to(head.weight.dtype))
    return SequenceClassifierOutput(logits=scores.squeeze(-1).float())


def _with_head(
    base: ModelReference,
    dtype: torch.dtype,
    device: torch.device,
    *,
    complete: bool = False,
    quantization: str | None = None,
) -> Any:
    """A base with a scalar head in fp32, random where the files have none, and `score_at_ends` for its forward.

    Raises:
        UsageError: no such head can be put on it, or it is to be `complete` and the files lack it.
    """
    kind, config = class_with_head(config_of(base))
    model = load_base(
        base,
        dtype,
        device,
        kind=kind,
        config=config,
        may_lack=() if complete else (f"{HEAD}.weight",),
        quantization=quantization,
        kept=(HEAD,),
    )
    getattr(model, HEAD).float()
    model.forward = types.MethodType(score_at_ends, model)
    return model


def _new_head(model: Any) -> None:
    """Small random numbers, standard deviation 1 / sqrt(width + 1) (Stiennon et al. 2020; Huang et al. 2024).

    Drawn on the processor, so that a run begins with the same head on every device.
    """
    head = getattr(model, HEAD)
    with torch.no_grad(), written_to(head.weight):
        drawn = torch.empty_like(head.weight, device="cpu").normal_(std=(head.in_features + 1) ** -0.5)
        head.weight.copy_(drawn)


# -- adapters and full weights -----------------------------------------------------------------------------


def _with_adapter(model: Any, adapter: AdapterSettings, given: ModelReference | None) -> Any:
    """The model under a new adapter with its head, or under a copy of the one given."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    if given is not None:
        _refuse_own_embeddings(given)
    with building(
        given.name if given else "--target-modules", "no adapter over this base model can be made of it"
    ):
        config = score_adapter(
            model, adapter, None if given is None else PeftConfig.from_pretrained(given.path)
        )
        wrapped = get_peft_model(model, config)
    if given is not None:
        _names(Path(given.path))  # refuses a file that is missing or damaged
        check_numbers_in(given.name, [Path(given.path) / ADAPTER])
        content = load_file(Path(given.path) / "adapter_model.safetensors")
        # PEFT asks for a head, which an adapter of a language model does not have.
        content.setdefault(f"base_model.model.{HEAD}.weight", getattr(model, HEAD).weight.detach())
        loaded = set_peft_model_state_dict(wrapped, content)
        missing = [name for name in loaded.missing_keys if "lora_" in name]
        if missing or loaded.unexpected_keys:
            raise _misfit(given)
    return wrapped


def score_adapter(model: Any, adapter: AdapterSettings, given: Any = None) -> Any:
    """PEFT's configuration of a reward model's adapter: a new one, or that of the adapter it goes on with."""
    from peft import LoraConfig

    if given is None:
        config: Any = LoraConfig(
            r=adapter.lora_rank,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            target_modules=target_layers(model, adapter.target_modules).layers,
            use_dora=adapter.dora,
            use_rslora=adapter.rslora,
        )
    else:
        config = given
        config.inference_mode = False
        if config.target_modules == "all-linear":
            config.target_modules = target_layers(model, ("all",)).layers
    config.task_type = "SEQ_CLS"
    config.modules_to_save = [HEAD]
    return config


def _refuse_own_embeddings(given: ModelReference) -> None:
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(given.path)
    own = set(config.modules_to_save or ()) - {HEAD, "classifier"}  # PEFT names both of any classifier
    if own or config.trainable_token_indices:
        raise UsageError(
            f"{given.name} has embeddings of its own",
            "merge it first (medgpt merge-lora), then --base-model",
        )


def _attached(model: Any, adapter: ModelReference) -> Any:
    """The model under a trained adapter with its head."""
    from peft import PeftModel, get_peft_model_state_dict

    with building(adapter.name, "no adapter over this base model can be made of adapter_config.json"):
        try:
            wrapped = PeftModel.from_pretrained(model, adapter.path)
        except (RuntimeError, ValueError, KeyError) as problem:
            if "size mismatch" in str(problem) or "not found in the base model" in str(problem):
                raise _misfit(adapter) from None
            raise
    # PEFT only warns where the file and the model have different layers.
    if set(_names(Path(adapter.path))) != set(
        get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    ):
        raise _misfit(adapter)
    return wrapped


def _misfit(adapter: ModelReference) -> UsageError:
    return UsageError(
        f"{adapter.name} does not fit its base model: it was trained over another one",
        "name the adapter by itself: it knows its base",
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_object(path) if path.is_file() else {}
