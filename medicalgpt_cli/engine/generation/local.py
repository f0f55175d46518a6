"""Answers from a model in this process: in batches for files, token by token for a conversation.

Both, and the server's scheduler, take the steps of `decoding.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.reasoning import Thinking
from medicalgpt_cli.engine.data.rendering import (
    encode_prompt,
    encode_raw,
    encode_within,
    fit_history,
    stop_token_ids,
)
from medicalgpt_cli.engine.data.template_facts import template_facts
from medicalgpt_cli.engine.data.tools import Delta
from medicalgpt_cli.engine.generation.answer_reader import EncodedPrompt, content_of
from medicalgpt_cli.engine.generation.decoding import (
    Answer,
    Batch,
    Row,
    Sampler,
    answer_of,
    caches_exactly,
)
from medicalgpt_cli.engine.model.base_record import known_base
from medicalgpt_cli.engine.model.loading import load_model
from medicalgpt_cli.engine.model.positions import positions
from medicalgpt_cli.engine.model.references import ResolvedModel
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.planning.weights import must_fit
from medicalgpt_cli.engine.training import attention
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.groups import EndpointSettings, SamplingSettings


def load_to_answer(settings: EndpointSettings, resolved: ResolvedModel, observer: Observer) -> Any:
    """The model of a command that answers, if it fits into memory.

    Raises:
        EnvironmentFailure: it does not, and there is no --force. What `load_model` and `check_base` raise.
    """
    must_fit(settings, resolved, force=settings.force)
    with known_base(resolved, observer, accept=settings.accept_other_base):
        return load_model(settings, resolved, observer=observer)


class LocalBackend:
    """Answers prompts with a loaded model, by its own attention: the one for rows laid end to end has no cache."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        observer: Observer | None = None,
    ):
        """
        Args:
            observer: told, once a model, where its answers have to be computed without a cache.
        """
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.stop_ids = frozenset(stop_token_ids(tokenizer, model.generation_config))
        self.context = context_length(model, sampling)
        self.sampler = Sampler(sampling)
        self.last: Answer | None = None
        with attention.own(model):
            self.cached = caches_exactly(model, tokenizer, observer)

    def answer_batch(
        self,
        prompts: Sequence[EncodedPrompt | Sequence[int]],
        on_done: Callable[[int, Answer], None],
        *,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Answer prompts together; `on_done(index, answer)` is called as each ends, in any order.

        Args:
            prompts: each encoded; token ids alone are those of the template without tools.
            numbers: what makes each row's draw its own beside the seed; its index where not given.
        """
        rows = []
        for index, prompt in enumerate(prompts):
            refused = self.refusal(prompt)
            if refused:
                on_done(index, Answer("", [], "error", len(prompt), 0, refused))
                continue
            number = index if numbers is None else numbers[index]
            rows.append(self.row(prompt, self.sampler, number, index=index))
        for row, reason in self._run(rows):
            if reason:
                on_done(row.index, answer_of(self.tokenizer, row, reason))

    def stream(self, prompt: EncodedPrompt | Sequence[int], *, number: int = 0) -> Iterator[str]:
        """The text of the answer piece by piece, without reasoning and calls; see `deltas`."""
        pieces = self.deltas(prompt, number=number)
        try:
            for piece in pieces:
                yield content_of(piece)
        finally:
            pieces.close()

    def deltas(
        self, prompt: EncodedPrompt | Sequence[int], *, number: int = 0
    ) -> Generator[list[Delta], None, None]:
        """Answer one prompt piece by piece; the whole is in `last` afterwards. Close it to stop early.

        There is a piece for each token, empty where the token completes no character, so that whoever listens
        can stop at any token.

        Args:
            number: what makes the draw its own beside the seed.

        Raises:
            ValueError: the prompt is empty or fills the context.
        """
        refused = self.refusal(prompt)
        if refused:
            raise ValueError(refused)
        row = self.row(prompt, self.sampler, number)
        row.streams = True
        self.last = None
        try:
            for _, reason in self._run([row]):
                if reason:
                    self.last = answer_of(self.tokenizer, row, reason)
                yield row.reader(self.tokenizer).take()
        finally:
            # whoever listened has stopped it
            self.last = self.last or answer_of(self.tokenizer, row, "stop")

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: Thinking | None = None,
    ) -> EncodedPrompt:
        """A conversation up to where the answer begins.

        Args:
            tools: that may be called. thinking: the settings' where not given.

        Raises:
            UsageError: the template refuses the conversation, or has no switch for reasoning.
        """
        thinking = thinking or self.sampling.thinking
        ids = encode_prompt(self.tokenizer, messages, tools, thinking)
        return EncodedPrompt(ids, tuple(tools), thinking)

    def fitted_prompt(
        self,
        messages: Sequence[Message],
        max_new_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: Thinking | None = None,
    ) -> tuple[EncodedPrompt, int]:
        """The same without the oldest exchanges that do not fit, and how many messages these are.

        Half the context at most is kept free for the answer.

        Raises:
            UsageError: the newest question alone fills the context, or what `prompt` raises.
        """
        wanted = self.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        thinking = thinking or self.sampling.thinking
        room = max(self.context - wanted, self.context // 2)
        kept, dropped = fit_history(self.tokenizer, messages, room, tools, thinking)
        ids = encode_within(self.tokenizer, kept, self.context - 1, tools, thinking)
        if ids is None:
            raise UsageError(
                f"the question has no room in the context of {self.context} tokens", "ask a shorter one"
            )
        return EncodedPrompt(ids, tuple(tools), thinking), dropped

    def bounded_prompt(
        self,
        asked: Sequence[Message] | str,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: Thinking | None = None,
    ) -> EncodedPrompt:
        """A conversation, or raw text to continue, if it fits the context.

        Raises:
            ValueError: it does not. What that costs is bounded by the context, not by the text.
            UsageError: what `prompt` raises.
        """
        thinking = thinking or self.sampling.thinking
        ids = encode_within(self.tokenizer, asked, self.context - 1, tools, thinking)
        if ids is None:
            raise ValueError(f"the prompt has {self.context} tokens or more, the context {self.context}")
        return EncodedPrompt(ids, tuple(tools), thinking, raw=isinstance(asked, str))

    @property
    def reads_calls(self) -> bool:
        """Whether calls of tools can be told from text in what the template has the model write."""
        return template_facts(self.tokenizer).tools.form is not None

    def for_another_thread(self) -> LocalBackend:
        """The same with a tokenizer of its own: tokenizers are not made for two threads."""
        other = copy.copy(self)
        other.tokenizer = copy.deepcopy(self.tokenizer)
        return other

    def raw_prompt(self, text: str) -> EncodedPrompt:
        """Text that is to be continued as it is."""
        return EncodedPrompt(encode_raw(self.tokenizer, text), raw=True)

    def refusal(self, prompt: EncodedPrompt | Sequence[int]) -> str | None:
        """Why a prompt cannot be answered, or None."""
        if not len(prompt):
            return "empty prompt"
        if len(prompt) >= self.context:
            return f"the prompt has {len(prompt)} tokens, the context {self.context}"
        return None

    def row(
        self, prompt: EncodedPrompt | Sequence[int], sampler: Sampler, number: int, *, index: int = 0
    ) -> Row:
        """A prompt as a row of a batch; its answer is bounded by the settings and the context."""
        limit = min(sampler.settings.max_new_tokens, self.context - len(prompt))
        asked = prompt if isinstance(prompt, EncodedPrompt) else None
        ids = list(asked.ids if asked else prompt)
        return Row(index, ids, limit, sampler, sampler.generator(number), asked=asked)

    def batch(self, rows: Sequence[Row]) -> Batch:
        return Batch(self.model, self.tokenizer, self.stop_ids, rows, cached=self.cached)

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> Iterator[tuple[Row, str | None]]:
        """Yield (row, why it ended or None) for each token of each row."""
        if not rows:
            return
        with attention.own(self.model):
            batches = [self.batch(rows)]
            while batches:
                for batch in list(batches):
                    yield from batch.step()
                    outdated = batch.take_outdated()
                    if outdated:
                        batches.append(self.batch(outdated))
                batches = [batch for batch in batches if batch.rows]


def context_length(model: Any, sampling: SamplingSettings) -> int:
    """Tokens of prompt and answer together that the model was made for, or fewer if asked."""
    own = positions(model) or 1 << 20
    return min(own, sampling.max_context or own)
