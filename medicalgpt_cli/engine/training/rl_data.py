"""The prompts of reinforcement learning: read, split, measured in tokens, kept apart from the reward's."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from medicalgpt_cli.engine.data.answer_targets import tool_notes
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.mixing import Source, check_weights, parse_source, rows_name, shares_of
from medicalgpt_cli.engine.data.packing import Mix, mixed_items
from medicalgpt_cli.engine.data.prompts import Prompt, load_rl_prompts
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.data.report import histogram, percentiles
from medicalgpt_cli.engine.data.splitting import hold_out, without_held_out
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.rewards.sources import check_keys
from medicalgpt_cli.engine.training.ppo.rollout import Asked
from medicalgpt_cli.errors import DataError
from medicalgpt_cli.settings.stages import RlSettings


@dataclass(frozen=True)
class RlData:
    training: list[Asked]
    held_out: list[Asked]
    report: dict[str, Any]
    fingerprints: dict[str, str]
    mix: Mix  # what an epoch takes of each source


def load_rl_data(
    settings: RlSettings,
    tokenizer: PreTrainedTokenizerBase,
    seen_by_reward: Collection[str],
    context: int,
    observer: Observer,
) -> RlData:
    """Prompts to learn on and prompts to measure on. No prompt that the reward model was trained on is measured on.

    Args:
        seen_by_reward: hashes of the prompts in the reward model's training data.
        context: tokens that prompt and answer may have together.

    Raises:
        DataError: nothing is left to learn on. UsageError: a rule of options meets a question without them.
    """
    sources = [parse_source(text) for text in settings.train_data]
    check_weights(sources)
    names = [one.name for one in sources]
    counts = counts_for(settings, [*names, *settings.eval_data])
    held_counts = counts.fresh()
    training = load_rl_prompts(names, counts, observer)
    if settings.eval_data:
        held = load_rl_prompts(settings.eval_data, held_counts, observer)
        training = without_held_out(training, held, counts)
    else:
        training, held = hold_out(training, settings.eval_fraction, settings.seed, counts, observer)
        held_counts.read, held_counts.formats = len(held), counts.formats
        counts.read -= len(held)
    fresh = []
    for prompt in held:
        if prompt.hash in seen_by_reward:
            held_counts.add_skip("the reward model was trained on this prompt", prompt.at)
        else:
            fresh.append(prompt)
    check_keys(settings, [*training, *held])
    training = _first(training, sources, settings.max_samples, counts)
    asked = _encoded(training, tokenizer, settings, context, counts)
    asked_held = _encoded(fresh, tokenizer, settings, context, held_counts)
    if len(asked_held) > settings.eval_prompts:
        held_counts.notices.append(
            f"measured on the first {settings.eval_prompts:,} of {len(asked_held):,} (--eval-prompts)"
        )
        asked_held = asked_held[: settings.eval_prompts]
    if not asked:
        raise DataError("no prompt is left to learn on", "the counts above say why")
    mix = mixed_items(sources, [one.prompt for one in asked], [len(one.ids) for one in asked], "prompts")
    return RlData(
        asked,
        asked_held,
        {
            "training": _describe(asked, counts, settings),
            "held_out": _describe(asked_held, held_counts, settings),
            "sources": mix.told,
        },
        {"training": _fingerprint(asked), "held_out": _fingerprint(asked_held)},
        mix,
    )


def _first(
    prompts: list[Prompt], sources: Sequence[Source], most: int | None, counts: Counts
) -> list[Prompt]:
    """The first prompts of each file, as many as its share of `--max-samples`; the others are counted."""
    sizes = Counter(prompt.source for prompt in prompts)
    shares = shares_of(most, sources, lambda name, _: sizes[rows_name(name)], counts.notices)
    if shares is None:
        return prompts
    kept: list[Prompt] = []
    taken: Counter[str] = Counter()
    for prompt in prompts:
        if taken[prompt.source] < shares.get(prompt.source, 0):
            taken[prompt.source] += 1
            kept.append(prompt)
        else:
            counts.add_skip(f"behind --max-samples {most}", prompt.at)
    return kept


def _encoded(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    settings: RlSettings,
    context: int,
    counts: Counts,
) -> list[Asked]:
    limit = min(settings.max_prompt_length, context - settings.max_new_tokens)
    found = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt.messages, prompt.tools, settings.thinking)
        if len(ids) > settings.max_prompt_length:
            counts.add_skip("longer than --max-prompt-length", prompt.at)
        elif len(ids) > limit:
            counts.add_skip(f"no room for --max-new-tokens in the context of {context:,}", prompt.at)
        else:
            for note in tool_notes(tokenizer, prompt.messages, prompt.tools):
                counts.add_merge(note, prompt.at)
            found.append(Asked(prompt, ids))
    return found


def _describe(asked: list[Asked], counts: Counts, settings: RlSettings) -> dict[str, Any]:
    lengths = sorted(len(one.ids) for one in asked)
    return {
        **counts.as_dict(),
        "prompts": len(asked),
        "tokens": sum(lengths),
        "max_length": settings.max_prompt_length,
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
    }


def _fingerprint(asked: list[Asked]) -> str:
    digest = hashlib.sha256()
    for one in asked:
        digest.update(repr((one.ids, one.prompt.key)).encode())
    return digest.hexdigest()
