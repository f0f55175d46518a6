"""Which layers the loss of a text reaches.

Not every linear layer of a language model has a part in what it predicts: attention to an encoder that is not there,
a tower for pictures inside the decoder, an index that only chooses. An adapter there would stay what it is, and
training in several processes would wait for its gradient. The model itself is asked, with a short text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from medicalgpt_cli.engine.model.parts import text_modules
from medicalgpt_cli.engine.model.score_head import HEAD
from medicalgpt_cli.engine.model.spread import is_spread

_SHORT, _LONG = 16, 512  # tokens; the long text is read where the short one leaves something out


def unreached(model: Any) -> frozenset[str]:
    """The names of the linear layers that no gradient of a text's loss reaches.

    Experts are never among them: which of them a text reaches is the text's doing. The answer is empty where processes
    share the weights, and where the model cannot be asked in this way.
    """
    if "_medgpt_unreached" not in vars(model):
        heads = (model.get_output_embeddings(), getattr(model, HEAD, None))
        layers = [
            name
            for name, module in text_modules(model)
            if isinstance(module, torch.nn.Linear | Conv1D)
            and all(module is not head for head in heads)
            and "expert" not in name
        ]
        left = frozenset() if is_spread(model) else _left_out(model, layers, _SHORT)
        if len(left) == len(layers):  # Reformer computes its layers out of autograd's sight
            left = frozenset()
        model._medgpt_unreached = _left_out(model, sorted(left), _LONG) if left else left
    return model._medgpt_unreached


def _left_out(model: Any, layers: Sequence[str], length: int) -> frozenset[str]:
    table = model.get_input_embeddings()
    limit = (
        max(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0, 0) or 2 * length
    )
    ids = torch.arange(3, 3 + min(length, limit // 2), device=table.weight.device)[None] % len(table.weight)
    asked = {"ends": torch.tensor([ids.shape[1] - 1], device=ids.device)} if hasattr(model, HEAD) else {}
    made: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        def hook(_: torch.nn.Module, given: Any, found: Any) -> Any:
            if not isinstance(found, torch.Tensor) or not torch.is_grad_enabled():
                return None
            if not found.requires_grad:  # of weights that are quantised, behind nothing that learns
                found.requires_grad_()
            made[name].append(found)
            return found

        return hook

    training = model.training
    with ExitStack() as undo, torch.enable_grad():
        undo.callback(model.train, training)
        for name in layers:
            undo.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        try:
            scores = model.eval()(input_ids=ids, **(asked or {"use_cache": False})).logits
            outputs = [one for found in made.values() for one in found]
            if not outputs:  # nobody asks them
                return frozenset(layers)
            gradients = torch.autograd.grad(scores.float().logsumexp(-1).sum(), outputs, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            return frozenset()  # what cannot be asked fails, or not, where it is used
    reached = {id(one) for one, gradient in zip(outputs, gradients, strict=True) if gradient is not None}
    return frozenset(name for name, found in made.items() if not any(id(one) in reached for one in found))


def places(names: Iterable[str], layers: Iterable[str]) -> list[str]:
    """Where `names`, some of `layers`, lie, as short as it can be said: "decoder.layers.*.encoder_attn"."""
    names = set(names)
    others = {part for name in set(layers) - names for part in _above(name)}
    return sorted(
        {re.sub(r"\.\d+(?=\.|$)", ".*", next(p for p in _above(name) if p not in others)) for name in names}
    )


def _above(name: str) -> list[str]:
    """A module's name and those of the modules it lies in, from the outermost on."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
