"""A model without weights: every layer with its shape and number format, made from its configuration alone.

It is built by the same functions as the real one, on torch's meta device, where tensors have a shape and no content.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.adapters import lora_config
from medicalgpt_cli.engine.model.dropout import use_fast_dropout
from medicalgpt_cli.engine.model.loading import read_config
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.model.reward_model import score_adapter
from medicalgpt_cli.engine.model.score_head import HEAD, class_with_head
from medicalgpt_cli.engine.model.vocabulary import new_token_ids
from medicalgpt_cli.engine.planning import memory
from medicalgpt_cli.engine.planning.stand_ins import QuantisedLinear, quantise
from medicalgpt_cli.settings.groups import AdapterSettings

Kind = Literal["language", "reward"]

# What a model raises that does something which depends on numbers, or has a configuration of its own kind. Among the
# RuntimeErrors is that of a setting which differs from layer to layer and is asked of the whole.
UNKNOWN = (
    RuntimeError, ValueError, AttributeError, LookupError, TypeError, AssertionError, ArithmeticError, ImportError,
)  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """What decides about a model's shapes.

    `config` is the base's; `adapter` a PEFT configuration to go on with, else `tuning` says what learns, if anything.
    """

    config: Any
    dtype: torch.dtype
    kind: Kind = "language"
    tuning: AdapterSettings | None = None
    adapter: Any = None
    quantization: str | None = None
    new_rows: tuple[int, ...] = ()

    @property
    def full(self) -> bool:
        """Whether all weights learn."""
        return self.tuning is not None and self.tuning.tuning == "full"

    @cached_property
    def stand_ins(self) -> tuple[int, int] | None:
        """Numbers of layers of two short models that tell what a layer more costs; None where none tell.

        The longer one has a period of layers more than the shorter, and the whole model some periods more than that.
        All begin with what comes once (dense layers before those with experts). A period is at least two layers,
        because some models alternate in what weights do not show.
        """
        kinds = kinds_of_layers(build(self._bare))
        whole = len(kinds)
        for ahead in range(whole // 2):
            for period in range(2, (whole - ahead) // 2 + 1):
                if kinds[ahead + period :] == kinds[ahead:-period]:
                    short = ahead + period + (whole - ahead) % period
                    long = short + period
                    return (short, long) if long < whole and self._begins_as(kinds, long) else None
        return None

    @property
    def _bare(self) -> Outline:
        return Outline(self.config, self.dtype, self.kind)

    def _begins_as(self, kinds: list[Any], layers: int) -> bool:
        """Whether a configuration of fewer layers makes the first ones of the whole model."""
        try:
            return kinds_of_layers(build(self._bare, layers)) == kinds[:layers]
        except UNKNOWN:
            return False


@dataclass(frozen=True)
class Parameters:
    """Weights by part, as numbers and as bytes in memory."""

    total: int
    base: int
    embeddings: int  # the output head included, where it is a table of its own
    adapter: int
    trainable: int
    base_bytes: int
    adapter_bytes: int
    trainable_bytes: int


def outline(
    resolved: ResolvedModel,
    dtype: torch.dtype,
    *,
    kind: Kind = "language",
    tuning: AdapterSettings | None = None,
    quantization: str | None = None,
) -> Outline:
    """The outline of a command's model. Full weights are held in fp32 (`training/tuning.py`)."""
    full = tuning is not None and tuning.tuning == "full"
    adapter = None
    if resolved.adapter is not None and not full:  # a full run merges it into the weights
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(resolved.adapter.path)
    rows = new_token_ids(resolved.base.folder) if resolved.base.folder else []
    config = read_config(resolved)
    stored = getattr(config, "quantization_config", None)
    if stored and quantization is None:
        quantization = _stored_bits(stored)
    return Outline(config, torch.float32 if full else dtype, kind, tuning, adapter, quantization, tuple(rows))


def _stored_bits(stored: Any) -> str | None:
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return "4bit" if stored.get("load_in_4bit") else "8bit" if stored.get("load_in_8bit") else None


def build(plan: Outline, layers: int | None = None) -> Any:
    """The model of an outline on the meta device, with what learns requiring gradients.

    Args:
        layers: make only so many of its layers.

    Raises:
        NotImplementedError: transformers cannot make a model of the configuration without numbers.
    """
    config = copy.deepcopy(plan.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the stand-ins take its place
    if layers is not None:
        shorten(config, layers)
    with torch.device("meta"), _quietly():
        try:
            if plan.kind == "reward":
                kind, config = class_with_head(config)
                model = kind._from_config(config, dtype=plan.dtype)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=plan.dtype, trust_remote_code=False)
        except UNKNOWN as problem:
            raise NotImplementedError(f"{type(problem).__name__}: {problem}") from problem
        if plan.kind == "reward":
            getattr(model, HEAD).float()
        if plan.quantization:
            quantise(model, plan.quantization)
        model.requires_grad_(plan.full)
        if not plan.full and (plan.tuning is not None or plan.adapter is not None):
            model = _with_adapter(model, plan)
    return model


def _with_adapter(model: Any, plan: Outline) -> Any:
    from peft import get_peft_model

    config = copy.deepcopy(plan.adapter)
    if plan.kind == "reward":
        config = score_adapter(model, plan.tuning or AdapterSettings(), config)
    elif config is None:
        config = lora_config(model, plan.tuning, plan.new_rows)
    config.inference_mode = False
    wrapped = get_peft_model(model, config)
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    use_fast_dropout(wrapped)  # a GPU's own dropout keeps as much: a byte an element
    return wrapped if plan.tuning is not None else wrapped.requires_grad_(False)


def shorten(config: Any, layers: int) -> None:
    """Make a configuration one of fewer layers, and every list in it that has an entry for each."""
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == whole:
            vars(text)[name] = value[:layers]
    text.num_hidden_layers = layers


def depth(config: Any) -> int:
    return config.get_text_config().num_hidden_layers


def kinds_of_layers(model: Any) -> list[Any]:
    """What tells each layer from the others: its kind by the configuration, and the names and shapes of its weights.

    Raises:
        NotImplementedError: the model has no list of as many layers as its configuration says.
    """
    whole = depth(model.config)
    stacks = [one for one in model.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == whole]
    if not stacks:
        raise NotImplementedError("no list of layers")
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * whole
    return [
        (
            types[index],
            *((name, weight.shape) for stack in stacks for name, weight in stack[index].named_parameters()),
        )
        for index in range(whole)
    ]


def count(model: Any) -> Parameters:
    """Weights of a model by part. One that stands in two places (a tied head) counts once."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables = {id(inner.get_input_embeddings().weight)}
    head = inner.get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    quantised = {
        id(module.weight): module for module in model.modules() if isinstance(module, QuantisedLinear)
    }
    found = dict.fromkeys(
        ("total", "base", "embeddings", "adapter", "trainable", "base_bytes", "adapter_bytes", "trainable_bytes"), 0
    )  # fmt: skip
    for name, weight in model.named_parameters():  # names each weight once
        size = weight.numel() * weight.element_size()
        if id(weight) in quantised:
            module = quantised[id(weight)]
            size = memory.quantised_bytes(module.bits, module.out_features, module.in_features)
        part = "adapter" if ".lora_" in name or ".modules_to_save." in name or "_tokens_" in name else "base"
        found["total"] += weight.numel()
        found[part] += weight.numel()
        found[f"{part}_bytes"] += size
        found["embeddings"] += weight.numel() if id(weight) in tables else 0
        if weight.requires_grad:
            found["trainable"] += weight.numel()
            found["trainable_bytes"] += size
    return Parameters(**found)


@contextlib.contextmanager
def _quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
