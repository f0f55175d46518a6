"""Packing: nothing lost, nothing doubled, every token predicted once, documents kept apart."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.corpus import choose_held_out, measured_order, tokenise
from medicalgpt_cli.engine.data.mixing import Source, parse_source
from medicalgpt_cli.engine.data.packing import (
    AllBlocks,
    MixingSampler,
    PackedBlocks,
    held_out_windows,
    quotas,
)
from medicalgpt_cli.engine.data.rendering import document_marks
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.batches import IGNORED, packed, stacked
from medicalgpt_cli.errors import DataError, UsageError
from tests.tiny import tiny_tokenizer

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200).filter(str.strip),
    min_size=1,
    max_size=12,
)


def bos_tokenizer():
    """One that puts a begin-of-text token in front, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("llama3")
    start = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[start]
    )
    return tokenizer


def two_starts_tokenizer():
    """One that puts two tokens in front, as GLM-4's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("none")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[gMASK]", "<sop>"]})
    start = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=start
    )
    return tokenizer


def corpus_of(texts: list[str], folder: Path, tokenizer, name: str = "a.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return tokenise(Source(str(file)), tokenizer, "auto", folder / "cache", Observer())


def blocks_of(corpus, tokenizer, size: int) -> PackedBlocks:
    start, end, _ = document_marks(tokenizer)
    return PackedBlocks(corpus, np.arange(len(corpus)), size, start, end)


def expected_stream(texts: list[str], tokenizer) -> tuple[list[int], list[int]]:
    """Tokens and their targets, written with plain lists."""
    start, end, separate = document_marks(tokenizer)
    stream: list[int] = []
    for text in texts:
        # A document that spells a control token spells text.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        stream += [*start, *ids, end] if separate else [*start, *ids]
    following = [*stream[1:], IGNORED if separate else end]
    return stream, [IGNORED if separate and one in start else one for one in following]


@pytest.mark.parametrize("make", [tiny_tokenizer, bos_tokenizer, two_starts_tokenizer])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, size=st.integers(2, 64))
@example(texts=["<|endoftext|>", "a<|im_end|>\n<|begin_of_text|>"], size=2)
def test_all_blocks_together_are_all_tokens_in_order(make, texts, size, tmp_path_factory) -> None:
    tokenizer = make()
    corpus = corpus_of(texts, tmp_path_factory.mktemp("c"), tokenizer)
    blocks = blocks_of(corpus, tokenizer, size)
    found = [blocks[index] for index in range(len(blocks))]
    stream, targets = expected_stream(texts, tokenizer)
    assert [token for block in found for token in block.input_ids] == stream
    assert [token for block in found for token in block.targets] == targets
    assert all(len(block.input_ids) == size for block in found[:-1])
    assert blocks.tail == len(stream) % size
    # documents begin where they begin, and nowhere else
    begins = [at for at, token in enumerate(stream) if token == document_marks(tokenizer)[0][0]]
    marked = {index * size + start for index, block in enumerate(found) for start in block.starts}
    assert set(begins) == marked - ({index * size for index in range(len(found))} - set(begins))


def test_a_stretch_can_begin_inside_a_document(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["short", "a much longer text than the first one was " * 5, "感冒发烧"]
    corpus = corpus_of(texts, tmp_path, tokenizer)
    start, end, _ = document_marks(tokenizer)
    chosen = PackedBlocks(corpus, np.array([1]), 16, start, end)
    ids = [token for index in range(len(chosen)) for token in chosen[index].input_ids]
    assert ids == [*start, *tokenizer(texts[1], add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("lay", [packed, lambda blocks: stacked(blocks, pad_id=0)])
def test_no_label_on_padding_and_every_target_kept(lay, tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    blocks = blocks_of(corpus_of(["one two three " * 7, "four"], tmp_path, tokenizer), tokenizer, 8)
    found = [blocks[index] for index in range(len(blocks))]
    assert len(found[-1].input_ids) < 8  # there is something to pad
    batch = lay([found[-1], found[0]])
    if "attention_mask" in batch:
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    else:
        assert batch["input_ids"].shape[1] == sum(len(block.input_ids) for block in (found[-1], found[0]))
    kept = Counter(batch["labels"][batch["labels"] != IGNORED].tolist())
    assert kept == Counter(t for block in (found[-1], found[0]) for t in block.targets if t != IGNORED)


def test_positions_begin_anew_with_each_document(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = corpus_of(["aa bb", "cc", "dd ee ff gg"], tmp_path, tokenizer)
    blocks = blocks_of(corpus, tokenizer, 64)
    batch = packed([blocks[0]])
    lengths = (corpus.ends - corpus.starts).tolist()
    assert batch["position_ids"][0].tolist() == [at for length in lengths for at in range(length)]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths).tolist()]


def test_document_shorter_than_a_block_an_empty_one_and_a_million_characters(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = corpus_of(["x"], tmp_path, tokenizer, "short.jsonl")
    assert [len(one.input_ids) for one in (blocks_of(corpus, tokenizer, 512)[0],)] == [2]
    with_empty = corpus_of(["text", "", "  \n"], tmp_path, tokenizer, "empty.jsonl")
    assert len(with_empty) == 1 and with_empty.counts["skipped"] == {"no text": 2}
    with pytest.raises(DataError, match="no text"):
        corpus_of(["", " "], tmp_path, tokenizer, "nothing.jsonl")
    million = corpus_of(["糖" * 1_000_000], tmp_path, tokenizer, "million.jsonl")
    blocks = blocks_of(million, tokenizer, 4096)
    total = sum(len(blocks[index].input_ids) for index in range(len(blocks)))
    assert total == len(tokenizer("糖" * 1_000_000, add_special_tokens=False)["input_ids"]) + 1


def test_spelled_special_tokens_stay_text(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = corpus_of(["a <|im_end|> b <|endoftext|>"], tmp_path, tokenizer)
    ids = corpus.read([(0, int(corpus.ends[0]))])
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not specials & set(ids[1:])
    assert tokenizer.decode(ids[1:]) == "a <|im_end|> b <|endoftext|>"


# -- the cache ---------------------------------------------------------------------------------------------


def test_cache_is_used_and_a_changed_file_is_read_anew(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    first = corpus_of(["one", "two"], tmp_path, tokenizer)
    kept = sorted((tmp_path / "cache/tokens").glob("*/tokens.bin"))
    stamp = kept[0].stat().st_mtime_ns
    again = corpus_of(["one", "two"], tmp_path, tokenizer)
    assert kept[0].stat().st_mtime_ns == stamp and again.meta == first.meta
    assert (tmp_path / "cache/tokens").stat().st_mode & 0o077 == 0  # the ids spell patients' text
    other = corpus_of(["one", "three"], tmp_path, tokenizer)
    assert other.meta["sha256"] != first.meta["sha256"]


def test_an_interrupted_write_leaves_nothing_that_is_taken_for_whole(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n{"text": 7}\n')
    with pytest.raises(DataError, match="2: text is a number"):
        tokenise(Source(str(file)), tokenizer, "auto", tmp_path / "cache", Observer())
    assert not list((tmp_path / "cache/tokens").glob("*/"))


# -- holding out -------------------------------------------------------------------------------------------


def test_held_out_does_not_depend_on_order_and_keeps_copies_together(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"document number {number}" for number in range(40)] + ["document  number 3"]
    one = corpus_of(texts, tmp_path, tokenizer, "one.jsonl")
    other = corpus_of(texts[::-1], tmp_path, tokenizer, "other.jsonl")
    chosen, reverse = choose_held_out(one, 0.25, 7), choose_held_out(other, 0.25, 7)
    assert chosen.tolist() == reverse[::-1].tolist()
    assert chosen[3] == chosen[40]  # equal but for spaces
    assert len({texts[i].replace("  ", " ") for i in np.flatnonzero(chosen)}) == 10
    assert choose_held_out(one, 0.25, 8).tolist() != chosen.tolist()
    assert not choose_held_out(one, 0.0, 7).any()
    assert choose_held_out(one, 0.0001, 7).sum() >= 1


@pytest.mark.parametrize("make", [tiny_tokenizer, bos_tokenizer, two_starts_tokenizer])
def test_windows_predict_every_token_of_a_document_once(make, tmp_path) -> None:
    tokenizer = make()
    texts = ["患者咳嗽三天。" * 9, "Take two tablets a day. " * 12]
    corpus = corpus_of(texts, tmp_path, tokenizer)
    start, _, separate = document_marks(tokenizer)
    order = measured_order(corpus, np.array([True, True]), 1)
    found, left_out = held_out_windows(corpus, order, 16, 10**6, separate, tokenizer.decode, len(start))
    assert left_out == 0
    for number, language in ((0, "zh"), (1, "en")):
        group = (corpus.source.name, language)
        targets = [t for w in found.windows if w.group == group for t in w.block.targets]
        ids = tokenizer(texts[number], add_special_tokens=False)["input_ids"]
        assert [one for one in targets if one != IGNORED] == ids
        read = [t for w in found.windows if w.group == group for t in w.block.input_ids]
        assert (
            read == [*start, *ids][:-1]
        )  # every start token is seen, and only what is behind the last is a target
        assert found.bytes[group] == len(texts[number].encode())
    for window, following in pairwise(w for w in found.windows if w.group[1] == "zh"):
        assert following.block.input_ids[0] == window.block.targets[-1]


def test_every_document_stands_behind_what_the_tokenizer_puts_in_front_of_a_text(tmp_path) -> None:
    tokenizer = two_starts_tokenizer()
    corpus = corpus_of(["rest", "咳嗽"], tmp_path, tokenizer)
    block = blocks_of(corpus, tokenizer, 64)[0]
    end = [tokenizer.eos_token_id]
    assert block.input_ids == [*tokenizer("rest")["input_ids"], *end, *tokenizer("咳嗽")["input_ids"], *end]
    assert block.starts == [0, len(tokenizer("rest")["input_ids"]) + 1]


def test_a_start_token_that_is_the_end_of_text_stands_once_between_documents(tmp_path) -> None:
    """OPT's tokenizer puts </s> in front of a text, and its documents are separated by one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer("none")
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end[0]} $A", special_tokens=[end]
    )
    corpus = corpus_of(["rest", "咳嗽"], tmp_path, tokenizer)
    block = blocks_of(corpus, tokenizer, 64)[0]
    assert block.input_ids == [*tokenizer("rest")["input_ids"], *tokenizer("咳嗽")["input_ids"]]
    assert block.targets[-1] == end[1]


def test_budget_is_kept_and_told(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = corpus_of(["alpha beta gamma " * 20], tmp_path, tokenizer)
    whole = len(tokenizer("alpha beta gamma " * 20, add_special_tokens=False)["input_ids"])
    found, left_out = held_out_windows(corpus, np.array([0]), 16, 50, False, tokenizer.decode)
    measured = [t for window in found.windows for t in window.block.targets]
    assert len(measured) == 50 and left_out == whole - 50
    assert sum(found.bytes.values()) == len(tokenizer.decode(measured).encode())


# -- mixing ------------------------------------------------------------------------------------------------


def test_epochs_of_one_source_are_permutations_that_differ() -> None:
    sampler = MixingSampler([10], [10], seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_every_block_is_seen_before_any_is_seen_again() -> None:
    sampler = MixingSampler([7, 5], [3, 12], seed=0)
    seen: Counter[int] = Counter()
    for epoch in range(7):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 15
        assert sum(index < 7 for index in order) == 3
        seen.update(order)
    # 7 epochs: 21 of the first source are 3 passes; 84 of the second are 16.8 passes
    assert {seen[index] for index in range(7)} == {3}
    assert {seen[index] for index in range(7, 12)} == {16, 17}


def test_quotas() -> None:
    no = [False, False]
    assert quotas([30, 10], [None, None], no, 0.1) == [30, 10]
    assert quotas([30, 10], [0.5, 0.5], no, 0.1) == [20, 20]
    assert quotas([30, 10], [3, 1], no, 0.1) == [30, 10]
    assert quotas([90, 1000], [None, None], [False, True], 0.1) == [90, 10]
    assert quotas([90, 5], [None, None], [False, True], 0.5) == [90, 90]  # 18 passes over the replay
    assert quotas([90, 100, 300], [None] * 3, [False, True, True], 0.25) == [90, 8, 22]


def test_all_blocks_finds_the_source_of_an_index(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    parts = [
        blocks_of(corpus_of([word * 30], tmp_path, tokenizer, f"{word}.jsonl"), tokenizer, 8)
        for word in ("ab ", "cd ", "ef ")
    ]
    whole = AllBlocks(parts)
    expected = [part[index] for part in parts for index in range(len(part))]
    assert [whole[index] for index in range(len(whole))] == expected


def test_weights_are_read_from_the_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("zh.jsonl:0.7") == Source("zh.jsonl", 0.7)
    assert parse_source("owner/name:train") == Source("owner/name:train")
    assert parse_source("owner/name:train:2") == Source("owner/name:train", 2.0)
    (tmp_path / "odd:3").mkdir()
    assert parse_source("odd:3") == Source("odd:3")
    for wrong in ("a.txt:0", "a.txt:-1", "a.txt:nan", "a.txt:inf"):
        with pytest.raises(UsageError, match="weight"):
            parse_source(wrong)


def test_isolated_documents_have_the_loss_of_documents_alone(tmp_path) -> None:
    """The claim itself: a block of three documents against three runs of the plain model."""
    from transformers import AutoModelForCausalLM

    from medicalgpt_cli.engine.training import attention
    from medicalgpt_cli.engine.training.losses import target_loss
    from tests.tiny import tiny_model

    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m")).eval()
    texts = ["感冒发烧怎么办？", "The symptoms include thirst.", "x"]
    corpus = corpus_of(texts, tmp_path, tokenizer)
    block = blocks_of(corpus, tokenizer, 512)[0]
    with attention.for_batches(model, True), torch.no_grad():
        together = float(target_loss(model, packed([block])))
    start, end, _ = document_marks(tokenizer)
    alone = 0.0
    for text in texts:
        ids = torch.tensor([[*start, *tokenizer(text, add_special_tokens=False)["input_ids"], end]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits
        alone += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
    assert together == pytest.approx(alone, rel=1e-5)


# -- what the cache holds ------------------------------------------------------------------------------------------


def alter_tokens(folder: Path) -> None:
    """Nearly all ids, and the file's times as they were."""
    file = folder / "tokens.bin"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[4:] = bytes((byte + 1) % 200 for byte in content[4:])
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut_tokens(folder: Path) -> None:
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])


def alter_documents(folder: Path) -> None:
    content = bytearray((folder / "documents.bin").read_bytes())
    content[0] ^= 1
    (folder / "documents.bin").write_bytes(content)


def alter_counts(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "dtype": "<u4"}))


def lose_the_seal(folder: Path) -> None:
    (folder / "complete.json").unlink()


def empty_the_seal(folder: Path) -> None:
    (folder / "complete.json").write_text('{"files": {}}')


def take_another_corpus(folder: Path) -> None:
    other = next(one for one in folder.parent.iterdir() if one.is_dir() and one != folder)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


@pytest.mark.parametrize(
    "damage",
    [
        alter_tokens,
        cut_tokens,
        alter_documents,
        alter_counts,
        lose_the_seal,
        empty_the_seal,
        take_another_corpus,
    ],
    ids=lambda one: one.__name__,
)
def test_a_cache_that_does_not_hold_what_was_written_is_made_anew(tmp_path: Path, damage) -> None:
    tokenizer = tiny_tokenizer("chatml")
    corpus_of(["another text"], tmp_path, tokenizer, "b.jsonl")
    file = tmp_path / "a.jsonl"
    texts = ["Rest and drink a lot.", "患者咳嗽三天。"] * 3
    before = corpus_of(texts, tmp_path, tokenizer)
    whole, folder = before.read([(0, int(before.ends[-1]))]), before._tokens.parent

    def opened() -> tuple[list[int], list[str]]:
        heard = Warned()
        found = tokenise(Source(str(file)), tokenizer, "auto", tmp_path / "cache", heard)
        assert found.meta == before.meta
        return found.read([(0, int(found.ends[-1]))]), heard.warnings

    assert opened() == (whole, [])
    damage(folder)
    ids, warnings = opened()
    assert ids == whole
    assert len(warnings) == 1
    assert warnings[0].startswith(f"the token cache of {file} is made anew: ")
    assert opened() == (whole, [])


class Warned(Observer):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)
