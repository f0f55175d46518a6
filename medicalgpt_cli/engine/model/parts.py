"""The parts of a causal language model: its body, its text decoder, and what it sees and hears with."""

from __future__ import annotations

from typing import Any

import torch


def body_of(model: Any) -> Any:
    """The part that makes hidden states out of token ids; what the output head is put on.

    Most classes of the library name it in `base_model_prefix`. Where that names nothing (Llama 4's text model), it is
    the child that holds the embeddings.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.base_model is not inner:
        return inner.base_model
    table = inner.get_input_embeddings()
    for child in inner.children():
        if child is not table and any(module is table for module in child.modules()):
            return child
    return inner


def beside_text(model: Any) -> list[str]:
    """Names of the modules that no text passes: towers for pictures and sounds, and what leads from them to the text.

    They are what stands beside the text decoder inside the body, and models inside it that take no token ids.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = body_of(inner)
    decoder = body.get_decoder() if hasattr(body, "get_decoder") else body
    found = []
    place = body
    while place is not decoder:
        way = [child for child in place.children() if any(one is decoder for one in child.modules())]
        if not way:
            break  # it is made up of modules that lie elsewhere
        found += [child for child in place.children() if child is not way[0]]
        place = way[0]
    for module in decoder.modules():
        if module is not decoder and getattr(module, "main_input_name", "input_ids") not in _IDS:
            found.append(module)
    table = inner.get_input_embeddings()
    return [
        name
        for name, module in inner.named_modules()
        if any(module is one for one in found) and module is not table
    ]


_IDS = ("input_ids", "inputs_embeds", "decoder_input_ids")


def is_inside(name: str, places: list[str]) -> bool:
    """Whether the module of a name is one of `places`, or lies in one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def text_modules(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """The named modules of a model without those that no text passes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    outside = beside_text(inner)
    return [(name, module) for name, module in inner.named_modules() if not is_inside(name, outside)]
