"""Answers from a model in this process: in batches for files, token by token for a conversation.

One loop serves both. Rows of a batch are padded on the left with their own positions and masks, and a row that
has ended leaves the batch and its cache, so that greedy answers do not depend on the company they are in
(in fp32; two tokens whose logits differ by less than 1e-4 may change places).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from medicalgpt_cli.engine.data.rendering import stop_token_ids
from medicalgpt_cli.settings.groups import SamplingSettings


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]  # without the token that ended it
    finish_reason: Literal["stop", "length", "error"]
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None
    end: int | None = None  # the token that ended it; None where a limit or a stop text did


@dataclass
class _Row:
    """One prompt and what was said to it so far."""

    index: int
    prompt: list[int]
    limit: int  # new tokens at most
    generator: torch.Generator | None
    said: list[int]
    end: int | None = None


class LocalBackend:
    """Answers prompts with a loaded model."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.stop_ids = frozenset(stop_token_ids(tokenizer, model.generation_config))
        self.context = context_length(model, sampling)
        self.processors = _processors(sampling)
        self.last: Answer | None = None

    def answer_batch(
        self,
        prompts: Sequence[Sequence[int]],
        on_done: Callable[[int, Answer], None],
        *,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Answer prompts together; `on_done(index, answer)` is called as each ends, in any order.

        Args:
            prompts: token ids of each prompt.
            numbers: what makes each row's draw its own beside the seed; its index where not given.
        """
        rows = []
        for index, prompt in enumerate(prompts):
            room = self.context - len(prompt)
            if room < 1 or not prompt:
                message = (
                    f"the prompt has {len(prompt)} tokens, the context {self.context}"
                    if prompt
                    else "empty prompt"
                )
                on_done(index, Answer("", [], "error", len(prompt), 0, message))
                continue
            limit = min(self.sampling.max_new_tokens, room)
            number = index if numbers is None else numbers[index]
            rows.append(_Row(index, list(prompt), limit, self._generator(number), []))
        for row, _, reason in self._run(rows):
            if reason:
                on_done(row.index, self._answer(row, reason))

    def stream(self, prompt: Sequence[int], *, number: int = 0) -> Iterator[str]:
        """Answer one prompt piece by piece; the whole is in `last` afterwards. Close it to stop early.

        There is a piece for each token, empty where the token completes no character, so that whoever listens
        can stop at any token.

        Args:
            number: what makes the draw its own beside the seed.

        Raises:
            ValueError: the prompt fills the context.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the context {self.context}")
        row = _Row(0, list(prompt), min(self.sampling.max_new_tokens, room), self._generator(number), [])
        shown = 0
        self.last = None
        try:
            for _, text, reason in self._run([row]):
                if reason:
                    self.last = self._answer(row, reason)
                safe = self.last.text if self.last else _certain(text, self.sampling.stop)
                piece = safe[shown:]
                shown += len(piece)
                yield piece
        finally:
            self.last = self.last or self._answer(row, "stop")  # whoever listened has stopped it

    # -- the loop ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, rows: list[_Row]) -> Iterator[tuple[_Row, str, str | None]]:
        """Yield (row, text so far, why it ended or None) for each token of each row.

        The text is decoded only where somebody needs it: for stop texts and for streaming single rows.
        """
        if not rows:
            return
        device = self.model.get_input_embeddings().weight.device
        longest = max(len(row.prompt) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row.prompt)) + row.prompt for row in rows], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in rows], device=device
        )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        fed = ids
        needs_text = bool(self.sampling.stop) or len(rows) == 1
        while rows:
            logits = self.model(
                input_ids=fed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = self._choose(rows, logits.float())
            kept, left = [], []
            for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                reason = self._add(row, token)
                text = self._text(row) if needs_text else ""
                if any(stop in text for stop in self.sampling.stop):
                    reason = "stop"
                yield row, _cut_at(text, self.sampling.stop), reason
                if reason is None:
                    kept.append(place)
                    left.append(row)
            if len(kept) < len(rows) and kept:
                select = torch.tensor(kept, device=device)
                cache.reorder_cache(select)  # every kind of layer has this one, also on several devices
                mask = mask[select]
                positions = positions[select]
            rows = left
            if rows:
                fed = torch.tensor([[row.said[-1]] for row in rows], device=device)
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
                positions = positions[:, -1:] + 1

    def _add(self, row: _Row, token: int) -> str | None:
        """Take a token into the answer; why the answer ends with it, or None."""
        if token in self.stop_ids:
            row.end = token
            return "stop"
        row.said.append(token)
        return "length" if len(row.said) >= row.limit else None

    def _choose(self, rows: Sequence[_Row], scores: torch.Tensor) -> list[int]:
        """The next token of each row. `scores`: (rows, vocabulary) logits."""
        if not self.processors:
            return scores.argmax(-1).tolist()
        return [self._choose_one(row, one[None]) for row, one in zip(rows, scores, strict=True)]

    def _choose_one(self, row: _Row, scores: torch.Tensor) -> int:
        """A token of one row, whose length is its own. `scores`: (1, vocabulary)."""
        seen = torch.tensor([row.prompt + row.said], device=scores.device)
        scores = self.processors(seen, scores)
        if row.generator is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0].cpu(), 1, generator=row.generator))

    def _generator(self, number: int) -> torch.Generator | None:
        """Each row draws from its own stream, so its answer does not depend on its batch."""
        if self.sampling.temperature == 0:
            return None
        return torch.Generator().manual_seed((self.sampling.seed * 1_000_003 + number) % 2**63)

    def _text(self, row: _Row) -> str:
        return self.tokenizer.decode(row.said, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _answer(self, row: _Row, reason: str) -> Answer:
        text = _cut_at(self._text(row), self.sampling.stop).rstrip("\ufffd")  # a character cut in half
        return Answer(text, list(row.said), reason, len(row.prompt), len(row.said), end=row.end)


def context_length(model: Any, sampling: SamplingSettings) -> int:
    """Tokens of prompt and answer together that the model was made for, or fewer if asked."""
    config = model.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or 1 << 20
    return min(own, sampling.max_context or own)


def _processors(sampling: SamplingSettings) -> LogitsProcessorList:
    """What changes the scores before a token is chosen, in the order of transformers' `generate`."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram:
        chain.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram))
    if sampling.temperature > 0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return chain


def _cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def _certain(text: str, stops: Sequence[str]) -> str:
    """What of an unfinished text is certain: no half character, and no beginning of a stop text at its end."""
    text = text.rstrip("\ufffd")
    beginnings = (stop[:length] for stop in stops for length in range(1, len(stop)))
    uncertain = max((len(one) for one in beginnings if text.endswith(one)), default=0)
    return text[: len(text) - uncertain].rstrip("\ufffd")
