"""Templates with tools and reasoning, in the manner of the families they are named after: structure theirs, words ours.

They stand in `tests/data/templates`:
qwen2.5, hermes: a JSON object a call, between marks (in Hermes the arguments stand in front of the name).
qwen3: the same; reasoning stands in the answer to the last question only, and a switch lets the prompt close it.
llama3.1: the tools stand in the first question; a call is bare JSON; one call a turn, and no text beside it.
mistral: calls are one JSON list behind a special token, each with an id of nine letters and digits.
glm4: a call is a turn of its own whose first line is the name; turns have no end but the beginning of the next one.
deepseek: name and arguments behind marks of their own, all calls between two more; the prompt opens the reasoning, the
    history leaves it out; the tools are not listed.
glm4.5: each argument in a pair of marks, text as it is and all else as JSON.
gpt-oss: channels; reasoning, calls and answers are turns with different headers behind the same generation prompt.
plain: no place for tools and reasoning; any role, and its text.
"""

from __future__ import annotations

import functools
import re

from tests.conftest import DATA
from tests.tiny import tiny_tokenizer

TEMPLATES = {one.stem: one.read_text(encoding="utf-8") for one in sorted(DATA.glob("templates/*.jinja"))}
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|return|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<end_of_turn>",
    "<|end|>",
)
# Marks of templates that are special tokens; those of reasoning and of Qwen's calls are added tokens, but not special.
_SPECIAL = re.compile(
    r"<\|[^|<>{}\s'\"]+\|>|<｜[^｜<>{}\s]+｜>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>|<(?:start|end)_of_turn>"
    r"|<\|(?:turn|tool_call|tool_response|channel)>|<(?:turn|tool_call|tool_response|channel)\|>|<\|\\?\"\|>"
)
_ADDED = tuple(f"<{end}{one}>" for one in ("think", "tool_call", "arg_key", "arg_value") for end in ("", "/"))


def tokenizer_for(template: str):
    """A tokenizer in whose vocabulary the marks of a template are tokens."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer("none")
    special = sorted(set(_SPECIAL.findall(template)) | {"<s>", "</s>"})
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.add_tokens(
        [AddedToken(one, special=False, normalized=False) for one in _ADDED if one in template]
    )
    tokenizer.eos_token = next(one for one in _ENDS if one in special)
    tokenizer.bos_token = next(
        (one for one in ("<s>", "<|begin_of_text|>", "<bos>") if one in special), "<s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def tokenizer_of(style: str):
    return tokenizer_for(TEMPLATES[style])
