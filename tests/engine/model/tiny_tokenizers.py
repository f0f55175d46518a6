"""Tiny tokenizers of the kinds that `medgpt vocabulary` widens, in the layouts of the families they are named after."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

from tests.tiny import tiny_tokenizer

_WORDS = ["发热", "咳嗽", "头痛", "患者", "治疗", "高血压", "糖尿病", "乏力", "腹痛", "医院"]
_PLAIN = ["今天", "出现", "建议", "检查", "注意", "多日"]
_ENGLISH = ["hypertension", "diagnosis", "treatment", "of the", "patient", "with", "chronic", "disease"]

KINDS = ("byte-level", "llama3", "qwen3", "llama2", "gemma", "spm", "unigram", "unigram-bytes")


def corpus(documents: int = 60) -> list[str]:
    """Chinese and English documents with words that come often beside any other, and one that comes once."""
    chosen = random.Random(7)
    texts = []
    for number in range(documents):
        words = [chosen.choice(_WORDS + _PLAIN) for _ in range(8)]
        texts.append(f"{''.join(words[:3])}，{''.join(words[3:6])}。\n{''.join(words[6:])}第{number}天")
        words = [chosen.choice(_ENGLISH) for _ in range(6)]
        texts.append(f"The {' '.join(words[:4])} is {words[4]}, number {number}.\n  {words[5].title()}!")
    return [*texts, "secretword 独一无二"]


def tokenizer_of(kind: str, folder: Path):
    """A fast tokenizer as `AutoTokenizer` reads it from `folder`, where its files are written."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "spm":  # nothing but a SentencePiece file, as early Llama models were published
        (folder / "tokenizer.model").write_bytes(
            sentencepiece(["a quiet day in May", "some plain words"] * 9)
        )
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    else:
        _made(kind).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def sentencepiece(texts: list[str], **options) -> bytes:
    """A SentencePiece model file."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        **{
            "model_type": "bpe",
            "vocab_size": 340,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
            **options,
        },
    )
    return written.getvalue()


def _made(kind: str):
    from transformers import PreTrainedTokenizerFast

    if kind in ("byte-level", "qwen3"):
        return tiny_tokenizer("chatml" if kind == "byte-level" else "qwen3")
    if kind == "llama3":
        from tokenizers import Tokenizer

        tokenizer = tiny_tokenizer("llama3")
        stated = json.loads(tokenizer.backend_tokenizer.to_str())
        stated["model"]["ignore_merges"] = True
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stated))
        return tokenizer
    backend = _unigram(kind == "unigram-bytes") if kind.startswith("unigram") else _character_bpe(kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",  # added behind the vocabulary
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _character_bpe(kind: str):
    """BPE over characters with byte fallback, spaces as ▁: Llama 2 (with one in front) and Gemma (without)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(
        ["a quiet day in May", "some plain words of the day", "的今天"] * 5,
        trainers.BpeTrainer(vocab_size=90, show_progress=False),
    )
    learnt = json.loads(learner.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: number for number, name in enumerate(names)}
    for name in sorted(learnt["vocab"], key=learnt["vocab"].get):
        vocab.setdefault(name, len(vocab))
    merges = [tuple(pair) for pair in learnt["merges"]]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    front = [normalizers.Prepend("▁")] if kind == "llama2" else []
    backend.normalizer = normalizers.Sequence([*front, spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if front else []))
    return backend


def _unigram(byte_fallback: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = [(f"<0x{byte:02X}>", -12.0) for byte in range(256)] if byte_fallback else []
    letters = [
        (letter, -6.0 - number / 50)
        for number, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz,.:0123456789")
    ]
    words = [
        ("▁the", -3.0),
        ("▁of", -3.2),
        ("tion", -5.0),
        ("ing", -4.0),
        ("是", -7.0),
        ("今天", -8.0),
        ("天", -9.0),
    ]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *bytes_, *letters, *words]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    last = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), last])
    return backend
