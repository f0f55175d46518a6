"""LoRA adapters: made over a base, continued, combined, saved as one ordinary PEFT adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medicalgpt_cli.engine.model.experts import expert_weights, layers_beside_experts
from medicalgpt_cli.engine.model.model_files import read_object
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
        target_modules=target_layers(model, adapter.target_modules),
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


def target_layers(model: Any, named: tuple[str, ...]) -> str | list[str]:
    """The layers of `--target-modules`, as PEFT takes them.

    Raises:
        UsageError: the model has no such layer.
    """
    if named == ("all",):
        if expert_weights(model):
            return layers_beside_experts(model)
        return "all-linear"  # every linear layer but the output head, found by PEFT
    if "all" in named:
        raise UsageError("--target-modules all goes alone", "name layers, or all")
    known = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    paths = [name for name, _ in model.named_modules()]
    for name in named:
        if name not in known and not any(path.endswith("." + name) for path in paths):
            near = did_you_mean(name, known)
            hint = f"did you mean {near}?" if near else f"this model has: {', '.join(sorted(known))}"
            raise UsageError(f"--target-modules {name}: the model has no such layer", hint)
    return list(named)
