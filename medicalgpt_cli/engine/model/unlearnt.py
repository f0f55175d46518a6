"""Whether a base ever learnt the token with which its chat template ends an answer.

Vocabularies hold tokens for later use. In a base model their rows of the output head were never the target of a
loss: they are next to zero, copies of one another, or all of the length that they began with. An adapter that leaves
the head as it is cannot teach such a token, and answers do not end by themselves.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.rendering import end_of_turn
from medicalgpt_cli.engine.model.spread import is_spread

_SPARE = re.compile(r"reserved|unused|extra_id|placeholder|dummy", re.IGNORECASE)
_SAMPLE = 4096  # rows that say how long a learnt row is
_SHORT = 0.2  # of the median length
_SAME = 1e-3  # of its length: two rows are copies
_ALIKE, _FEW = 0.01, 8  # spare rows whose lengths differ by so little, and how many of them say something


@torch.no_grad()
def unlearnt_end(model: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the template's end token looks as if it was never trained; None where it does not, or cannot be told."""
    end, head = end_of_turn(tokenizer), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if (
        end is None
        or weight is None
        or is_spread(model)
        or not weight.is_floating_point()
        or end >= len(weight)
    ):
        return None
    row = weight[end].float()
    length = row.norm()
    chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
    if length < _SHORT * weight[chosen.to(weight.device)].float().norm(dim=1).median():
        return "its row of the output head is next to zero"
    added = tokenizer.added_tokens_decoder
    spare = [number for number, token in added.items() if number != end and _SPARE.search(token.content)]
    spare += range(len(tokenizer), len(weight))
    others = [number for number in {*added, *spare} if number != end and number < len(weight)]
    if others and ((weight[others].float() - row).norm(dim=1) < _SAME * length).any():
        return "its row of the output head is that of another token, too"
    if len(spare) >= _FEW:
        lengths = weight[[number for number in spare if number < len(weight)]].float().norm(dim=1)
        usual = lengths.median()
        alike = ((lengths - usual).abs() < _ALIKE * usual).float().mean()
        if alike > 0.5 and (length - usual).abs() < _ALIKE * usual:
            return "its row of the output head is as long as those of unused tokens"
    return None
