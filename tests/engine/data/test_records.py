"""What each key of a record means: every shape that people bring, and a word about each key that nothing is made of."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.formats import iterate_texts, load_conversations, load_prompts
from medicalgpt_cli.engine.data.known_keys import NO_MEANING, SPELLINGS
from medicalgpt_cli.engine.data.messages import Conversation
from medicalgpt_cli.engine.data.preferences import Pair, load_pairs
from medicalgpt_cli.engine.data.prompts import load_rl_prompts
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.rewards.rules import stated_options
from medicalgpt_cli.errors import DataError, MedgptError
from tests.tiny import write_jsonl

FEVER = [{"role": "user", "content": "Fever?"}, {"role": "assistant", "content": "Drink."}]


def sft(tmp_path: Path, *rows: Any, **options: Any) -> tuple[list[Conversation], Counts]:
    counts = Counts(**options)
    return load_conversations([str(write_jsonl(tmp_path / "a.jsonl", rows))], counts, Observer()), counts


def pairs(tmp_path: Path, *rows: Any) -> tuple[list[Pair], Counts]:
    counts = Counts()
    return load_pairs([str(write_jsonl(tmp_path / "a.jsonl", rows))], counts, Observer()), counts


def said(conversation: Conversation | Pair) -> list[tuple[str, str]]:
    return [(one["role"], one["content"]) for one in conversation.messages]


def qa(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


# -- questions and answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "Be a doctor.", "input": "Cough.", "response": "Rest."},
            qa("Be a doctor.\nCough.", "Rest."),
        ),
        ({"question": "Dose?", "context": "He is 4.", "answer": "5 mg."}, qa("Dose?\nHe is 4.", "5 mg.")),
        (
            {"instruction": "Translate.", "query": "Husten", "output": "Cough"},
            qa("Translate.\nHusten", "Cough"),
        ),
        ({"prompt": "Fever?", "query": "", "response": "Drink."}, qa("Fever?", "Drink.")),
        ({"prompt": "Fever?", "completion": "Drink."}, qa("Fever?", "Drink.")),
        ({"Question": "Fever?", "Response": "Drink."}, qa("Fever?", "Drink.")),
        ({"问题": "发烧？", "回答": "喝水。"}, qa("发烧？", "喝水。")),
        (
            {"患者问题": "发烧？", "医生回答": "喝水。", "系统提示": "简短。"},
            [("system", "简短。"), *qa("发烧？", "喝水。")],
        ),
        ({"主诉": "发烧三天", "诊断建议": "喝水。"}, qa("发烧三天", "喝水。")),
        ({"question": "Fever?", "answer": "Drink.", "reference": "NHS page 4"}, qa("Fever?", "Drink.")),
        ({"question": "Fever?", "answer": "Drink.", "response": "Drink."}, qa("Fever?", "Drink.")),
        ({"question": "Fever?", "answer": None, "response": "Drink."}, qa("Fever?", "Drink.")),
        ({"question": "Fever?", "chosen": "Drink."}, qa("Fever?", "Drink.")),
        (
            {"question": "Now?", "answer": "Rest.", "history": [["Fever?", "Drink."]]},
            [*qa("Fever?", "Drink."), *qa("Now?", "Rest.")],
        ),
        (
            {"history": FEVER, "messages": [{"role": "user", "content": "Now?"}], "answer": "Rest."},
            [*qa("Fever?", "Drink."), *qa("Now?", "Rest.")],
        ),
        ({"messages": json.dumps(FEVER)}, qa("Fever?", "Drink.")),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *FEVER]},
            [("system", "Be brief."), *qa("Fever?", "Drink.")],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Fe"}, {"type": "text", "text": "ver?"}],
                    },
                    FEVER[1],
                ]
            },
            qa("Fever?", "Drink."),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Fever?"}], "loss_weight": 0.0},
                    FEVER[1],
                ]
            },
            qa("Fever?", "Drink."),
        ),
    ],
)
def test_questions_and_answers(row, expected, tmp_path):
    (found,), _ = sft(tmp_path, row)
    assert said(found) == expected


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"question": "Fever?", "answer": "Drink.", "response": "Sleep."}, "two different answers"),
        ({"Question": "Fever?", "question": "Cough?", "answer": "Drink."}, "mean the same"),
        ({"问题": "发烧？", "主诉": "咳嗽", "回答": "喝水。"}, "mean the same"),
        (
            {"system": "A", "messages": [{"role": "system", "content": "B"}, *FEVER]},
            "two different system messages",
        ),
        ({"question": "Fever?", "answer": 7}, "answer is a number, not text"),
        ({"question": "Fever?", "answer": "Drink.", "history": [["a"]]}, "not a pair"),
        ({"messages": [{**FEVER[0]}, {**FEVER[1], "weight": "much"}]}, "weight is no number"),
        ({"messages": [{**FEVER[0]}, {**FEVER[1], "weight": -1}]}, "weight is no number"),
        (
            {"messages": [{**FEVER[0], "content": [{"type": "poem", "text": "x"}]}, FEVER[1]]},
            "an unknown type",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(row, word, tmp_path):
    filler = [{"question": f"{number}?", "answer": "x"} for number in range(30)]
    with pytest.raises(DataError, match=word) as caught:
        sft(tmp_path, *filler, row)
    assert "a.jsonl:31:" in caught.value.message
    for value in ("Fever", "Drink", "Sleep", "发烧", "咳嗽", "much", "poem"):
        assert value not in f"{caught.value.message} {caught.value.hint}"


def test_several_phrasings_of_one_question_share_their_answer(tmp_path):
    rows = [{"questions": [["发烧？"], ["发热？"]], "answers": ["喝水。"]}]
    found, counts = sft(tmp_path, *rows)
    assert [said(one) for one in found] == [qa("发烧？", "喝水。"), qa("发热？", "喝水。")]
    assert found[0].group == found[1].group is not None  # a split keeps them together
    assert counts.merged == {"one conversation for each phrasing of the question": 1}


def test_phrasings_beside_a_question_are_learnt_too(tmp_path):
    row = {
        "question": "发烧？",
        "questions": ["发热？", "发烧？"],
        "answer": "喝水。",
        "history": [["Hi", "Yes?"]],
    }
    found, _ = sft(tmp_path, row)
    before = qa("Hi", "Yes?")
    assert [said(one) for one in found] == [
        [*before, *qa("发烧？", "喝水。")],
        [*before, *qa("发热？", "喝水。")],
    ]


# -- what is learnt and what is not -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize(("bad", "good"), [(False, True), (0, 1), ("false", "true"), ("0", "1")])
def test_an_answer_marked_as_bad_is_not_learnt(name, bad, good, tmp_path):
    found, counts = sft(
        tmp_path, {"messages": FEVER, name: bad}, {"question": "Cough?", "answer": "Tea.", name: good}
    )
    assert [said(one) for one in found] == [qa("Cough?", "Tea.")]
    ((reason, number),) = counts.skipped.items()
    assert number == 1 and "marked as bad" in reason and "kto" in reason


def test_a_label_that_is_no_truth_value_is_named(tmp_path):
    (found,), counts = sft(tmp_path, {"messages": FEVER, "label": "cardiology"})
    assert said(found) == qa("Fever?", "Drink.") and counts.used == 1
    assert [one["key"] for one in counts.unused()] == ["label"]


@pytest.mark.parametrize("name", ["weight", "train", "loss", "loss_weight"])
def test_weights_of_turns(name, tmp_path):
    turns = [FEVER[0], {**FEVER[1], name: 0}, {"role": "user", "content": "Sure?"}, {**FEVER[1], name: 0.5}]
    (found,), counts = sft(tmp_path, {"messages": turns})
    assert [one.get("weight", 1) for one in found.messages] == [1, 0, 1, 0.5]
    assert not counts.unused()


def test_answers_that_are_all_context_are_skipped(tmp_path):
    found, counts = sft(tmp_path, {"messages": [FEVER[0], {**FEVER[1], "train": False}]}, {"messages": FEVER})
    assert len(found) == 1 and counts.skipped == {"all its answers have weight 0": 1}
    (found,), _ = sft(tmp_path, {"question": "Fever?", "answer": "Drink.", "weight": "0.25"})
    assert found.messages[1]["weight"] == 0.25  # of a table, for the whole record


@pytest.mark.parametrize(
    "extra",
    [
        {"images": ["a.png"]},
        {"audios": ["a.wav"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, FEVER[1]]},
    ],
)
def test_media_are_no_text(extra, tmp_path):
    found, counts = sft(tmp_path, {"messages": FEVER, **extra}, {"messages": FEVER})
    assert len(found) == 1
    ((reason, number),) = counts.skipped.items()
    assert number == 1 and "cannot take in" in reason


def test_null_answers_are_counted(tmp_path):
    rows = [
        {"instruction": "a", "output": None},
        {"messages": [FEVER[0], {"role": "assistant", "content": None}]},
    ]
    found, counts = sft(tmp_path, *rows, {"messages": FEVER})
    assert len(found) == 1 and counts.skipped == {"an empty answer": 2}


def test_all_wrong_records_are_kept_and_the_first_is_named(tmp_path):
    rows = [
        {"question": str(n), "answer": n} if n % 2 else {"question": str(n), "answer": "x"} for n in range(60)
    ]
    counts = Counts()
    with pytest.raises(DataError, match=r"a\.jsonl:2: answer is a number, not text \(and 29 more\)"):
        load_conversations([str(write_jsonl(tmp_path / "a.jsonl", rows))], counts, Observer())
    assert counts.wrong_total == 30 and len(counts.wrong) == 20
    assert "a.jsonl:40:" in counts.wrong[-1].message


# -- tools --------------------------------------------------------------------------------------------------

CALL = {"name": "dose", "arguments": {"kg": 40}}
TOOL = {"name": "dose", "description": "", "parameters": {}}


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "Dose?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "dose", "arguments": '{"kg": 40}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "400 mg"},
                {"role": "assistant", "content": "400 mg."},
            ],
            "tools": [{"type": "function", "function": {"name": "dose"}}],
        },
        {
            "conversations": [
                {"from": "human", "value": "Dose?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "400 mg"},
                {"from": "gpt", "value": "400 mg."},
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                {"role": "user", "content": "Dose?"},
                {
                    "role": "assistant",
                    "content": "",
                    "function_call": {"name": "dose", "arguments": '{"kg": 40}'},
                },
                {"role": "function", "name": "dose", "content": "400 mg"},
                {"role": "assistant", "content": "400 mg."},
            ],
            "functions": [TOOL],
        },
    ],
    ids=["openai", "sharegpt", "older openai"],
)
def test_tools_and_calls(row, tmp_path):
    (found,), counts = sft(tmp_path, row)
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool", "assistant"]
    (call,) = found.messages[1]["tool_calls"]
    assert {key: call[key] for key in CALL} == CALL and found.messages[1]["content"] == ""
    assert found.tools == (TOOL,) and not counts.unused()


def test_results_of_parallel_calls_stay_apart(tmp_path):
    turns = [
        {"role": "user", "content": "Doses?"},
        {"role": "assistant", "tool_calls": [CALL, {**CALL, "arguments": {"kg": 50}}]},
        {"role": "tool", "content": "400"},
        {"role": "tool", "content": "500"},
        {"role": "assistant", "content": "400 and 500."},
    ]
    (found,), _ = sft(tmp_path, {"messages": turns})
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool", "tool", "assistant"]


@pytest.mark.parametrize(
    "call",
    ["dose(40)", [1], {"arguments": {}}, {"name": "a", "arguments": "[1]"}, {"name": "a", "arguments": "{"}],
)
def test_a_call_that_is_none(call, tmp_path):
    value = call if isinstance(call, str) else json.dumps(call)
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": value},
        {"from": "gpt", "value": "b"},
    ]
    with pytest.raises(DataError, match="turn 2"):
        sft(tmp_path, {"conversations": turns})


# -- reasoning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "Fever?", "Complex_CoT": "Hm.", "Response": "Drink."},
        {"question": "Fever?", "answer": "<think>\nHm.\n</think>\n\nDrink."},
        {"question": "Fever?", "answer": "<think>Hm.</think>Drink."},
        {"messages": [FEVER[0], {**FEVER[1], "reasoning_content": "Hm."}]},
        {"messages": [FEVER[0], {**FEVER[1], "reasoning": "Hm."}]},
        {
            "messages": [
                FEVER[0],
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Drink."}],
                },
            ]
        },
    ],
)
def test_reasoning_stands_apart(row, tmp_path):
    (found,), counts = sft(tmp_path, row)
    assert found.messages[1] == {"role": "assistant", "content": "Drink.", "reasoning": "Hm."}
    assert not counts.unused()


# -- comparisons --------------------------------------------------------------------------------------------

ULTRA = {
    "prompt": "Fever?",
    "prompt_id": "x",
    "chosen": FEVER,
    "rejected": [FEVER[0], {"role": "assistant", "content": "No."}],
    "messages": FEVER,
    "score_chosen": 8.0,
    "score_rejected": 5.0,
}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (ULTRA, [("user", "Fever?")]),
        (
            {
                "chosen": "\n\nHuman: Fever?\n\nAssistant: Drink.",
                "rejected": "\n\nHuman: Fever?\n\nAssistant: No.",
            },
            [("user", "Fever?")],
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Fever?\n\nAssistant: Drink.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Fever?\n\nAssistant: No.",
            },
            [*qa("Hi", "Yes?"), ("user", "Fever?")],
        ),
        (
            {
                "system": "S",
                "history": [["Hi", "Yes?"]],
                "question": "Fever?",
                "response_chosen": "Drink.",
                "response_rejected": "No.",
            },
            [("system", "S"), *qa("Hi", "Yes?"), ("user", "Fever?")],
        ),
        (
            {"instruction": "Answer.", "input": "Fever?", "chosen": "Drink.", "rejected": "No."},
            [("user", "Answer.\nFever?")],
        ),
        ({"问题": "Fever?", "好的回答": "Drink.", "差的回答": "No."}, [("user", "Fever?")]),
        ({"prompt": "Fever?", "responses": ["No.", "Drink."], "scores": [1, 7]}, [("user", "Fever?")]),
        ({"prompt": "Fever?", "responses": ["No.", "Drink."], "ranks": [2, 1]}, [("user", "Fever?")]),
        ({"prompt": "Fever?", "ranked": ["Drink.", "No."]}, [("user", "Fever?")]),
        (
            {
                "instruction": "Fever?",
                "completions": [
                    {"response": "No.", "overall_score": 2},
                    {"response": "Drink.", "overall_score": 9},
                ],
            },
            [("user", "Fever?")],
        ),
    ],
)
def test_comparisons(row, prompt, tmp_path):
    (found,), _ = pairs(tmp_path, row)
    assert (said(found), found.chosen, found.rejected) == (prompt, "Drink.", "No.")
    (learnt,), _ = sft(tmp_path, row)
    assert said(learnt) == [*prompt, ("assistant", "Drink.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Fever?", "chosen": "<think>Hm.</think>Drink.", "rejected": "No."},
        {"prompt": "Fever?", "responses": ["No.", "<think>Hm.</think>Drink."], "scores": [1, 2]},
        {**ULTRA, "messages": None, "chosen": [FEVER[0], {**FEVER[1], "reasoning_content": "Hm."}]},
    ],
)
def test_answers_are_compared_without_their_reasoning(row, tmp_path):
    (found,), counts = pairs(tmp_path, {key: value for key, value in row.items() if value is not None})
    assert (found.chosen, found.rejected) == ("Drink.", "No.")
    assert counts.merged == {"reasoning in front of a compared answer is left out": 1}


def test_a_ranking_is_a_pair_for_each_two_answers_of_different_rank(tmp_path):
    row = {"prompt": "Fever?", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 3, 2]}
    found, counts = pairs(tmp_path, row)
    assert {(one.chosen, one.rejected) for one in found} == {
        ("b", "d"),
        ("c", "d"),
        ("b", "a"),
        ("c", "a"),
        ("d", "a"),
    }
    assert counts.used == 1 and counts.merged == {"a ranking of several answers, as pairs": 1}


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({**ULTRA, "messages": [{"role": "user", "content": "Cough?"}, FEVER[1]]}, "messages is neither"),
        ({**ULTRA, "prompt": "Cough?"}, "prompt"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "different prompts",
        ),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "no score or rank each"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, None]}, "no score or rank each"),
        ({"prompt": "a", "ranked": ["b"]}, "at least two"),
    ],
)
def test_comparisons_that_contradict_themselves(row, word, tmp_path):
    with pytest.raises(DataError, match=word):
        pairs(tmp_path, row)


# -- multiple choice ----------------------------------------------------------------------------------------

ORGANS = {"A": "Skin", "B": "Heart", "C": "Liver"}
LISTED = "Which pumps?\nA. Skin\nB. Heart\nC. Liver"


@pytest.mark.parametrize(
    "row",
    [
        {"option": ORGANS, "answer": "B", "exam_type": "x"},  # CMB
        {"options": ORGANS, "answer": "Heart", "answer_idx": "B", "meta_info": "step1"},  # MedQA
        {"options": ORGANS, "answer": ["B"]},
        {"options": ORGANS, "answer": " b "},
        {"options": ORGANS, "answer": "heart"},
        {"options": ORGANS, "answer": "B. Heart"},
        {"choices": ["Skin", "Heart", "Liver"], "answer": 1},  # MMLU
        {"choices": {"text": ["Skin", "Heart", "Liver"], "label": ["A", "B", "C"]}, "answer": "B"},  # ARC
        {"Options": "A Skin\nB Heart\nC Liver", "Answer": "B"},  # CMExam
        {
            "options": [
                {"key": "A", "value": "Skin"},
                {"key": "B", "value": "Heart"},
                {"key": "C", "value": "Liver"},
            ],
            "answer": "B",
        },
        {"options": json.dumps(ORGANS), "answer": "Ｂ"},
    ],
)
def test_exams(row, tmp_path):
    row = {"question": "Which pumps?", **row}
    (found,), _ = sft(tmp_path, row)
    assert said(found) == [("user", LISTED), ("assistant", "B. Heart")]
    path = str(write_jsonl(tmp_path / "a.jsonl", [row]))
    (prompt,) = load_rl_prompts([path], Counts(), Observer())
    assert said(prompt) == [("user", LISTED)] and prompt.key == ("B",) and prompt.options == ORGANS
    (asked,) = load_prompts([path], Counts(), Observer())
    assert said(asked) == [("user", LISTED)]


def test_prompts_say_that_answers_are_left_out(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"question": "Fever?", "answer": "Drink."}]))
    for read in (load_prompts, load_rl_prompts):
        counts = Counts()
        read([path], counts, Observer())
        assert counts.merged == {"what stands behind the last question is not shown to the model": 1}
    exam = str(write_jsonl(tmp_path / "b.jsonl", [{"question": "a", "options": ORGANS, "answer": "B"}]))
    counts = Counts()
    load_rl_prompts([exam], counts, Observer())
    assert not counts.merged  # the key is what the rules go by


def test_several_right_options(tmp_path):
    (found,), _ = sft(tmp_path, {"question": "Which?", "options": ORGANS, "answer": "AC"})
    assert found.messages[-1]["content"] == "A, C: Skin; Liver"
    assert stated_options(found.messages[-1]["content"], "ABC") == ("A", "C")


@pytest.mark.parametrize(("numbers", "expected"), [((0, 1), ("A", "B")), ((1, 3), ("A", "C"))])
def test_numbers_of_medmcqa_count_from_where_the_file_shows(numbers, expected, tmp_path):
    options = {"opa": "Skin", "opb": "Heart", "opc": "Liver"}
    rows = [{"question": f"{n}?", **options, "cop": n, "exp": "Because."} for n in numbers]
    found, _ = sft(tmp_path, *rows)
    assert [one.messages[1]["content"] for one in found] == [
        f"{one}. {ORGANS[one]}\nBecause." for one in expected
    ]


def test_numbers_that_could_count_from_either_are_refused(tmp_path):
    with pytest.raises(DataError, match="0 or 1"):
        sft(tmp_path, {"question": "a", "opa": "x", "opb": "y", "opc": "z", "cop": 1})


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"options": ORGANS, "answer": "E"}, "not among"),
        ({"options": ORGANS, "answer": "A", "answer_idx": "B"}, "different options"),
        ({"options": {"A": "Heart", "B": "Heart"}, "answer": "Heart"}, "several options"),
        ({"options": "Skin, Heart", "answer": "A"}, "a line for each"),
        ({"options": ORGANS, "answer": True}, "a truth value"),
    ],
)
def test_exams_that_contradict_themselves(row, word, tmp_path):
    with pytest.raises(DataError, match=word):
        sft(tmp_path, {"question": "Which pumps?", **row})


# -- nothing is ignored -------------------------------------------------------------------------------------

GOOD: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, *FEVER]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "c", "output": "b", "history": [["d", "e"]], "system": "s"},
    {"question": "a", "answer": "b"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, FEVER[1]]},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "c"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    {"question": "a", "options": ORGANS, "answer": "B"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]
KEYS = [
    "x",
    "note",
    "label",
    "weight",
    "name",
    "source",
    "文",
    "history",
    "context",
    "images",
    "system",
    "tools",
]
KEYS += [
    "reasoning_content",
    "answer",
    "response",
    "options",
    "query",
    "content",
    "role",
    "text",
    "id",
    "kto_tag",
]
VALUES: list[Any] = [None, "", "word", 0, 1, True, False, [], {}, ["word"], [["q", "a"]], {"a": 1}, 0.5]


def objects(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where the objects of a record are whose keys are medgpt's to read: not the arguments and schemas of tools."""
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            if key not in ("arguments", "parameters", "options"):
                yield from objects(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from objects(inner, (*path, place))


_known: dict[tuple[Any, str], str] = {}


def outcome(read: Any, rows: list[Any], path: Path) -> str:
    text = json.dumps(rows)
    if (read, text) not in _known:
        write_jsonl(path, rows)
        counts = Counts()
        try:
            found = read([str(path)], counts, Observer())
        except MedgptError as problem:
            return f"error {problem.message}"
        about = counts.as_dict()
        shown = [about[name] for name in ("keys", "unused", "skipped")]
        _known[read, text] = repr(
            [[(one.messages, one.id, getattr(one, "tools", None)) for one in found], shown]
        )
    return _known[read, text]


def mutated(record: Any, place: tuple, key: str, value: Any) -> Any:
    """`record` with an extra key in one of its objects; None where the key stands there already."""
    changed = copy.deepcopy(record)
    inner = changed
    for step in place:
        inner = inner[step]
    if key in inner:
        return None
    inner[key] = value
    return changed


def stays_silent(record: Any, changed: Any, path: Path) -> bool:
    """Whether an extra key changes neither the messages nor a count that is shown nor the exit code."""
    return any(
        outcome(read, [changed], path) == outcome(read, [record], path)
        for read in [load_conversations, *([load_pairs] if "rejected" in record else [])]
    )


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_an_extra_key_anywhere_changes_something(tmp_path_factory, data):
    record = data.draw(st.sampled_from(GOOD))
    place = data.draw(st.sampled_from(list(objects(record))))
    key = data.draw(st.sampled_from(KEYS) | st.text("abcdefgh_", min_size=1, max_size=9))
    changed = mutated(record, place, key, data.draw(st.sampled_from(VALUES)))
    path = tmp_path_factory.getbasetemp() / "extra.jsonl"
    assert changed is None or not stays_silent(record, changed, path), changed


@pytest.mark.slow
def test_every_known_key_in_every_object_of_every_format(tmp_path, capsys):
    """Each key that medgpt knows and some that it does not, with values of several kinds, everywhere."""
    keys = sorted({*KEYS, *(spelling for some in SPELLINGS.values() for spelling in some), *NO_MEANING})
    count = 0
    for record in GOOD:
        for place in objects(record):
            for key, value in itertools.product(keys, (None, "word", 0, True)):
                changed = mutated(record, place, key, value)
                if changed is not None:
                    count += 1
                    assert not stays_silent(record, changed, tmp_path / "a.jsonl"), (
                        record,
                        place,
                        key,
                        value,
                    )
    with capsys.disabled():
        print(f"\n{count:,} records with an extra key, none silent")


def test_strict_and_ignore(tmp_path):
    row = {"question": "a", "answer": "b", "ward": 7, "source": "x"}
    with pytest.raises(
        DataError, match=r"--strict: nothing is made of source \(1 records\), ward \(1 records\)"
    ):
        sft(tmp_path, row, strict=True)
    with pytest.raises(DataError, match=r"nothing is made of source"):
        sft(tmp_path, row, strict=True, ignore=frozenset({"ward"}))
    _, counts = sft(tmp_path, row, strict=True, ignore=frozenset({"ward", "source"}))
    assert all(one["accepted"] for one in counts.unused())
    (found,), _ = sft(tmp_path, {**row, "answer": "b", "response": "c"}, ignore=frozenset({"Response"}))
    assert said(found) == qa("a", "b")


def test_a_key_that_could_be_a_patient_is_not_named(tmp_path):
    rows = [{"question": str(n), "answer": "b"} for n in range(40)]
    rows[7] |= {"Zorblatt": "x", "Zorblatt of ward 7": "y"}
    _, counts = sft(tmp_path, *rows)
    assert [(one["key"], one["records"]) for one in counts.unused()] == [("other keys", 2)]
    assert "Zorblatt" not in json.dumps(counts.as_dict())


def test_keys_beside_plain_text_are_named(tmp_path):
    counts = Counts()
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Fever.", "patient": 7, "meta": {"a": 1}}])
    assert [one.text for one in iterate_texts([str(path)], counts, Observer())] == ["Fever."]
    assert [(one["key"], one["meaning"]) for one in counts.unused()] == [
        ("meta", "says nothing to be learnt"),
        ("patient", "not known"),
    ]
