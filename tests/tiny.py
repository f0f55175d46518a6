"""Tiny real models and tokenizers, made on the spot: the same architecture and file formats as the large ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path

STYLES = ("chatml", "llama3", "qwen3", "mistral", "gemma", "none")

# Templates in the manner of the families they are named after: what matters is kept (who may speak,
# what is trimmed, what is rewritten), what does not is left out (tools, dates).
_CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Reasoning blocks are removed from all but the last answer, and an empty one is put there if it has none.
_QWEN3 = (
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set reasoning = '' %}{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The system prompt stands in front of the last user turn, so each turn rewrites the history.
_MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{% if loop.index0 >= turns | length - 2 + turns | length % 2 %}"
    "{{ '[INST] ' + system + m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

# style: (template, bos, eos, further special tokens, added tokens that are not special)
_STYLES = {
    "chatml": (_CHATML, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], []),
    "llama3": (
        _LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        [],
    ),
    "qwen3": (_QWEN3, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], ["<think>", "</think>"]),
    "mistral": (_MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], []),
    "gemma": (_GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "none": (None, None, "<|endoftext|>", [], []),
}

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = [
    "What are the symptoms of diabetes? The symptoms include thirst, tiredness and weight loss.",
    "Signs and symptoms of adult leukemia include fever, feeling tired, and easy bruising or bleeding.",
    "You are a helpful assistant. Check with your doctor if you have any of the following problems.",
    "The answer is A. The treatment of hypertension is a change of diet, exercise and medicine.\n\n",
    "system\nuser\nassistant\nmodel\n ### Instruction:\n ### Response:\n",
    "感冒发烧39度怎么办？建议多饮水、物理降温，必要时口服对乙酰氨基酚并就医。",
    "高血压患者能喝酒吗？不建议饮酒，酒精会影响血压控制。糖尿病需要忌口吗？需要控制总热量。",
    "医生您好，我最近感觉头痛、乏力，请问这是什么原因？您好，建议您到医院检查，注意休息。",
]


@functools.cache
def _bpe():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    return bpe.to_str()


def tiny_tokenizer(style: str = "chatml"):
    """A byte-level BPE tokenizer of under 1,500 tokens with the chat template of a family."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, bos, eos, special, added = _STYLES[style]
    bpe = Tokenizer.from_str(_bpe())
    if style in ("llama3", "qwen3"):  # their way of cutting text keeps line ends together
        cut = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        extra_special_tokens=special,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(folder: Path, style: str = "chatml", seed: int = 0) -> Path:
    """Write a Llama model of 2 layers with its tokenizer and generation settings; gives the folder."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(style)
    torch.manual_seed(seed)
    ends = [tokenizer.eos_token_id]
    if style == "gemma":
        ends.append(tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # large enough that greedy answers differ between prompts
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def text(pieces) -> str:
    """The text of an answer that comes in pieces."""
    from medicalgpt_cli.engine.generation.answer_reader import content_of

    return "".join(map(content_of, pieces))
