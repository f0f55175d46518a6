"""How long a text a model can read."""

from __future__ import annotations

from typing import Any

import torch

from medicalgpt_cli.engine.model.parts import body_of
from medicalgpt_cli.engine.model.spread import is_spread
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError

# Other names than `max_position_embeddings`, to which the library maps most.
_NAMES = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def positions(model: Any) -> int | None:
    """How many tokens of a text the model was made for; None where its configuration does not say."""
    text = model.config.get_text_config()
    stated = [getattr(text, name, None) for name in _NAMES]
    most = next((one for one in stated if isinstance(one, int) and one > 0), None)
    return None if most is None else most - _offset(model, most)


def _offset(model: Any, rows: int) -> int:
    """Rows of a table of `rows` positions that no token has: RoBERTa counts from behind the padding token's id."""
    for name, module in model.named_modules():
        if not name.endswith("position_embeddings") or not isinstance(module, torch.nn.Embedding):
            continue
        if module.padding_idx is not None and module.num_embeddings == rows:
            return module.padding_idx + 1
    return 0


@torch.no_grad()
def must_reach(model: Any, longest: int, observer: Observer, option: str) -> None:
    """See that the model can read a text of `longest` tokens.

    Positions that are computed have no end, and a text beyond what the model was made for is worth a word. Positions
    that were learnt, or made as a table, have one, behind which the model's code fails: it is asked.

    Args:
        option: what bounds the texts: "--max-length", say.

    Raises:
        UsageError: it cannot, or not while it learns.
    """
    if getattr(model.config, "axial_pos_embds", False):  # Reformer's are two tables, laid out for one length
        raise UsageError(
            f"{model.config.model_type} learns from texts of one length only: its positions are axial",
            "take another model",
        )
    most = positions(model)
    if most is None or longest <= most:
        return
    if not is_spread(model):
        weight = model.get_input_embeddings().weight
        ids = torch.full(
            (1, longest), len(weight) // 2, device=weight.device
        )  # no padding, which is not counted
        training = model.training
        try:
            # Brought back, so that a GPU, which does not wait for what it was asked, has failed by then.
            body_of(model.eval())(input_ids=ids, use_cache=False)[0].float().sum().item()
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError):
            raise UsageError(
                f"a text of {longest:,} tokens is longer than this model can read: its positions end at {most:,}",
                f"{option} {most}",
            ) from None
        finally:
            model.train(training)
    observer.on_warning(
        f"texts of up to {longest:,} tokens: the model was made for {most:,} ({option} bounds them)"
    )
