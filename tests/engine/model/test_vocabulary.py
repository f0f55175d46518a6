"""vocabulary: new tokens where they help, the same tokens everywhere else, and no text lost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medicalgpt_cli.engine.data.messages import Document
from medicalgpt_cli.engine.model import vocabulary_pieces
from medicalgpt_cli.engine.model.vocabulary import extend, new_token_ids
from medicalgpt_cli.engine.model.vocabulary_check import compare, read_terms
from medicalgpt_cli.engine.model.vocabulary_merge import Merges, Piece, best_score, extend_tokenizer
from medicalgpt_cli.engine.model.vocabulary_pieces import measure
from medicalgpt_cli.engine.model.vocabulary_rows import widen
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import DataError, MedgptError, UsageError
from medicalgpt_cli.settings.stages import VocabularySettings
from tests.cli import ROOT
from tests.engine.model.test_loading import adapter_over
from tests.engine.model.tiny_gguf import tiny_gguf
from tests.engine.model.tiny_tokenizers import KINDS, corpus, sentencepiece, tokenizer_of
from tests.tiny import tiny_model, tiny_tokenizer, write_jsonl

CORPUS = corpus()
OTHER = [
    "Drink water and rest.",
    "Ça va? Ünïcödé, naïve.",
    "print('x')\n\tif a<b:",
    "感",
    "",
    "a  b   c",
    "<|im_end|> </s> <think>",
]


class Recorder(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_notice(self, text: str) -> None:
        self.said.append(text)

    def on_warning(self, text: str) -> None:
        self.said.append(f"warning: {text}")


def model_for(tokenizer, folder: Path, *, rows: int = 0, tied: bool = True, dtype=torch.float32) -> Path:
    """A tiny Llama with `rows` rows for a tokenizer, written beside the tokenizer's files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(rows, max(tokenizer.get_vocab().values()) + 1),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def widened(base: Path, output: Path, observer: Observer | None = None, **options) -> dict:
    """Run the stage on the small corpus, which is written beside the output."""
    data = write_jsonl(output.parent / "corpus.jsonl", [{"text": text} for text in CORPUS])
    options = {
        "base_model": str(base),
        "output_dir": output,
        "train_data": (str(data),),
        **({} if "sentencepiece_model" in options else {"size": 180}),
        "min_count": 3,
        "use_cpu": True,
        **options,
    }
    return extend(VocabularySettings(**options), observer or Observer())


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory):
    """kind: (folder of the base, folder of the widened model, report), each made once."""
    made: dict[str, tuple[Path, Path, dict]] = {}

    def make(kind: str) -> tuple[Path, Path, dict]:
        if kind not in made:
            place = tmp_path_factory.mktemp("kind")
            model_for(tokenizer_of(kind, place / "base"), place / "base")
            report = widened(place / "base", place / "wider")
            made[kind] = (place / "base", place / "wider", report)
        return made[kind]

    return make


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))


# -- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_ones_follow(wider, kind: str) -> None:
    base, folder, report = wider(kind)
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    before, after = old.get_vocab(), new.get_vocab()
    added = new_token_ids(folder)
    assert len(added) == report["vocabulary"]["new"] + report["vocabulary"]["intermediate"] > 40
    assert added == list(range(max(before.values()) + 1, max(before.values()) + 1 + len(added)))
    assert {token: number for token, number in after.items() if number < added[0]} == before
    assert sorted(number for number in after.values() if number >= added[0]) == added
    assert type(new) is type(old) and len(new) == len(old) + len(added)
    assert new.special_tokens_map == old.special_tokens_map | (
        {"pad_token": old.eos_token} if old.pad_token is None else {}
    )
    assert new.chat_template == old.chat_template and new.model_max_length == old.model_max_length
    assert {n: str(t) for n, t in new.added_tokens_decoder.items()} == {
        n: str(t) for n, t in old.added_tokens_decoder.items()
    }
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    stated = [json.loads(one.backend_tokenizer.to_str()) for one in (old, new)]
    assert all(stated[0][part] == stated[1][part] for part in parts)
    assert not [name for name in ("tokenizer.model", "merges.txt", "vocab.json") if (folder / name).exists()]


@pytest.mark.parametrize("kind", KINDS)
def test_each_new_word_is_one_token_inside_a_text(wider, kind: str) -> None:
    base, folder, report = wider(kind)
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    words = {one["token"]: one["id"] for one in record_of(folder)["new_tokens"]}
    assert {"患者", "糖尿病"} <= set(words) and len(words) == report["vocabulary"]["new"]
    assert "secretword" not in "".join(words)  # it stands in the corpus once
    for word, number in words.items():
        # The line end keeps what a tokenizer puts in front of a text away from the word.
        assert ids_of(new, "\n" + word)[-1] == number, word
        assert len(ids_of(old, "\n" + word)) > len(ids_of(new, "\n" + word)) or (
            old.unk_token_id in ids_of(old, word)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_a_new_token_has_its_old_tokens(wider, kind: str) -> None:
    base, folder, _ = wider(kind)
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    first = new_token_ids(folder)[0]
    words = [one["token"] for one in record_of(folder)["new_tokens"]]
    parts = st.one_of(
        st.sampled_from([*CORPUS[:20], *OTHER, *words]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(words).flatmap(lambda word: st.integers(1, len(word)).map(lambda end: word[:end])),
        st.text("abdehinorst 患者糖尿高血压，。\n", max_size=6),
    )
    unchanged = changed = 0

    @given(st.lists(parts, max_size=4).map("".join))
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def check(text: str) -> None:
        nonlocal unchanged, changed
        before, after = ids_of(old, text), ids_of(new, text)
        if max(after, default=0) < first:
            assert after == before
            unchanged += bool(text)
        else:
            assert len(after) <= len(before) or old.unk_token_id in before
            changed += 1
        if kind != "unigram":  # whose unknown characters are lost before and after
            assert new.decode(after) == old.decode(before)
        if kind in ("byte-level", "llama3", "qwen3"):
            assert new.decode(after) == text

    check()
    assert unchanged > 5 and changed > 30


def test_a_base_that_reaches_a_token_another_way_keeps_its_texts(tmp_path: Path) -> None:
    """Merging a + bc to `abc`, an old token of ab + c, would change texts without a new token."""
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "bc": 4, "ab": 5, "abc": 6},
        "merges": [["b", "c"], ["a", "b"], ["ab", "c"]],
    }
    tokenizer = {"model": model, "added_tokens": []}
    pieces = [Piece("abc", "abc", 9, 2), Piece("abcd", "abcd", 5, 3)]
    found = extend_tokenizer(tokenizer, pieces)
    assert [piece.text for piece in found.pieces] == ["abcd"]
    assert found.left_out == {"the base spells it with tokens that it cannot reach": 1}
    assert found.ids == {"bcd": 7, "abcd": 8}  # a + bcd, since a + bc is taken
    assert tokenizer["model"]["merges"][3:] == [["bc", "d"], ["a", "bcd"]]


def test_a_low_score_does_not_change_how_unknown_characters_are_weighed() -> None:
    """An unknown character costs 10 more than the lowest score, so that score must not move."""
    from tokenizers import Tokenizer

    scores = {
        "<unk>": 0.0,
        "a": -20.0,
        "d": -20.0,
        "byc": -20.0,
        "ab": -1.0,
        "cd": -1.0,
        "m": -19.0,
        "n": -19.0,
    }
    model = {"type": "Unigram", "unk_id": 0, "vocab": [list(one) for one in scores.items()]}
    stated = {"version": "1.0", "added_tokens": [], "model": model}
    stated |= dict.fromkeys(
        ["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"]
    )
    old = Tokenizer.from_str(json.dumps(stated))
    found = extend_tokenizer(stated, [Piece("mnm", "mnm", 9, 3), Piece("mn", "mn", 9, 2)])
    new = Tokenizer.from_str(json.dumps(found.tokenizer))
    assert old.encode("abycd").tokens == new.encode("abycd").tokens == ["ab", "y", "cd"]
    assert new.encode("mnm").tokens == ["mnm"] and new.encode("nmn").tokens == ["n", "mn"]
    assert min(score for _, score in stated["model"]["vocab"]) == -20.0


def test_a_longer_word_beats_the_shorter_ones_in_it() -> None:
    from tokenizers import Tokenizer, models

    vocab = [["<unk>", 0.0], ["m", -19.0], ["n", -19.0], ["z", -900.0]]
    stated = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}}
    words = ["mnmn", "mn", "mnm"]  # mn + mn would score more than mnmn, were mn scored after it
    found = extend_tokenizer(stated, [Piece(word, word, 9, len(word)) for word in words])
    assert found.ids == {"mnmn": 4, "mn": 5, "mnm": 6}
    new = Tokenizer(models.Unigram([tuple(one) for one in vocab], unk_id=0))
    for word in words:
        assert new.encode(word).tokens == [word]
    assert new.encode("nm").tokens == ["n", "m"]


@given(st.text("aeinrst hodg患者发热，", max_size=30))
@settings(max_examples=200, deadline=None)
def test_merges_are_applied_as_the_library_does(text: str) -> None:
    backend = tiny_tokenizer("chatml").backend_tokenizer
    ours = Merges(json.loads(backend.to_str())["model"]["merges"])
    for symbols, _ in backend.pre_tokenizer.pre_tokenize_str(text):
        assert ours.cut(symbols) == [token.value for token in backend.model.tokenize(symbols)]


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(-9, -1)), st.text("abc", max_size=6))
@settings(max_examples=200, deadline=None)
def test_the_best_score_is_the_best_of_all_ways_to_cut(scores: dict[str, float], word: str) -> None:
    found = []
    for borders in (c for size in range(len(word)) for c in combinations(range(1, len(word)), size)):
        ends = [0, *borders, len(word)]
        parts = [word[a:b] for a, b in pairwise(ends)]
        if all(part in scores or len(part) == 1 for part in parts):
            found.append(sum(scores.get(part, -20.0) for part in parts))
    assert math.isclose(best_score(word, scores, -20.0), max(found, default=0.0), abs_tol=1e-9)


# -- words -------------------------------------------------------------------------------------------------


def test_words_are_counted_filtered_and_ordered(tmp_path: Path) -> None:
    """Against a count of our own over the pieces of the same SentencePiece model."""
    base = tmp_path / "base"
    tokenizer = tokenizer_of("byte-level", base)
    model_for(tokenizer, base)
    lines = [line for text in CORPUS for line in text.split("\n") if line.strip()]
    (tmp_path / "words.model").write_bytes(sentencepiece(lines, vocab_size=440, add_dummy_prefix=False))
    processor = SentencePieceProcessor(model_file=str(tmp_path / "words.model"))
    uses = Counter(
        piece.replace("▁", " ") for line in lines for piece in processor.encode(line, out_type=str)
    )
    expected = {}
    for text, count in uses.items():
        parts = len(ids_of(tokenizer, text))
        one_word = len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1
        if count >= 4 and parts > 1 and one_word and not text.startswith("<0x"):
            expected[text] = (count, parts)
    report = widened(base, tmp_path / "wider", sentencepiece_model=tmp_path / "words.model", min_count=4)
    record = record_of(tmp_path / "wider")
    found = {one["token"]: (one["count"], one["was"]) for one in record["new_tokens"]}
    assert found == expected and len(found) > 30
    assert record["settings"]["algorithm"] is None and len(record["settings"]["sentencepiece_model"]) == 64
    assert report["left_out"]["rarer than --min-count"] == sum(
        count < 4 and not text.startswith("<0x") for text, count in uses.items()
    )
    top = sorted(expected, key=lambda text: (-expected[text][0], text))[:20]
    assert [one["token"] for one in report["top"]] == top
    assert all(one["saved"] == one["count"] * (one["was"] - 1) for one in report["top"])

    few = widened(
        base,
        tmp_path / "few",
        sentencepiece_model=tmp_path / "words.model",
        min_count=4,
        max_new=25,
        train_data=(str(tmp_path / "corpus.jsonl"),),
    )
    kept = [one["token"] for one in record_of(tmp_path / "few")["new_tokens"]]
    assert few["vocabulary"]["new"] + few["vocabulary"]["intermediate"] == 25
    assert few["left_out"]["over --max-new"] == len(expected) - len(kept)
    assert max(expected, key=lambda text: expected[text][0] * (expected[text][1] - 1)) in kept


def test_the_words_that_save_most_come_first(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level", tmp_path)
    uses = Counter(
        {"感染": 5, "患者": 5, "zq": 5, "qz": 5, "肝炎病毒": 3, "rare one": 9, "乏": 4, "a": 99, "少": 1}
    )
    left_out: Counter[str] = Counter()
    spelling = vocabulary_pieces.Spelling(tokenizer.backend_tokenizer)
    found = vocabulary_pieces.candidates(uses, spelling, 2, left_out)
    saved = {text: uses[text] * (len(ids_of(tokenizer, text)) - 1) for text in uses}
    words = [text for text in uses if text not in ("rare one", "a", "少")]
    assert [piece.text for piece in found] == sorted(words, key=lambda text: (-saved[text], text))
    assert (
        saved["zq"] == saved["qz"] and found.index(next(p for p in found if p.text == "qz")) < len(found) - 1
    )
    assert left_out == {
        "crosses a word boundary of the base": 1,
        "one token of the base already": 1,
        "rarer than --min-count": 1,
    }


def test_training_takes_a_share_of_a_large_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(f"text number {number}", "x:1") for number in range(3000)]
    chosen = list(vocabulary_pieces._training_lines(documents, 0.25))
    assert 600 < len(chosen) < 900
    backwards = list(vocabulary_pieces._training_lines(documents[::-1], 0.25))
    assert backwards[::-1] == chosen  # the choice depends on the text, not on its place
    assert len(list(vocabulary_pieces._training_lines(documents, 1.0))) == 3000

    monkeypatch.setattr(vocabulary_pieces, "TRAINING_CHARACTERS", 2000)
    base = tmp_path / "base"
    model_for(tokenizer_of("byte-level", base), base)
    recorder = Recorder()
    report = widened(base, tmp_path / "wider", recorder)
    characters = sum(map(len, CORPUS))
    assert any(f"trained on {2000 / characters:.1%} of the corpus" in one for one in recorder.said)
    assert report["corpus"]["characters"] == characters  # counted and compared in all of it
    assert report["corpus"]["documents"] == len(CORPUS)


def test_a_corpus_smaller_than_the_size_is_said(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model_for(tokenizer_of("byte-level", base), base)
    recorder = Recorder()
    report = widened(base, tmp_path / "wider", recorder, size=50_000, algorithm="unigram")
    pieces = report["sentencepiece"]["pieces"]
    assert f"the corpus gives {pieces:,} SentencePiece pieces, not 50,000" in recorder.said
    with pytest.raises(UsageError, match="different characters"):
        widened(base, tmp_path / "never", size=64, character_coverage=1.0)
    with pytest.raises(DataError, match="no word of the corpus is worth a token"):
        widened(base, tmp_path / "never", min_count=10_000)
    assert not (tmp_path / "never").exists()


def test_a_word_that_the_new_tokenizer_does_not_use_is_left_out_and_counted(tmp_path: Path) -> None:
    """With a dropout of 1 the library applies no merge at all."""
    tokenizer = tokenizer_of("byte-level", tmp_path / "base")
    model_for(tokenizer, tmp_path / "base")
    stated = json.loads((tmp_path / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    stated["model"]["dropout"] = 1.0
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(DataError, match="no word of the corpus is worth a token") as caught:
        widened(tmp_path / "base", tmp_path / "never")
    assert "not reachable" in caught.value.hint and not (tmp_path / "never").exists()


# -- the report --------------------------------------------------------------------------------------------


def test_the_report_says_what_the_tokenizers_do(wider, tmp_path: Path) -> None:
    base, _, _ = wider("byte-level")
    check = write_jsonl(tmp_path / "check.jsonl", [{"text": text} for text in OTHER if text])
    (tmp_path / "terms.txt").write_text("# ours\n多日\nzzz\n患者\n", encoding="utf-8")
    report = widened(base, tmp_path / "wider", check_data=(str(check),), terms=tmp_path / "terms.txt")
    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path / "wider")
    first = new_token_ids(tmp_path / "wider")[0]
    chinese = [text for text in CORPUS if "天" in text]  # of the last document 29% of the letters
    for texts, found in (
        (CORPUS, report["corpus"]),
        ([text for text in OTHER if text], report["check"]),
        (chinese, report["corpus"]["languages"]["zh"]),
        ([text for text in CORPUS if text not in chinese], report["corpus"]["languages"]["en"]),
    ):
        before = [ids_of(old, text) for text in texts]
        after = [ids_of(new, text) for text in texts]
        characters = sum(map(len, texts))
        assert found["documents"] == len(texts) and found["characters"] == characters
        assert found["tokens_before"] == sum(map(len, before))
        assert found["tokens_after"] == sum(map(len, after))
        assert found["tokens_per_character_after"] == round(sum(map(len, after)) / characters, 4)
        assert found["characters_per_token_before"] == round(characters / sum(map(len, before)), 4)
        if "documents_changed" in found:
            changed = [max(ids) >= first for ids in after]
            assert found["documents_changed"] == sum(changed)
            assert found["new_tokens_used"] == sum(number >= first for ids in after for number in ids)
            assert found["changed_without_new_token"] == 0
            assert found["given_back_exactly"] == found["documents"]
    assert report["corpus"]["tokens_after"] < 0.6 * report["corpus"]["tokens_before"]
    assert report["check"]["documents_changed"] < report["check"]["documents"]

    gained = {one["term"]: one["was"] for one in report["terms"]["gained"]}
    assert gained["多日"] == len(ids_of(old, "多日")) and {"患者", "diagnosis"} <= set(gained)
    assert len(ids_of(new, " diagnosis")) == 1 < len(ids_of(old, " diagnosis"))
    assert report["terms"]["looked_for"] == len(read_terms(None)) + 2  # 患者 is built in
    record = record_of(tmp_path / "wider")
    assert record["report"] == {name: value for name, value in report.items() if name != "folder"}
    assert record["corpus"] == dataclasses.asdict(measure(Document(text, "x:1") for text in CORPUS))
    assert record["corpus"]["characters"] == sum(map(len, CORPUS))


def test_the_built_in_terms_are_words() -> None:
    terms = read_terms(None)
    assert 80 <= len(terms) < 120 and len(set(terms)) == len(terms)
    assert not [term for term in terms if " " in term or "#" in term]


# -- weights -----------------------------------------------------------------------------------------------


def expected_table(old: torch.Tensor, folder: Path, base, rows: int, used: int) -> torch.Tensor:
    """The widened table, row by row: ours before, means of the old tokens of each new token's text, the mean."""
    new = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    table = torch.zeros(rows, old.shape[1])
    for row in range(rows):
        table[row] = old[row] if row < len(old) else old.float().mean(0)
    backend = base.backend_tokenizer
    for symbols, number in new.items():
        if number >= used:
            parts = [old[token.id].float() for token in backend.model.tokenize(symbols)]
            table[number] = sum(parts) / len(parts)
    return table


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_means_of_old_ones(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    tokenizer = tokenizer_of("byte-level", tmp_path / "base")
    base = model_for(tokenizer, tmp_path / "base", tied=tied, dtype=dtype)
    report = widened(base, tmp_path / "wider", pad_to_multiple=50)
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "wider", dtype="auto")
    sizes = report["vocabulary"]
    used = len(tokenizer) + sizes["new"] + sizes["intermediate"]
    assert sizes["rows"] % 50 == 0 and 0 <= sizes["rows"] - used == sizes["padding_rows"] < 50
    assert after.config.vocab_size == sizes["rows"] and after.config.tie_word_embeddings is tied
    assert after.dtype == dtype
    tables = [
        (before.get_input_embeddings().weight, after.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, after.get_output_embeddings().weight),
    ]
    assert (tables[0][1] is tables[1][1]) is tied
    for old, new in tables:
        expected = expected_table(old, tmp_path / "wider", tokenizer, sizes["rows"], len(tokenizer))
        assert torch.equal(new[: len(old)], old)  # to the last bit
        near = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(new.float(), expected, atol=near, rtol=near)
    others = {name: value for name, value in before.state_dict().items() if "embed" not in name}
    for name, value in others.items():
        if "lm_head" not in name:
            assert torch.equal(value, after.state_dict()[name]), name
    text = torch.tensor([ids_of(tokenizer, "Drink water.")])
    logits = [one(text).logits[..., : len(tokenizer)].float() for one in (before, after)]
    torch.testing.assert_close(*logits, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-4)
    if sizes["padding_rows"] and dtype == torch.float32:
        whole = after(text).logits
        torch.testing.assert_close(whole[..., -1], logits[0].mean(-1), atol=1e-4, rtol=1e-4)
        assert (whole.argmax(-1) < used).all()


def test_unused_rows_of_the_base_are_used_first(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3", tmp_path / "base")
    base = model_for(tokenizer, tmp_path / "base", rows=len(tokenizer) + 500, tied=False)
    report = widened(base, tmp_path / "wider", max_new=60, pad_to_multiple=8)
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "wider").get_input_embeddings().weight
    added = new_token_ids(tmp_path / "wider")
    assert len(before) <= len(after) < len(before) + 8 and report["vocabulary"]["rows"] == len(after)
    assert added[0] == len(tokenizer) and added[-1] < len(before)
    rest = [row for row in range(len(before)) if row not in added]
    assert torch.equal(after[rest], before[rest]) and not torch.equal(after[added], before[added])
    expected = expected_table(before, tmp_path / "wider", tokenizer, len(after), len(tokenizer))
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-6)


def test_a_head_with_a_bias() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.arange(10.0))
    state = torch.get_rng_state()
    widen(model, {10: [1, 4], 11: [7]}, 14)
    assert model.lm_head.bias.tolist() == [*range(10), 2.5, 7, 4.5, 4.5]
    assert model.config.vocab_size == 14 and torch.equal(torch.get_rng_state(), state)


def test_formats_of_the_files(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte-level", tmp_path / "base")
    base = model_for(tokenizer, tmp_path / "base", dtype=torch.bfloat16)
    report = widened(base, tmp_path / "wider", dtype="fp16", shard_size="10KB")
    assert report["dtype"] == "float16" and len(list((tmp_path / "wider").glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wider", dtype="auto").dtype == torch.float16
    (tmp_path / "gguf").mkdir()
    gguf, _ = tiny_gguf(tmp_path / "gguf")
    report = widened(gguf, tmp_path / "from-gguf")
    assert report["dtype"] == "float32" and report["vocabulary"]["new"] > 20
    new = AutoTokenizer.from_pretrained(tmp_path / "from-gguf")
    assert new.tokenize("第1234")[-4:] == list("1234")  # digits stay single


# -- folders -----------------------------------------------------------------------------------------------


def test_two_processes_write_the_same_files(tmp_path: Path) -> None:
    """Under other hash seeds, in folders of other names, in both algorithms."""
    tokenizer = tokenizer_of("byte-level", tmp_path / "base")
    base = model_for(tokenizer, tmp_path / "base", tied=False)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in CORPUS])
    code = (
        "import sys; from pathlib import Path; from medicalgpt_cli.engine.model.vocabulary import extend\n"
        "from medicalgpt_cli.engine.observer import Observer\n"
        "from medicalgpt_cli.settings.stages import VocabularySettings\n"
        "for algorithm in ('bpe', 'unigram'):\n"
        "    extend(VocabularySettings(base_model=sys.argv[1], train_data=(sys.argv[2],), size=180, min_count=2,\n"
        "        output_dir=Path(sys.argv[3]) / algorithm, algorithm=algorithm), Observer())\n"
    )
    for seed in ("1", "77"):
        subprocess.run(
            [sys.executable, "-c", code, base, tmp_path / "corpus.jsonl", tmp_path / f"run{seed}"],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            check=True,
        )
    first, second = (
        {file.relative_to(place): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}
        for place in (tmp_path / "run1", tmp_path / "run77")
    )
    assert first == second and {path.parent.name for path in first} == {"bpe", "unigram"}
    assert {
        "model.safetensors",
        "tokenizer.json",
        "vocabulary.json",
        "config.json",
        "generation_config.json",
    } <= {path.name for path in first}
    assert not [path for path, content in first.items() if str(tmp_path).encode() in content]


def test_widening_twice(wider, tmp_path: Path) -> None:
    """The ids of the first time stay, and the record is the second's."""
    _, folder, _ = wider("byte-level")
    data = write_jsonl(tmp_path / "more.jsonl", [{"text": "阿司匹林 and aspirin, 阿司匹林。"}] * 9)
    widened(folder, tmp_path / "again", train_data=(str(data),), pad_to_multiple=1)
    earlier, later = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "again")
    added = new_token_ids(tmp_path / "again")
    assert added[0] == len(earlier) and added[-1] == len(later) - 1
    assert earlier.get_vocab().items() <= later.get_vocab().items()
    assert len(ids_of(later, "\n阿司匹林")) == 2


def test_the_record_of_a_folder(tmp_path: Path) -> None:
    assert new_token_ids(tmp_path) == []
    (tmp_path / "vocabulary.json").write_text(
        '{"first_new_id": 5, "new_tokens": [{}, {}], "intermediate": 1}'
    )
    assert new_token_ids(tmp_path) == [5, 6, 7]
    (tmp_path / "vocabulary.json").write_text('{"first_new_id": 5}')
    with pytest.raises(UsageError, match="damaged"):
        new_token_ids(tmp_path)


@pytest.mark.parametrize("output", ["base", "base/wider", "taken"])
def test_nothing_is_overwritten(tmp_path: Path, output: str) -> None:
    model_for(tokenizer_of("byte-level", tmp_path / "base"), tmp_path / "base")
    (tmp_path / "taken").mkdir()
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "患者"}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="--output-dir"):
        extend(
            VocabularySettings(
                base_model=str(tmp_path / "base"), train_data=(str(data),), output_dir=tmp_path / output
            ),
            Observer(),
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_widened_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for name, model in (
        ("WordLevel", models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        ("WordPiece", models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        ("BPE with marks", models.BPE({"a</w>": 0, "[UNK]": 1}, [], end_of_word_suffix="</w>")),
    ):
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]")
        folder = tmp_path / name
        model_for(tokenizer, folder)
        tokenizer.save_pretrained(folder)
        with pytest.raises(UsageError, match=f"a {name}.* tokenizer cannot be widened"):
            widened(folder, tmp_path / "never")

    base = tiny_model(tmp_path / "base")
    adapter_over(base, tmp_path / "adapter")
    with pytest.raises(UsageError, match="is an adapter"):
        widened(tmp_path / "adapter", tmp_path / "never")
    with pytest.raises(UsageError, match="no such file"):
        widened(base, tmp_path / "never", terms=tmp_path / "none.txt")
    with pytest.raises(DataError, match="no such file"):
        widened(base, tmp_path / "never", check_data=(str(tmp_path / "none.jsonl"),))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="quantised"):
        widened(base, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a model", b'{"model": {}}', bytes(200)])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    base = tmp_path / "base"
    model_for(tokenizer_of("byte-level", base), base)
    if content is not None:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UsageError, match="--sentencepiece-model"):
        widened(base, tmp_path / "never", sentencepiece_model=tmp_path / "x.model")
    assert not (tmp_path / "never").exists()


def test_a_tokenizer_that_loses_text_stops_the_command(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    old = tokenizer_of("byte-level", tmp_path / "old")
    new = tokenizer_of("byte-level", tmp_path / "new")
    new.add_tokens(["患者"])
    stated = json.loads(new.backend_tokenizer.to_str())
    stated["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    new._tokenizer = Tokenizer.from_str(json.dumps(stated))
    with pytest.raises(
        MedgptError, match=r"^a\.jsonl:7: the new tokenizer does not give this text back"
    ) as caught:
        compare([Document("患者 well", "a.jsonl:7")], old, new, len(old))
    assert "患者" not in f"{caught.value}{caught.value.hint}"


def test_texts_that_changed_or_were_lost_before_are_counted(wider, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    old, new = (tokenizer_of("byte-level", tmp_path / name) for name in ("old", "new"))
    stated = json.loads(new.backend_tokenizer.to_str())
    stated["model"]["merges"] = stated["model"]["merges"][:-20]
    new._tokenizer = Tokenizer.from_str(json.dumps(stated))
    texts = [*CORPUS[:20], "rest", "xyz"]
    found = compare([Document(text, "a:1") for text in texts], old, new, 10_000)
    other = sum(ids_of(old, text) != ids_of(new, text) for text in texts)
    assert 0 < other < len(texts) and found["changed_without_new_token"] == other
    assert found["documents_changed"] == found["new_tokens_used"] == 0

    base, _, _ = wider("unigram")  # which has unknown characters only as <unk>
    recorder = Recorder()
    report = widened(base, tmp_path / "wider", recorder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lost = report["corpus"]["not_given_back_before_either"]
    assert 0 < lost <= sum(tokenizer.decode(ids_of(tokenizer, text)) != text for text in CORPUS)
    assert report["corpus"]["given_back_exactly"] == len(CORPUS) - lost
    assert any(f"{lost:,} documents of the corpus data are not given back" in one for one in recorder.said)
