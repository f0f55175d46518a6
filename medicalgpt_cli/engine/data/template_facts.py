"""What a chat template does with roles, ends of turns, tools and reasoning: found by using it, once for a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.control_tokens import ControlTokens, control_ids, encode_piece, is_word
from medicalgpt_cli.engine.data.reasoning import NO_REASONING, ReasoningFacts, find_reasoning
from medicalgpt_cli.engine.data.tool_messages import NO_TOOLS, ToolFacts, find_tools

# What a template may raise: of its own, and where a conversation is not what it was written for.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError),
    *(RecursionError, SyntaxError),
)


@dataclass(frozen=True)
class AnswerHeader:
    """What a template's turns hold between the generation prompt and the answer; the model writes it first.

    gpt-oss, for example, is asked behind `<|start|>assistant` and says `<|channel|>final<|message|>` before it answers.
    """

    text: str  # special tokens spelled out, without spaces around it; "" where the answer comes at once
    ends_in_space: bool  # whether line ends or spaces behind it belong to the header, too
    first: int | None  # its first token where that is special: what else begins with it is another channel
    generation: tuple[int, ...]  # the tokens that a prompt for an answer ends with


@dataclass(frozen=True)
class TemplateFacts:
    """What a template does, found by using it, so that no list of model families is needed.

    written: control tokens for a document, the special ones. asked: for what users, systems and tools say, every
    added token that is no word. answered: for what an assistant says, the special ones and the marks of turns;
    its reasoning and its calls are its own.
    """

    template: Any  # its source, or several by their names
    writes: bool  # what is said; a template for images may expect parts where this program has a text
    takes_system: bool
    end_of_turn: int | None
    end_of_call: int | None
    written: ControlTokens
    asked: ControlTokens
    answered: ControlTokens
    header: AnswerHeader
    tools: ToolFacts
    reasoning: ReasoningFacts


def template_facts(tokenizer: PreTrainedTokenizerBase) -> TemplateFacts:
    cached = getattr(tokenizer, "_medgpt_known", None)
    if cached is None or cached.template != tokenizer.chat_template:
        cached = _find_out(tokenizer)
        tokenizer._medgpt_known = cached
    return cached


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """Renders messages, or pairs of role and content; "" where the template refuses them."""

    def render(*messages: Any, generation: bool = False, **more: Any) -> str:
        said: list[Any] = [
            one if isinstance(one, Mapping) else dict(zip(("role", "content"), one, strict=True))
            for one in messages
        ]
        try:
            return str(
                tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=generation, **more)
            )
        except TEMPLATE_ERRORS:
            return ""

    return render


def _find_out(tokenizer: PreTrainedTokenizerBase) -> TemplateFacts:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    template = tokenizer.chat_template
    if not template:
        asked = special | {number for number, token in added.items() if not is_word(token.content, "")}
        written = ControlTokens.of(tokenizer, special)
        controls = (written, ControlTokens.of(tokenizer, asked), written)
        end = tokenizer.eos_token_id
        return TemplateFacts("", True, True, end, end, *controls, _NO_HEADER, NO_TOOLS, NO_REASONING)

    render = _renderer(tokenizer)
    asked, answered = control_ids(added, special, render)
    takes_system = "Zq7" in render(("system", "Zq7"), ("user", "a"))
    # The end of a turn is the first special token behind an answer.
    before, _, behind = render(("user", "a"), ("assistant", "Zq7")).rpartition("Zq7")
    ids = encode_piece(tokenizer, behind)
    end = next((one for one in ids if one in special), tokenizer.eos_token_id)
    of = partial(ControlTokens.of, tokenizer)
    controls = (of(special), of(asked), of(answered))
    question, prompt = render(("user", "a")), render(("user", "a"), generation=True)
    header = _header(tokenizer, question, prompt, before, special)
    spelt = sorted((added[one].content for one in special), key=len, reverse=True)
    tools = find_tools(render, before, behind, spelt)
    end_of_call = next((one for one in special if added[one].content == tools.end), end)
    source = template if isinstance(template, str) else "\n".join(map(str, template.values()))
    reasoning = find_reasoning(render, header.text, source, {token.content for token in added.values()})
    answered_text = render(("user", "Zq6"), ("assistant", "Zq7"))
    writes = not answered_text or ("Zq6" in answered_text and "Zq7" in answered_text)
    return TemplateFacts(
        template, writes, takes_system, end, end_of_call, *controls, header, tools, reasoning
    )


_NO_HEADER = AnswerHeader("", False, None, ())


def _header(
    tokenizer: PreTrainedTokenizerBase, question: str, prompt: str, before: str, specials: Collection[int]
) -> AnswerHeader:
    """
    Args:
        question: a rendered question. prompt: the same with the generation prompt behind it.
        before: what is rendered up to where the answer to it begins.
    """
    header = before.removeprefix(prompt) if before.startswith(prompt) else ""
    if not header.strip():
        return _NO_HEADER
    first = encode_piece(tokenizer, header.strip())[0]
    generation: list[int] = []
    if prompt.startswith(question):
        # Where the question goes over into the generation prompt, its tokens may be others than alone.
        pair = (encode_piece(tokenizer, one)[::-1] for one in (prompt, prompt.removeprefix(question)))
        same = takewhile(lambda tokens: tokens[0] == tokens[1], zip(*pair, strict=False))
        generation = [token for token, _ in same][::-1]
    return AnswerHeader(
        header.strip(), header != header.rstrip(), first if first in specials else None, tuple(generation)
    )
