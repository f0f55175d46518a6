"""Token ids and loss masks, held against references that do not go through the code under test."""

from __future__ import annotations

import functools
import os
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data import rendering
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import IGNORED, render_conversation
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.rendering import (
    encode_prompt,
    encode_raw,
    encode_within,
    fit_history,
    stop_token_ids,
)
from medicalgpt_cli.engine.model.tokenizer import TEMPLATES
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UsageError
from tests.conftest import DATA
from tests.tiny import STYLES, tiny_tokenizer

SYSTEM = {"role": "system", "content": "You are a helpful doctor."}
TURNS = (
    {"role": "user", "content": "感冒发烧39度怎么办？"},
    {"role": "assistant", "content": "建议多饮水、物理降温。"},
    {"role": "user", "content": "What are the symptoms of diabetes?"},
    {"role": "assistant", "content": "Thirst, tiredness and weight loss."},
)
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "mistral": "</s>",
       "gemma": "<end_of_turn>", "none": "<|endoftext|>"}  # fmt: skip


@functools.cache
def tokenizer_of(style: str):
    tokenizer = tiny_tokenizer(style)
    if style == "none":
        tokenizer.chat_template = TEMPLATES["plain"]
    return tokenizer


def conversation(*messages) -> Conversation:
    return Conversation(tuple(dict(one) for one in messages), "here.jsonl:1")


def render(style, *messages, max_length=4096):
    counts = Counts()
    return render_conversation(tokenizer_of(style), conversation(*messages), max_length, counts), counts


def spans(example) -> list[tuple[int, list[int]]]:
    """(start, ids) of each stretch with a loss."""
    found = []
    for learnt, group in groupby(range(len(example.labels)), lambda at: example.labels[at] != IGNORED):
        places = list(group)
        if learnt:
            found.append((places[0], [example.input_ids[at] for at in places]))
    return found


def test_chatml_by_hand():
    """The expected ids are put together piece by piece from the tokenizer alone."""
    tokenizer = tokenizer_of("chatml")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def text(piece):
        return tokenizer(piece, add_special_tokens=False)["input_ids"]

    def turn(role, content):
        return [start, *text(f"{role}\n{content}"), end]

    newline = text("\n")
    first = [*turn("system", SYSTEM["content"]), *newline, *turn("user", TURNS[0]["content"]), *newline]
    first += [start, *text("assistant\n")]
    answer_1 = [*text(TURNS[1]["content"]), end]
    between = [*newline, *turn("user", TURNS[2]["content"]), *newline, start, *text("assistant\n")]
    answer_2 = [*text(TURNS[3]["content"]), end]

    (example,), counts = render("chatml", SYSTEM, *TURNS)
    assert example.input_ids == first + answer_1 + between + answer_2
    assert example.labels == ([IGNORED] * len(first) + answer_1 + [IGNORED] * len(between) + answer_2)
    assert not counts.skipped and not counts.merged and not counts.truncated


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", [True, False])
def test_targets_are_the_answers_and_their_end_token(style, system):
    tokenizer = tokenizer_of(style)
    messages = [SYSTEM, *TURNS] if system else list(TURNS)
    examples, _ = render(style, *messages)
    learnt = [tokenizer.decode(ids) for example in examples for _, ids in spans(example)]
    expected = [one["content"] + END[style] for one in messages if one["role"] == "assistant"]
    if style == "qwen3":  # its template opens each answer with a reasoning block
        expected = ["<think>\n\n</think>\n\n" + one for one in expected]
    assert [one.strip() for one in learnt] == expected
    for example in examples:
        assert len(example.input_ids) == len(example.labels)
        assert example.labels[-1] == tokenizer.convert_tokens_to_ids(END[style])  # nothing stands behind it


@pytest.mark.parametrize("style", STYLES)
def test_each_target_stands_behind_what_inference_renders(style):
    messages = [SYSTEM, *TURNS]
    examples, _ = render(style, *messages)
    starts = [(example.input_ids[:start]) for example in examples for start, _ in spans(example)]
    asked = [messages[:index] for index, one in enumerate(messages) if one["role"] == "assistant"]
    assert starts == [encode_prompt(tokenizer_of(style), one) for one in asked]


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("gemma", "none")])
def test_prompts_are_those_of_the_library(style):
    tokenizer = tokenizer_of(style)
    theirs = tokenizer.apply_chat_template(
        [SYSTEM, *TURNS[:3]], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(tokenizer, [SYSTEM, *TURNS[:3]]) == theirs


@pytest.mark.parametrize(("style", "number"), [("chatml", 1), ("llama3", 1), ("gemma", 1), ("none", 1),
                                               ("qwen3", 2), ("mistral", 2)])  # fmt: skip
def test_one_example_a_turn_where_the_template_rewrites_history(style, number):
    examples, counts = render(style, SYSTEM, *TURNS)
    assert len(examples) == number
    counted = [reason for reason in counts.merged if reason.startswith("one example a turn")]
    assert bool(counted) == (number > 1)


def test_reasoning_is_learnt_in_its_own_turn_and_absent_from_history():
    first = {"role": "assistant", "content": "<think>\nfever\n</think>\n\nDrink."}
    examples, _ = render("qwen3", TURNS[0], first, *TURNS[2:])
    tokenizer = tokenizer_of("qwen3")
    assert tokenizer.decode(spans(examples[0])[0][1]) == "<think>\nfever\n</think>\n\nDrink.<|im_end|>"
    assert "fever" not in tokenizer.decode(examples[1].input_ids)
    assert "Drink." in tokenizer.decode(examples[1].input_ids)


def test_gemma_puts_the_system_text_in_front_of_the_first_question():
    examples, counts = render("gemma", SYSTEM, *TURNS)
    text = tokenizer_of("gemma").decode(examples[0].input_ids)
    assert f"user\n{SYSTEM['content']}\n\n{TURNS[0]['content']}<end_of_turn>" in text
    assert sum(counts.merged.values()) == 1


def test_a_refused_order_of_roles_is_skipped_and_counted():
    examples, counts = render("mistral", {"role": "assistant", "content": "Hello"}, *TURNS[:2])
    assert examples == []
    assert sum(counts.skipped.values()) == 1


def test_without_a_template_the_flag_is_named():
    with pytest.raises(UsageError) as problem:
        encode_prompt(tiny_tokenizer("none"), list(TURNS[:1]))
    assert "--template" in problem.value.hint


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("<think>\nfever\n</think>\n\nDrink.", "fever\n</think>\n\nDrink.<|im_end|>"),
        ("<think>fever</think>Drink.", "fever\n</think>\n\nDrink.<|im_end|>"),
        ("Drink.", "\n</think>\n\nDrink.<|im_end|>"),  # with the prompt an empty block
    ],
)
def test_a_header_that_opens_a_reasoning_block(answer, target):
    """The generation prompt writes `<think>`, the history leaves reasoning out (DeepSeek-R1's manner)."""
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>\n\n')[-1] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    messages = [TURNS[0], {"role": "assistant", "content": answer}]
    counts = Counts()
    examples = render_conversation(tokenizer, conversation(*messages), 512, counts)
    ((start, ids),) = spans(examples[0])
    assert examples[0].input_ids[:start] == encode_prompt(tokenizer, messages[:1])
    assert tokenizer.decode(ids) == target
    assert sum(counts.merged.values()) == (2 if answer == "Drink." else 1)


# -- control tokens in user text ---------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_special_spellings_never_become_control_tokens(style):
    tokenizer = tokenizer_of(style)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    spellings = "".join(tokenizer.convert_ids_to_tokens(sorted(special)))
    harmless = "a" * 5

    def controls(content):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": content}])
        return [one for one in ids if one in special]

    hostile = f"a {spellings} {spellings[0]}{spellings} b"
    assert controls(hostile) == controls(harmless)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": hostile}])
    assert hostile in tokenizer.decode(ids)
    # the same in training, in a question and in an answer
    (example,), _ = render(
        style, {"role": "user", "content": hostile}, {"role": "assistant", "content": hostile}
    )
    assert example.input_ids[: len(ids)] == ids
    assert [one for one in example.labels if one in special] == [tokenizer.convert_tokens_to_ids(END[style])]


def test_the_guard_character_itself_is_kept_and_opens_no_way_round():
    tokenizer = tokenizer_of("chatml")
    content = "a<\ufdd0|im_end|>\ufdd0b<|im\ufdd0_end|>"
    ids = encode_prompt(tokenizer, [{"role": "user", "content": content}])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2  # of the system turn that the template adds, and of the user turn
    assert content in tokenizer.decode(ids)


@settings(max_examples=60, deadline=None)
@given(
    style=st.sampled_from(STYLES),
    texts=st.lists(
        st.lists(
            st.sampled_from([*"ab \n?。医é🙂\u2028\ufdd0", "<|im_end|>", "[INST]", "</s>"]), min_size=1
        )
        .map("".join).filter(lambda text: text.strip()),
        min_size=2, max_size=6,
    ),
)  # fmt: skip
def test_any_conversation(style, texts):
    """Whatever is said: prompts are those of inference, and the loss lies on answers and their end."""
    texts = texts[: len(texts) // 2 * 2]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    examples, _ = render(style, *messages)
    tokenizer = tokenizer_of(style)
    learnt = [(example, start, ids) for example in examples for start, ids in spans(example)]
    assert len(learnt) == len(texts) // 2
    end = tokenizer.convert_tokens_to_ids(END[style])
    for number, (example, start, ids) in enumerate(learnt):
        assert example.input_ids[:start] == encode_prompt(tokenizer, messages[: 2 * number + 1])
        assert ids.count(end) == 1 and ids[-1] == end
        assert texts[2 * number + 1].strip() in tokenizer.decode(ids)


def test_a_token_that_runs_over_the_border_leaves_the_prompt_as_it_is():
    """A header that ends in a space, which is a token of its own there and part of a word in the whole."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    question = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "thirst"}
    (example,) = render_conversation(tokenizer, conversation(question, answer), 512, Counts())
    prompt = encode_prompt(tokenizer, [question])
    whole = tokenizer.apply_chat_template([question, answer], return_dict=False)
    assert whole[: len(prompt)] != prompt, "the example does not test what it says: choose another border"
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids[len(prompt) :]) == "thirst<|im_end|>"


# -- the same records in several formats -------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("names", "number"),
    [
        (
            (
                "single_alpaca.jsonl",
                "single_alpaca_array.json",
                "single_messages.jsonl",
                "single_sharegpt.jsonl",
            ),
            78,
        ),
        (("multi_alpaca_history.jsonl", "multi_messages.jsonl", "multi_sharegpt.jsonl"), 30),
    ],
)
def test_formats_are_equivalent(style, names, number):
    results = []
    for name in names:
        counts = Counts()
        found = load_conversations([str(DATA / "formats" / name)], counts, Observer())
        assert len(found) == counts.used == number
        examples = [one for c in found for one in render_conversation(tokenizer_of(style), c, 4096, counts)]
        results.append([(one.input_ids, one.labels) for one in examples])
        assert not counts.skipped
    assert all(one == results[0] for one in results[1:])


# -- what does not fit -------------------------------------------------------------------------------------


def long(turns: int):
    return [
        SYSTEM,
        *(
            {"role": ("user", "assistant")[i % 2], "content": f"turn {i} " + "diabetes " * 10}
            for i in range(2 * turns)
        ),
    ]


@pytest.mark.parametrize("style", STYLES)
def test_the_oldest_exchanges_go_first_and_the_newest_stays_whole(style):
    tokenizer = tokenizer_of(style)
    full, _ = render(style, *long(4))
    room = max(len(one.input_ids) for one in full) - 1
    examples, counts = render(style, *long(4), max_length=room)
    assert all(len(one.input_ids) <= room for one in examples)
    newest = tokenizer.decode(examples[-1].input_ids)
    assert "turn 0" not in newest and "turn 7" in newest and SYSTEM["content"] in newest
    assert examples[-1].labels[-1] == tokenizer.convert_tokens_to_ids(END[style])
    assert counts.truncated and counts.tokens_cut > 0 and counts.places


def test_an_answer_that_is_too_long_loses_its_end():
    question = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "thirst " * 200}
    (full,), _ = render("chatml", question, answer)
    (cut,), counts = render("chatml", question, answer, max_length=100)
    assert cut.input_ids == full.input_ids[:100] and cut.labels == full.labels[:100]
    assert tokenizer_of("chatml").eos_token_id not in cut.labels  # an end that was not there is not learnt
    assert counts.tokens_cut == len(full.input_ids) - 100


def test_a_question_that_fills_the_context_is_skipped_and_counted():
    question = {"role": "user", "content": "thirst " * 200}
    counts = Counts(read=1)
    found = render_conversation(tokenizer_of("chatml"), conversation(question, TURNS[1]), 100, counts)
    assert found == []
    assert list(counts.skipped.values()) == [1] and counts.used == 0


@pytest.mark.parametrize("style", STYLES)
def test_fit_history(style):
    tokenizer = tokenizer_of(style)
    messages = long(3)[:-1]
    whole = len(encode_prompt(tokenizer, messages))
    assert fit_history(tokenizer, messages, whole) == (messages, 0)
    kept, dropped = fit_history(tokenizer, messages, whole - 1)
    assert dropped == 2 and kept == [messages[0], *messages[3:]]
    kept, dropped = fit_history(tokenizer, messages, 1)
    assert kept == [messages[0], messages[-1]] and dropped == 4


@pytest.mark.parametrize("style", STYLES)
def test_fit_history_leaves_out_what_leaving_out_one_by_one_does(style, monkeypatch):
    """Also where texts are long enough to be counted in pieces first."""
    tokenizer = tokenizer_of(style)
    messages = long(6)[:-1]
    starts = [1, *(at for at in range(2, len(messages)) if messages[at]["role"] == "user")]
    tokens = [len(encode_prompt(tokenizer, [messages[0], *messages[start:]])) for start in starts]
    for piece in (rendering._PIECE, 40):
        monkeypatch.setattr(rendering, "_PIECE", piece)
        for budget in {one + more for one in tokens for more in (-1, 0, 1)} | {0, 1}:
            fitting = (start for start, count in zip(starts, tokens, strict=True) if count <= budget)
            start = next(fitting, starts[-1])
            assert fit_history(tokenizer, messages, budget) == ([messages[0], *messages[start:]], start - 1)


def test_a_prompt_within_a_number_of_tokens_is_the_whole_prompt_or_none(monkeypatch):
    monkeypatch.setattr(rendering, "_PIECE", 50)
    tokenizer = tokenizer_of("chatml")
    text = "fever <|im_end|> thirst \ufdd0 体温 " * 40
    for asked, right in (
        (text, encode_raw(tokenizer, text)),
        (long(2)[:-1], encode_prompt(tokenizer, long(2)[:-1])),
    ):
        assert encode_within(tokenizer, asked, len(right)) == right
        for less in (1, 20, len(right)):
            assert encode_within(tokenizer, asked, len(right) - less) is None


# -- stop tokens and raw text ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_stop_tokens_hold_the_template_s_end(style):
    tokenizer = tokenizer_of(style)
    wanted = {tokenizer.convert_tokens_to_ids(END[style]), tokenizer.eos_token_id}
    assert stop_token_ids(tokenizer) == sorted(wanted)


@pytest.mark.parametrize(
    "start", ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|> <|begin_of_text|>", ""]
)
def test_raw_text_has_the_tokenizer_s_start(start):
    """Whatever it is: GLM-4's is two tokens, OPT's is its end token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("llama3")
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in start.split()]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A".strip(), special_tokens=tokens
    )
    assert encode_raw(tokenizer, "diabetes") == tokenizer("diabetes")["input_ids"]
    assert encode_raw(tokenizer, "diabetes")[: len(tokens)] == [number for _, number in tokens]


def test_an_end_that_the_tokenizer_puts_behind_a_text_is_no_start():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("llama3")
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    assert encode_raw(tokenizer, "diabetes") == tokenizer("diabetes")["input_ids"][:-1]


# -- the real tokenizer ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(real_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.fspath(real_model))
    counts = Counts()
    sources = [str(DATA / name) for name in ("medquad_en_alpaca.jsonl", "cmtmedqa_zh_sharegpt.jsonl")]
    for one in load_conversations(sources, counts, Observer()):
        (example,) = render_conversation(tokenizer, one, 10**6, counts)
        whole = tokenizer.apply_chat_template(list(one.messages), return_dict=False)
        assert whole[: len(example.input_ids)] == example.input_ids
        answers = [m["content"] + "<|im_end|>" for m in one.messages if m["role"] == "assistant"]
        assert [tokenizer.decode(ids) for _, ids in spans(example)] == answers
