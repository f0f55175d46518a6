"""The decoding step that everything shares: a batch of rows, one token further at a time.

Rows are padded on the left with their own positions and masks, each with its own rules for choosing a token, so
that greedy answers do not depend on the company they are in (in fp32; two tokens whose logits differ by less than
1e-4 may change places). A row that has ended leaves the batch and its cache; two batches can be joined.

A model whose steps with a cache differ from those without one is decoded without (`caches_exactly`).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
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
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from medicalgpt_cli.engine.data.messages import Message, ToolCall
from medicalgpt_cli.engine.generation.answer_reader import AnswerReader, EncodedPrompt, is_in_template
from medicalgpt_cli.engine.model.longrope import switches
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.groups import SamplingSettings

_SPARE_COLUMNS = 32  # padding in front of all rows is cut away once there is this much of it
_CACHES = ("past_key_values", "cache_params")  # under which of these names a model takes its cache
_PROBE_PROMPTS, _PROBE_STEPS = (9, 4), 3
# How far scores with a cache may lie from those without, as shares of their size. A state that was lost makes more
# than 1; half precision, in which an expert of a router may change, makes a few hundredths.
_ROUNDING = {torch.float32: 1e-3}
_HALF_PRECISION_ROUNDING = 0.3


@dataclass(frozen=True)
class Answer:
    """What was answered. `text` is the answer itself; what was thought in front of it and the calls stand apart."""

    text: str
    token_ids: list[int]  # without the token that ended it
    finish_reason: Literal["stop", "length", "error"]
    prompt_tokens: int
    completion_tokens: int
    error: str | None = None
    end: int | None = None  # the token that ended it; None where a limit or a stop text did
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: bool = False  # something in the text looks like a call of a tool and is none

    @property
    def message(self) -> Message:
        """The assistant's turn."""
        found: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            found["reasoning"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = list(self.tool_calls)
        return found


class Sampler:
    """How tokens are chosen and when an answer ends, by the settings of one request."""

    def __init__(self, sampling: SamplingSettings):
        self.settings = sampling
        self.processors = _processors(sampling)
        self.stop = sampling.stop

    def generator(self, number: int) -> torch.Generator | None:
        """Each row draws from its own stream, so its answer does not depend on its batch."""
        if self.settings.temperature == 0:
            return None
        return torch.Generator().manual_seed((self.settings.seed * 1_000_003 + number) % 2**63)


@dataclass(eq=False)
class Row:
    """One prompt and what was said to it so far."""

    index: int
    prompt: list[int]
    limit: int  # new tokens at most
    sampler: Sampler
    generator: torch.Generator | None
    streams: bool = False  # whether somebody reads the text of each token
    said: list[int] = field(default_factory=list)
    end: int | None = None
    asked: EncodedPrompt | None = (
        None  # None: token ids came alone, and are read as the template's own prompt
    )
    _reader: AnswerReader | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt + self.said

    def reader(self, tokenizer: PreTrainedTokenizerBase) -> AnswerReader:
        """Of what was said."""
        if self._reader is None:
            asked = self.asked or EncodedPrompt(self.prompt, raw=not is_in_template(tokenizer, self.prompt))
            self._reader = AnswerReader(tokenizer, asked, self.sampler.stop)
        return self._reader


class Batch:
    """Rows that are decoded together.

    Between steps `mask` is (rows, cached tokens + those in `fed`), `fed` and `positions` are what the model gets
    next: the prompts at first, then one token a row.

    Args:
        cached: whether what was read is kept in a cache; else each step reads each row anew, by itself.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        rows: Sequence[Row],
        *,
        cached: bool = True,
    ):
        self.model, self.tokenizer, self.stop_ids, self.rows = model, tokenizer, stop_ids, list(rows)
        self.device = model.get_input_embeddings().weight.device
        texts = [row.tokens for row in rows]
        longest = max(map(len, texts))
        pad = tokenizer.pad_token_id
        padded = [(longest - len(text), text) for text in texts]
        self.fed = torch.tensor([[pad] * spare + text for spare, text in padded], device=self.device)
        self.mask = torch.tensor(
            [[0] * spare + [1] * len(text) for spare, text in padded], device=self.device
        )
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache: Any = DynamicCache(config=model.config) if cached else None
        self.takes = _arguments(model)
        self.switches = switches(model)

    @property
    def width(self) -> int:
        """Columns of the cache and of what is fed next."""
        return self.mask.shape[1]

    @property
    def plain(self) -> bool:
        """Whether the cache holds keys and values alone, which can be joined, trimmed and filled in pieces.

        Layers with a recurrent state cannot.
        """
        return (
            self.cache is not None
            and bool(self.cache.layers)
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers)
        )

    def feed(self, most: int) -> int:
        """Read up to `most` tokens of a long prompt ahead of the step that ends it; gives how many were read."""
        left = self.fed.shape[1]
        if left <= most or not self.plain:
            return 0
        seen = self.width - left + most
        self._forward(self.fed[:, :most], self.mask[:, :seen], self.positions[:, :most])
        self.fed, self.positions = self.fed[:, most:], self.positions[:, most:]
        return most

    def step(self) -> list[tuple[Row, str | None]]:
        """One token further: (row, why it ended or None) of each row. Rows that ended leave.

        Text is read, by the row's reader, only where somebody needs it.
        """
        return self.take(self.scores())

    def scores(self) -> torch.Tensor:
        """Scores of each row's next token, (rows, vocabulary), in fp32."""
        if self.cache is None:
            return torch.cat([uncached_scores(self.model, row.tokens) for row in self.rows])
        return self._forward(self.fed, self.mask, self.positions)

    def take(self, logits: torch.Tensor) -> list[tuple[Row, str | None]]:
        """Choose the next tokens by their scores; what `step` gives."""
        found, kept = [], []
        for place, (row, token) in enumerate(zip(self.rows, _choose(self.rows, logits), strict=True)):
            reason = self._add(row, token)
            if row.sampler.stop or row.streams:
                reader = row.reader(self.tokenizer)
                reader.read(row.said)
                reason = "stop" if reader.stopped else reason
            found.append((row, reason))
            if reason is None:
                kept.append(place)
        self.fed, self.positions = self.fed[:, -1:], self.positions[:, -1:] + 1
        self._keep(kept)
        if self.rows:
            self.fed = torch.tensor([[row.said[-1]] for row in self.rows], device=self.device)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=-1)
        return found

    def take_outdated(self) -> list[Row]:
        """Rows that leave because the cache has become wrong for them: they have to be read anew, in another batch.

        Their next token makes them longer than the context of a model that has other positions for longer texts.
        """
        if self.cache is None:
            return []
        outdated = [row for row in self.rows if row.said and len(row.tokens) - 1 in self.switches]
        self.drop(outdated)
        return outdated

    def drop(self, gone: Collection[Row]) -> None:
        """Take rows out between two steps."""
        self._keep([place for place, row in enumerate(self.rows) if row not in gone])

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch; both have to be `plain` and past their prompts."""
        width = max(self.width, other.width)
        self.mask = torch.cat([_padded(one.mask, width, 1) for one in (self, other)])
        self.fed = torch.cat([self.fed, other.fed])
        self.positions = torch.cat([self.positions, other.positions])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if mine.is_initialized:
                _join_layers(mine, theirs)
        self.rows += other.rows

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, (rows, vocabulary), in fp32."""
        given: dict[str, Any] = {"input_ids": ids, "use_cache": True}
        if "past_key_values" in self.takes:
            given |= {"past_key_values": self.cache, "attention_mask": mask, "position_ids": positions}
        else:
            # A state knows no positions, and wants to be told of padding where that is read, not behind it.
            given |= {"cache_params": self.cache, "attention_mask": mask if ids.shape == mask.shape else None}
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        if self.switches:  # a piece of a long prompt does not show how long it is
            given["text_lengths"] = torch.tensor([[len(row.tokens)] for row in self.rows], device=self.device)
        return self.model(**given).logits[:, -1].float()

    def _add(self, row: Row, token: int) -> str | None:
        """Take a token into the answer; why the answer ends with it, or None."""
        if token in self.stop_ids:
            row.end = token
            return "stop"
        row.said.append(token)
        return "length" if len(row.said) >= row.limit else None

    def _keep(self, places: list[int]) -> None:
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if not places:
            return
        select = torch.tensor(places, device=self.device)
        if self.cache is not None:
            self.cache.reorder_cache(select)  # every kind of layer has this one, also on several devices
        self.mask, self.fed = self.mask[select], self.fed[select]
        self.positions = self.positions[select]
        spare = int(self.mask.argmax(-1).min())
        if spare >= _SPARE_COLUMNS and self.plain and self.fed.shape[1] == 1:
            self.mask = self.mask[:, spare:]
            for layer in self.cache.layers:
                if layer.is_initialized:
                    _trim_layer(layer, spare)


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _arguments(model: Any) -> Collection[str]:
    """The names that the model's forward declares; many swallow others without a word."""
    return inspect.signature(_inner(model).forward).parameters


def uncached_scores(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Scores of the token behind `tokens`, read by themselves: (1, vocabulary), in fp32."""
    ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
    kept = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}
    return model(input_ids=ids, use_cache=False, **kept).logits[:, -1].float()


def caches_exactly(model: Any, tokenizer: PreTrainedTokenizerBase, observer: Observer | None = None) -> bool:
    """Whether decoding with a cache, beside a longer row, gives the scores that reading everything anew gives.

    Asked of the model itself, once: what it takes as a cache, and what padding does to a state that runs along the
    row, no list of architectures says completely.

    Args:
        observer: told where it does not.
    """
    inner = _inner(model)
    if not hasattr(inner, "_medgpt_caches_exactly"):
        inner._medgpt_caches_exactly = _probe_cache(model, tokenizer)
        if observer and not inner._medgpt_caches_exactly:
            observer.on_notice(
                "no cache while answering: with one, this model does not compute what it computes without; "
                "each token is computed from the whole text, one answer at a time, which is slow"
            )
    return inner._medgpt_caches_exactly


@torch.no_grad()
def _probe_cache(model: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    if not set(_CACHES) & set(_arguments(model)):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _PROBE_PROMPTS
    ]
    greedy = Sampler(SamplingSettings())
    rows = [Row(index, prompt, _PROBE_STEPS + 2, greedy, None) for index, prompt in enumerate(prompts)]
    training = model.training
    model.eval()
    try:
        batch = Batch(model, tokenizer, (), rows)
        for _ in range(_PROBE_STEPS):
            batch.step()
        scores = batch.scores()
        if not _as_read_anew(batch, scores):
            return False
        batch.take(scores)
        batch.drop(rows[:1])
        return _as_read_anew(batch, batch.scores())
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)


def _as_read_anew(batch: Batch, scores: torch.Tensor) -> bool:
    """Whether `scores` are those of reading each row anew. Row by row: one must not hide another."""
    anew = torch.cat([uncached_scores(batch.model, row.tokens) for row in batch.rows])
    slack = _ROUNDING.get(next(batch.model.parameters()).dtype, _HALF_PRECISION_ROUNDING)
    return bool(((scores - anew).norm(dim=-1) <= slack * anew.norm(dim=-1)).all())


def _padded(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Zeros in front along `dim`, up to `length`."""
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _join_layers(mine: Any, theirs: Any) -> None:
    """Rows of one layer's cache, (rows, heads, tokens, size), under those of another, aligned at the end."""
    length = max(mine.keys.shape[-2], theirs.keys.shape[-2])
    mine.keys = torch.cat([_padded(one.keys, length, 2) for one in (mine, theirs)])
    mine.values = torch.cat([_padded(one.values, length, 2) for one in (mine, theirs)])
    if mine.is_sliding:
        mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)


def _trim_layer(layer: Any, spare: int) -> None:
    """Forget `spare` tokens at the front. A sliding layer may have forgotten them already."""
    if layer.is_sliding:
        layer.cumulative_length -= spare
        spare = max(layer.keys.shape[-2] - layer.cumulative_length, 0)
    layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]


def _choose(rows: Sequence[Row], scores: torch.Tensor) -> list[int]:
    """The next token of each row. `scores`: (rows, vocabulary) logits."""
    likeliest = scores.argmax(-1).tolist()
    return [
        _choose_one(row, scores[place][None]) if row.sampler.processors else token
        for place, (row, token) in enumerate(zip(rows, likeliest, strict=True))
    ]


def _choose_one(row: Row, scores: torch.Tensor) -> int:
    """A token of one row, whose length is its own. `scores`: (1, vocabulary)."""
    seen = torch.tensor([row.prompt + row.said], device=scores.device)
    scores = row.sampler.processors(seen, scores)
    if row.generator is None:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1)[0].cpu(), 1, generator=row.generator))


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


def answer_of(tokenizer: PreTrainedTokenizerBase, row: Row, reason: str) -> Answer:
    reader = row.reader(tokenizer)
    reader.read(row.said, complete=True)
    return Answer(
        reader.content,
        list(row.said),
        "stop" if reader.stopped else reason,
        len(row.prompt),
        len(row.said),
        end=row.end,
        reasoning=reader.reasoning or None,
        tool_calls=tuple(reader.tool_calls),
        malformed=reader.malformed,
    )
