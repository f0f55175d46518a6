"""The starter's tokenizer: a SentencePiece unigram model, written in the tokenizers library's format.

SentencePiece spells a space as U+2581. Here the pieces hold real spaces, so nothing is normalised and every
text comes back as it was, also one that contains U+2581.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

CONTEXT = 2048  # tokens
END = "<|endoftext|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_SPACE = "▁"
_LINE = 1000  # characters of a line for SentencePiece


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens: control tokens, 256 bytes for what is rare, and the words of `texts`.

    The same texts give the same tokenizer.
    """
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
        model_writer=written,
        model_type="unigram",
        vocab_size=size,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=-1,
        eos_id=1,
        eos_piece=END,
        control_symbols=list(ROLES),
        num_threads=1,
        max_sentence_length=8 * _LINE,  # bytes
        minloglevel=2,
    )
    pieces = SentencePieceProcessor(model_proto=written.getvalue())
    words = [
        (pieces.id_to_piece(index).replace(_SPACE, " "), pieces.get_score(index))
        for index in range(pieces.get_piece_size())
    ]
    tokenizer = Tokenizer(Unigram(words, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in (END, *ROLES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def _lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE):
                yield line[start : start + _LINE]
