"""The class of a model with a scalar head: the library's …ForSequenceClassification, or one of ours where it has none.

Ours is the language model without its output head: the same weights under the same names, so that a language model's
files fill it, and an adapter over the one fits the other.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from medicalgpt_cli.errors import UsageError

HEAD = "score"


def class_with_head(config: Any) -> tuple[Any, Any]:
    """The class that computes scores with the weights of a language model, and the configuration that it takes.

    Args:
        config: the base's; it stays as it is.

    Raises:
        UsageError: the library has no language model of this kind, or the files are of a classifier with another head.
    """
    config = copy.deepcopy(config)
    of_the_library = _chosen(AutoModelForSequenceClassification, config)
    if of_the_library is not None and _has_head(of_the_library, config):
        found = of_the_library
    elif of_the_library is not None and of_the_library.__name__ in (config.architectures or []):
        raise UsageError(
            f"{of_the_library.__name__} has no scalar head named {HEAD}",
            f"name a reward model whose head is one linear layer named {HEAD}, or a language model to train one",
        )
    else:
        language = _chosen(AutoModelForCausalLM, config)
        if language is None:
            raise UsageError(
                f"{config.model_type} is no causal language model that the installed transformers knows",
                "name another base model",
            )
        found = _of_ours(language)
    if found.config_class is config.sub_configs.get("text_config"):
        stored = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if stored is not None:
            config.quantization_config = stored
    config.num_labels = 1
    return found, config


def _chosen(auto: Any, config: Any) -> Any:
    """The class that one of the library's automatic classes takes for a configuration; None where it knows none."""
    known = auto._model_mapping
    if type(config) not in known:
        return None
    found = known[type(config)]
    if not isinstance(found, Sequence):
        return found
    return next((one for one in found if one.__name__ in (config.architectures or [])), found[0])


def _has_head(kind: Any, config: Any) -> bool:
    if issubclass(kind, GenericForSequenceClassification):
        return True
    with torch.device("meta"):
        return isinstance(getattr(kind(config), HEAD, None), torch.nn.Linear)


@functools.cache
def _of_ours(language: Any) -> Any:
    """A class like `language`, with a scalar head in the place of its output head."""

    def __init__(self: Any, config: Any) -> None:
        language.__init__(self, config)
        head = language.get_output_embeddings(self)
        places = [name for name, module in self.named_modules() if module is head]
        for name in places:
            place, _, own = name.rpartition(".")
            setattr(self.get_submodule(place), own, None)
        unused = tuple(f"{name}." for name in places)
        tied = self._tied_weights_keys or {}
        self._tied_weights_keys = {name: to for name, to in tied.items() if not name.startswith(unused)}
        self._keys_to_ignore_on_load_unexpected = [
            *(self._keys_to_ignore_on_load_unexpected or []),
            *(rf"(^|\.){re.escape(name)}" for name in unused),
        ]
        width = head.in_features  # not always the `hidden_size`: Reformer's two streams come out side by side
        setattr(self, HEAD, torch.nn.Linear(width, config.num_labels, bias=False))
        self.post_init()

    name = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", language.__name__)
    return type(
        f"{name}ForSequenceClassification",
        (language,),
        {
            "__init__": __init__,
            "__module__": language.__module__,  # the library converts stored weights for classes of its own only
            "__doc__": f"{language.__name__} with a scalar head.",
            "get_output_embeddings": lambda self: None,
            "can_generate": classmethod(lambda cls: False),
            # What some classes draw for themselves is their output head (ModernBERT's decoder).
            "_init_weights": lambda self, module: (
                None if module is self else language._init_weights(self, module)
            ),
        },
    )
