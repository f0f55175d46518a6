"""LoRA adapters: made over a base, continued, combined, saved as one ordinary PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from medicalgpt_cli.engine.model.experts import beside_experts, block_of, blocks_with_experts
from medicalgpt_cli.engine.model.model_files import read_object
from medicalgpt_cli.engine.model.parts import beside_text, text_modules
from medicalgpt_cli.engine.model.reached import places, unreached
from medicalgpt_cli.engine.model.score_head import HEAD
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import did_you_mean
from medicalgpt_cli.settings.groups import AdapterSettings


def lora_config(model: Any, adapter: AdapterSettings, new_rows: Sequence[int] = ()) -> Any:
    """PEFT's configuration of an adapter over `model`.

    Args:
        new_rows: the ids of tokens that `medgpt vocabulary` added to the base.

    Raises:
        UsageError: `--target-modules` names a layer that the model does not have, or `--embeddings new` is
            asked of a base without new tokens.
    """
    from peft import LoraConfig

    if adapter.embeddings == "new" and not new_rows:
        raise UsageError(
            "--embeddings new: the base model has no added tokens",
            "`medgpt vocabulary` adds some; or take all",
        )

    return LoraConfig(
        r=adapter.lora_rank,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=target_layers(model, adapter.target_modules).layers,
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        task_type="CAUSAL_LM",
        **_embeddings(model, adapter.embeddings, list(new_rows)),
    )


def _embeddings(model: Any, which: str, new_rows: list[int]) -> dict[str, Any]:
    """Which rows of the embeddings, and of an untied head, learn beside the adapter."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = tables[0].weight is tables[1].weight
    tables = tables[:1] if tied else tables  # PEFT carries a tied head along
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in tables]
    if which == "all":
        return {"modules_to_save": names, "ensure_weight_tying": tied}
    if which in ("new", "auto") and new_rows:
        return {"trainable_token_indices": dict.fromkeys(names, new_rows)}
    return {}


def add_adapter(model: Any, adapter: AdapterSettings, *, seed: int, new_rows: Sequence[int] = ()) -> Any:
    """Freeze `model` and put a new trainable adapter over it; it starts as the identity.

    Returns:
        A PeftModel whose adapter weights are fp32, whatever the base's format.
    """
    from peft import get_peft_model
    from transformers import set_seed  # brings PEFT and bitsandbytes, which take a second

    set_seed(seed)  # the same seed gives the same initial adapter, whatever was drawn before
    wrapped = get_peft_model(model, lora_config(model, adapter, new_rows))
    for weight in wrapped.parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            weight.data = weight.data.float()
    return wrapped


def different_shape(folder: Path, adapter: AdapterSettings) -> dict[str, Any]:
    """Settings in which an adapter on disk differs from `adapter`: field name to the adapter's own value."""
    config = read_object(folder / "adapter_config.json")
    own = {
        "lora_rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "dora": config.get("use_dora", False),
        "rslora": config.get("use_rslora", False),
    }
    if adapter.embeddings != "auto":
        own["embeddings"] = (
            "all"
            if config.get("modules_to_save")
            else "new"
            if config.get("trainable_token_indices")
            else "frozen"
        )
    return {name: value for name, value in own.items() if getattr(adapter, name) != value}


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the adapter as safetensors with the base that it belongs to.

    Args:
        base: the original base model: a hub name, or a folder (written as an absolute path).
    """
    path = Path(base)
    model.peft_config["default"].base_model_name_or_path = str(path.resolve()) if path.exists() else base
    model.peft_config["default"].inference_mode = True
    # Left to decide by itself, PEFT would ask the hub whether the base's vocabulary is the same.
    model.save_pretrained(
        folder, safe_serialization=True, selected_adapters=["default"], save_embedding_layers=False
    )
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template says nothing


# -- which layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """The layers that an adapter goes on, and what is left out of all of them."""

    layers: str | list[str]  # as PEFT takes them
    refused: tuple[
        str, ...
    ] = ()  # names of layers on which PEFT puts none, or whose adapter would not be asked
    beside: tuple[str, ...] = ()  # modules that no text passes
    unreached: tuple[str, ...] = ()  # where layers lie that no gradient reaches

    def notices(self, kind: str) -> list[str]:
        """What is left out, in words. `kind`: of model, as its configuration names it."""
        found = []
        if self.refused:
            found.append(f"no LoRA on {', '.join(self.refused)}: these layers of {kind} cannot have it")
        if self.beside:
            found.append(f"no LoRA on {', '.join(self.beside)}: no text passes there")
        if self.unreached:
            found.append(f"no LoRA on {', '.join(self.unreached)}: no gradient of the loss reaches it")
        return found


def target_layers(model: Any, named: tuple[str, ...]) -> Targets:
    """The layers of `--target-modules`.

    All: every linear layer that text passes and a gradient reaches, but the output head, what PEFT refuses and, in
    models with experts, the blocks in which these lie.

    Raises:
        UsageError: the model has no such layer, or it cannot have an adapter.
    """
    linear = _linear_layers(model)
    if "all" not in named:
        return _named(model, linear, named)
    if named != ("all",):
        raise UsageError("--target-modules all goes alone", "name layers, or all")
    blocks = blocks_with_experts(model)
    wanted = [name for name in linear if not blocks or block_of(name) not in blocks | {None}]
    if not wanted:  # every block is called "mixer", say
        wanted = beside_experts(model, linear)
    refused = {_own(name) for name in wanted if _is_refused(model, name)}
    kept = [name for name in wanted if _own(name) not in refused]
    renamed = _renamed(model, kept)
    refused |= {_own(name) for name in renamed}
    kept = [name for name in kept if name not in renamed]
    out = unreached(model) & set(kept)
    kept = [name for name in kept if name not in out]
    if not kept:
        raise _nothing_left(model, linear)
    beside = tuple(beside_text(model))
    if not blocks and not refused and not beside and not out and not hasattr(model, HEAD):
        return Targets("all-linear")  # found by PEFT
    return Targets(
        _as_peft_takes(model, kept), tuple(sorted(refused)), beside, tuple(places(out, [*kept, *out]))
    )


def _renamed(model: Any, layers: Sequence[str]) -> set[str]:
    """Those of `layers` whose adapter PEFT would not find again in its own file.

    It renames what it reads as the library renames an older file's weights, also where the names are the new ones
    (the convolutions of Inkling 2), and leaves such layers without the adapter that was saved.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    keys = {name: f"base_model.model.{name}.lora_A.weight" for name in layers}
    weights = {key: torch.zeros(1, 1) for key in keys.values()}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), weights)
    return {name for name, key in keys.items() if key not in found}


def _nothing_left(model: Any, linear: Sequence[str]) -> UsageError:
    able = sorted({_own(name) for name in linear if not _is_refused(model, name)})
    return UsageError(
        f"no layer of {model.config.model_type} gets an adapter by itself"
        + (": its linear layers lie among its experts" if able else ""),
        "--tuning full trains all weights"
        + (f"; --target-modules names layers, of {', '.join(able)}" if able else ""),
    )


def _linear_layers(model: Any) -> list[str]:
    """The names of the linear layers that text passes, the heads aside."""
    heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
    return [
        name
        for name, module in text_modules(model)
        if isinstance(module, torch.nn.Linear | Conv1D) and all(module is not head for head in heads)
    ]


def _own(name: str) -> str:
    return name.rpartition(".")[2]


def _named(model: Any, linear: Sequence[str], named: tuple[str, ...]) -> Targets:
    """The layers that a user named."""
    able = {name for name, module in model.named_modules() if isinstance(module, _ABLE)}
    passed = {name for name, _ in text_modules(model)}
    known = sorted({_own(name) for name in able & passed})
    found: list[str] = []
    for name in named:
        meant = [path for path, _ in model.named_modules() if path == name or path.endswith(f".{name}")]
        if not meant or not able.issuperset(meant):
            near = did_you_mean(name, known)
            hint = f"did you mean {near}?" if near else f"this model has: {', '.join(known)}"
            raise UsageError(f"--target-modules {name}: the model has no such layer", hint)
        if passed.isdisjoint(meant):
            raise UsageError(
                f"--target-modules {name}: no text passes this layer, so it would learn nothing",
                f"this model has: {', '.join(known)}",
            )
        if any(_is_refused(model, path) for path in meant) or _renamed(model, meant):
            rest = sorted({_own(path) for path in linear if not _is_refused(model, path)})
            raise UsageError(
                f"--target-modules {name}: this layer of {model.config.model_type} cannot have LoRA",
                f"leave it out, or take: {', '.join(rest)}",
            )
        found += [path for path in meant if path in passed]
    out = unreached(model) & set(found)
    said = tuple(places(out, found))
    kept = [path for path in found if path not in out]
    if not kept:
        raise UsageError(
            f"--target-modules {' '.join(named)}: no gradient of the loss reaches {', '.join(said)}",
            f"an adapter there would learn nothing; this model has: {', '.join(known)}",
        )
    others = able - set(kept)
    if not any(path == one or path.endswith(f".{one}") for path in others for one in named):
        return Targets(list(named))
    return Targets(_as_peft_takes(model, kept), unreached=said)


_ABLE = (torch.nn.Linear, torch.nn.Embedding, Conv1D)


def _as_peft_takes(model: Any, layers: Sequence[str]) -> list[str]:
    """Last parts of names where these mean the layers and no other module, else the whole names."""
    own = {_own(name) for name in layers}
    meant = {name for name, _ in model.named_modules() if _own(name) in own}
    return sorted(own) if meant == set(layers) else sorted(layers)


def _is_refused(model: Any, name: str) -> bool:
    """Whether a layer cannot have LoRA: PEFT refuses it in this kind of model, or nobody asks it.

    PEFT decides by the kind of model and the layer's own name, so it is asked with a model that has nothing else. A
    Mamba mixer multiplies with the weights of `dt_proj` itself, past any adapter.
    """
    own, place = _own(name), model.get_submodule(name.rpartition(".")[0])
    if own == "dt_proj" and hasattr(place, "x_proj"):
        return True
    return not _is_linear(model.get_submodule(name)) or _peft_refuses(model, own)


def _is_linear(layer: torch.nn.Module) -> bool:
    """Whether a layer maps `in_features` numbers to `out_features`, which is what PEFT adds BA to.

    The library makes classes of `nn.Linear` that do other things with its weight: DeepSeek V4 multiplies groups of
    heads with a part of it each, a router gives several tensors. A copy without weights shows what shape comes out.
    """
    kind = type(layer)
    if not kind.__module__.startswith("transformers.models") or not isinstance(layer, torch.nn.Linear):
        return True  # of torch, or a quantised layer, which PEFT knows
    copied = copy.copy(layer)
    copied._parameters = {
        name: None if weight is None else torch.nn.Parameter(torch.empty(_whole_shape(weight), device="meta"))
        for name, weight in layer._parameters.items()
    }
    try:
        found = copied(torch.empty(1, 1, layer.in_features, device="meta"))
    except (RuntimeError, ValueError, IndexError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 1, layer.out_features)


def _whole_shape(weight: torch.Tensor) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 holds a flat share


def _peft_refuses(model: Any, own: str) -> bool:
    from peft import LoraConfig, get_peft_model

    known = vars(model).setdefault("_medgpt_refused", {})
    if own not in known:
        with torch.random.fork_rng(devices=[]):  # the same seed goes on giving the same adapter
            probe = torch.nn.Module()
            probe.layer = torch.nn.Module()
            probe.layer.add_module(own, torch.nn.Linear(1, 1))
            probe.config = model.config
            try:
                get_peft_model(probe, LoraConfig(r=1, target_modules=[own]))
                known[own] = False
            except ValueError:
                known[own] = True
    return known[own]
