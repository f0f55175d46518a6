"""Preference pairs: every format, every bad file, the audit by hand, what is held out, and both answers as tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_answer
from medicalgpt_cli.engine.data.formats import load_conversations
from medicalgpt_cli.engine.data.preferences import Pair, audit, audit_notices, load_pairs, prompt_hash
from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.reward_data import RewardData, load_reward_data, render_pair
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings.stages import RewardSettings
from tests.engine.data.test_bad_input import BAD, cases, check_message
from tests.tiny import tiny_tokenizer, write_jsonl


def load(path: Path, **options) -> tuple[list[Pair], Counts]:
    counts = Counts()
    return load_pairs([str(path)], counts, Observer(), **options), counts


def turns(*said: str) -> list[dict[str, str]]:
    """user, assistant, user, … in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]


def pair(prompt: list[dict[str, str]] | str, chosen: str, rejected: str, at: str = "x:1") -> Pair:
    messages = turns(prompt) if isinstance(prompt, str) else prompt
    return Pair(tuple(messages), chosen, rejected, None, at, "x", None)


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = {"chosen": "Drink water.", "rejected": "No idea."}
FORMATS = {
    "sharegpt": ({"conversations": [{"from": "human", "value": "Fever?"}]}, turns("Fever?")),
    "sharegpt, singular key": ({"conversation": [{"from": "human", "value": "Fever?"}]}, turns("Fever?")),
    "sharegpt, several turns": (
        {
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hello, what is it?"},
                {"from": "human", "value": "Fever?"},
            ]
        },
        turns("Hello", "Hello, what is it?", "Fever?"),
    ),
    "sharegpt, system key": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Fever?"}]},
        [SYSTEM, *turns("Fever?")],
    ),
    "messages": ({"messages": turns("Fever?")}, turns("Fever?")),
    "messages, system turn": ({"messages": [SYSTEM, *turns("Fever?")]}, [SYSTEM, *turns("Fever?")]),
    "prompt": ({"prompt": "Fever?"}, turns("Fever?")),
    "prompt and system": ({"prompt": "Fever?", "system": "Be brief."}, [SYSTEM, *turns("Fever?")]),
    "question": ({"question": "Fever?"}, turns("Fever?")),
    "instruction": ({"instruction": "Fever?"}, turns("Fever?")),
    "instruction and input": ({"instruction": "Advise.", "input": "Fever"}, turns("Advise.\nFever")),
    "instruction, empty input": ({"instruction": "Fever?", "input": ""}, turns("Fever?")),
    "instruction and history": (
        {"instruction": "Fever?", "history": [["Hello", "Hello, what is it?"]]},
        turns("Hello", "Hello, what is it?", "Fever?"),
    ),
}


@pytest.mark.parametrize("keys", [("chosen", "rejected"), ("response_chosen", "response_rejected")])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, keys: tuple[str, str], tmp_path: Path) -> None:
    row, expected = FORMATS[name]
    answers = dict(zip(keys, ANSWERS.values(), strict=True))
    (found,), counts = load(write_jsonl(tmp_path / "a.jsonl", [{"id": 7, **row, **answers}]))
    assert list(found.messages) == expected
    assert (found.chosen, found.rejected, found.id) == ("Drink water.", "No idea.", "7")
    assert found.at == f"{tmp_path / 'a.jsonl'}:1" and found.source == str(tmp_path / "a.jsonl")
    assert found.margin is None
    assert counts.formats == {str(tmp_path / "a.jsonl"): "preference"}
    assert counts.used == 1


def answered(prompt: list[dict[str, str]], texts: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Both answers as lists of messages behind the prompt."""
    return {
        name: [*prompt, {"role": "assistant", "content": text}]
        for name, text in zip(("chosen", "rejected"), texts.values(), strict=True)
    }


@pytest.mark.parametrize(
    "row",
    [
        answered(turns("Fever?"), ANSWERS),  # the prompt stands in front of both answers only
        {"prompt": "Fever?", **answered(turns("Fever?"), ANSWERS)},
        {"prompt": turns("Fever?"), **answered([], ANSWERS)},
        {
            "conversations": [{"from": "human", "value": "Fever?"}],
            "chosen": {"from": "gpt", "value": "Drink water."},
            "rejected": {"from": "gpt", "value": "No idea."},
        },
    ],
    ids=["prompt within", "prompt twice", "prompt as messages", "one message"],
)
def test_answers_as_messages(row, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    (found,), _ = load(file)
    assert list(found.messages) == turns("Fever?")
    assert (found.chosen, found.rejected) == ("Drink water.", "No idea.")
    (conversation,) = load_conversations([str(file)], Counts(), Observer())
    assert list(conversation.messages) == turns("Fever?", "Drink water.")


def test_two_turns_of_one_role_are_joined_as_for_sft(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "I am ill."}, {"from": "human", "value": "Fever?"}]
    (found,), counts = load(write_jsonl(tmp_path / "a.jsonl", [{"conversations": said, **ANSWERS}]))
    assert list(found.messages) == turns("I am ill.\nFever?")
    assert counts.merged == {"two user turns in a row joined": 1}


def test_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,chosen,rejected,gap\nFever?,Drink water.,No idea.,1.5\n")
    (found,), _ = load(tmp_path / "a.csv", margin_column="gap")
    assert (found.chosen, found.rejected, found.margin) == ("Drink water.", "No idea.", 1.5)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt": "Fever?", "chosen": "Drink."}, "without rejected"),
        ({"prompt": "Fever?", "rejected": "Drink."}, "without chosen"),
        ({"prompt": "Fever?", "response_rejected": "Drink."}, "without chosen"),
        ({"prompt": "Fever?", "answer": "Drink."}, "no preference pair"),
        ({**ANSWERS}, "without a question"),
        ({"messages": turns("Fever?", "Drink."), **ANSWERS}, "ends with an answer"),
        ({"prompt": 7, **ANSWERS}, "prompt is a number"),
        ({"prompt": "Fever?", "chosen": 7, "rejected": "x"}, "chosen is a number, not text"),
        ({"prompt": "Fever?", **answered(turns("Cough?"), ANSWERS)}, "have different prompts"),
        ({"prompt": "Fever?", "chosen": turns("Fever?"), "rejected": "x"}, "does not end with an answer"),
        ({"prompt": "Fever?", "chosen": [], "rejected": "x"}, "chosen is a list, not text"),
        ({"messages": [{"role": "nurse", "content": "Fever?"}], **ANSWERS}, "unknown role"),
    ],
)
def test_a_row_that_contradicts_its_format_is_named(row, word: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Cough?", **ANSWERS}, row])
    with pytest.raises(DataError) as problem:
        load(file)
    assert problem.value.message.startswith(f"{file}:2: ") and word in problem.value.message
    assert problem.value.hint


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Fever?", "chosen": "", "rejected": "x"}, "an empty answer"),
        ({"prompt": "Fever?", "chosen": "x", "rejected": None}, "an empty answer"),
        ({"prompt": "Fever?", "chosen": "x", "rejected": " x\n"}, "both answers are the same"),
        ({"prompt": " ", **ANSWERS}, "no question"),
        ({"messages": [SYSTEM], **ANSWERS}, "no question"),
    ],
)
def test_a_row_without_a_lesson_is_counted(row, reason: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Cough?", **ANSWERS}, row])
    found, counts = load(file)
    assert len(found) == 1
    assert counts.skipped == {reason: 1}
    assert counts.places[reason] == [f"{file}:2"]
    with pytest.raises(DataError, match="no pair to learn from"):
        load(write_jsonl(tmp_path / "b.jsonl", [row]))


@pytest.mark.parametrize("case", cases("reward"))
def test_bad_files(case) -> None:
    """What EXPECTED.json says about each file of stage reward."""
    counts = Counts()
    allowed = case["expect"]
    place = f"{BAD / case['file']}:{case['line']}"
    try:
        found = load_pairs([str(BAD / case["file"])], counts, Observer())
    except DataError as problem:
        assert "reject" in allowed, problem.message
        skipped = [place for reason in counts.skipped for place in counts.places[reason]]
        check_message(problem, case["file"], None if place in skipped else case["line"])
        assert counts.read - 1 - len(skipped) >= case["good_records"]  # the ones in front of it were read
        return
    assert allowed != "reject"
    assert len(found) == case["good_records"]
    if "skip" in allowed:
        assert place in [place for reason in counts.skipped for place in counts.places[reason]]
    if "warning" in allowed:
        assert audit(found)["contradicting"] == 1
        assert any("contradict" in line for line in audit_notices(audit(found)))


# -- margins -----------------------------------------------------------------------------------------------


def test_margins_are_read_from_their_column(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}?", **ANSWERS, "gap": gap} for n, gap in enumerate([0, 2, 0.5])]
    found, _ = load(write_jsonl(tmp_path / "a.jsonl", rows), margin_column="gap")
    assert [one.margin for one in found] == [0.0, 2.0, 0.5]
    found, _ = load(tmp_path / "a.jsonl")
    assert [one.margin for one in found] == [None, None, None]


@pytest.mark.parametrize("gap", [-0.1, True, None, "much", [1], "nan", "inf"])
def test_a_margin_that_is_none_is_refused(gap, tmp_path: Path) -> None:
    rows = [{"prompt": "Q?", **ANSWERS, "gap": 1}, {"prompt": "Q?", **ANSWERS, "gap": gap}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as problem:
        load(file, margin_column="gap")
    assert problem.value.message.startswith(f"{file}:2: gap is no number")
    with pytest.raises(DataError, match="other is no number"):
        load(file, margin_column="other")


# -- audit -------------------------------------------------------------------------------------------------


def test_audit_by_hand() -> None:
    pairs = [
        pair("Q1", "long answer", "short"),  # 11 against 5
        pair("Q1", "long answer", "short"),  # a repetition
        pair("Q1", "short", "long answer"),  # contradicts both
        pair("Q2", "abc", "xyz"),  # equally long: says nothing about length
        pair("Q2", "a", "bb"),
        pair("Q3", "long answer", "short"),  # another prompt: neither repeats nor contradicts
    ]
    found = audit(pairs)
    assert found == {
        "pairs": 6,
        "prompts": 3,
        "repeated": 1,
        "contradicting": 1,
        "longer_chosen": 3 / 5,
        "mean_characters_chosen": (11 + 11 + 5 + 3 + 1 + 11) / 6,
        "mean_characters_rejected": (5 + 5 + 11 + 3 + 2 + 5) / 6,
    }
    lines = audit_notices(found)
    assert lines[0] == "6 pairs over 3 prompts"
    assert any("60 %" in line for line in lines)
    assert audit([pair("Q", "abc", "xyz")])["longer_chosen"] is None
    assert len(audit_notices(audit([pair("Q", "abc", "xyz")]))) == 1


def test_the_name_of_a_prompt() -> None:
    one = prompt_hash(turns("Fever and  cough?"))
    assert prompt_hash(turns(" Fever\nand cough?")) == one  # spacing
    assert prompt_hash([SYSTEM, *turns("Fever and cough?")]) == one
    assert prompt_hash(turns("Fever and cough!")) != one
    assert prompt_hash(turns("Fever and cough?", "Since when?", "Today")) != one
    assert prompt_hash(turns("a", "b", "c")) != prompt_hash(turns("a b c"))
    assert len(one) == 24 and set(one) <= set("0123456789abcdef")


# -- both answers as tokens --------------------------------------------------------------------------------


def test_an_answer_is_rendered_as_it_is_generated() -> None:
    tokenizer = tiny_tokenizer("chatml")
    prompt, answer = render_answer(tokenizer, turns("Fever?"), "Drink <|im_end|> water.", 500)
    assert prompt == encode_prompt(tokenizer, turns("Fever?"))
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in answer[:-1]  # its spelling in the text is plain text
    assert tokenizer.decode(answer[:-1]) == "Drink <|im_end|> water."


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "gemma"])
def test_the_whole_answer_behind_as_much_history_as_fits(style: str) -> None:
    tokenizer = tiny_tokenizer(style)
    said = turns("Cough? " * 9, "Since when? " * 9, "Days. " * 9, "Rest. " * 9, "Fever?")
    answer = "Drink water and rest. " * 3
    whole = render_answer(tokenizer, said, answer, 10_000)
    length = len(whole[0]) + len(whole[1])
    assert render_answer(tokenizer, said, answer, length) == whole
    shorter = render_answer(tokenizer, said, answer, length - 1)
    assert shorter[0] == encode_prompt(tokenizer, said[2:])  # the oldest exchange is gone
    assert shorter[1] == whole[1]
    last = encode_prompt(tokenizer, said[4:])
    assert render_answer(tokenizer, said, answer, len(last) + len(whole[1])) == (last, whole[1])
    assert render_answer(tokenizer, said, answer, len(last) + len(whole[1]) - 1) is None


def test_the_system_message_stays_when_exchanges_are_dropped() -> None:
    tokenizer = tiny_tokenizer("chatml")
    said = [SYSTEM, *turns("Cough? " * 20, "Rest.", "Fever?")]
    expected = encode_prompt(tokenizer, [SYSTEM, *turns("Fever?")])
    assert render_answer(tokenizer, said, "Drink.", len(expected) + 10)[0] == expected


@given(st.integers(1, 30), st.integers(1, 30), st.integers(30, 160))
def test_both_answers_stand_behind_the_same_prompt(one: int, other: int, budget: int) -> None:
    tokenizer = tiny_tokenizer("chatml")
    said = turns("Cough? " * 3, "Rest. " * 3, "Fever? " * 3, "Drink. " * 3, "More?")
    counts = Counts()
    found = render_pair(tokenizer, pair(said, "yes " * one, "no " * other), budget, counts)
    prompts = [encode_prompt(tokenizer, said[start:]) for start in (0, 2, 4)]
    targets = [render_answer(tokenizer, said, text, 10_000)[1] for text in ("yes " * one, "no " * other)]
    fitting = [prompt for prompt in prompts if len(prompt) + max(map(len, targets)) <= budget]
    if not fitting:
        assert found is None and counts.skipped == {"longer than --max-length": 1}
        return
    assert found.chosen == fitting[0] + targets[0]
    assert found.rejected == fitting[0] + targets[1]
    assert found.shared == len(fitting[0])
    assert found.longer_chosen is (None if 4 * one == 3 * other else 4 * one > 3 * other)
    dropped = len(prompts[0]) - len(fitting[0])
    assert counts.tokens_cut == dropped
    assert counts.truncated == ({"oldest exchanges dropped to fit --max-length": 1} if dropped else Counter())


def test_answers_that_a_template_makes_equal_teach_nothing() -> None:
    """Of an answer, the template keeps what stands behind its reasoning."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('||')[-1] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = template
    counts = Counts()
    assert render_pair(tokenizer, pair("Q?", "one||yes", "two||yes"), 500, counts) is None
    assert counts.skipped == {"both answers are the same behind the chat template": 1}


def test_a_prompt_that_the_template_refuses_is_counted() -> None:
    counts = Counts()
    greeted = [{"role": "assistant", "content": "Hello."}, *turns("Fever?")]
    assert render_pair(tiny_tokenizer("mistral"), pair(greeted, "yes", "no"), 500, counts) is None
    assert counts.skipped == {"the chat template refuses the roles assistant, user": 1}
    with pytest.raises(UsageError, match="no chat template"):
        render_pair(tiny_tokenizer("none"), pair("Fever?", "yes", "no"), 500, counts)


# -- what is held out --------------------------------------------------------------------------------------


def reward_data(**settings) -> RewardData:
    return load_reward_data(RewardSettings(**settings), tiny_tokenizer("chatml"), Observer())


def test_no_prompt_stands_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n % 20}?" + " " * (n % 3), "chosen": f"yes {n}", "rejected": f"no {n}"}
        for n in range(80)
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    data = reward_data(train_data=(str(file),), eval_fraction=0.25)
    tokenizer = tiny_tokenizer("chatml")

    def questions(pairs) -> set[str]:
        texts = [tokenizer.decode(one.chosen) for one in pairs]
        return {text.split("Question ")[1].split("?")[0] for text in texts}

    assert len(questions(data.held_out)) == 5 and len(questions(data.training)) == 15
    assert not questions(data.held_out) & questions(data.training)
    assert len(data.held_out) == 20 and len(data.training) == 60
    assert data.report["training"]["read"] == data.report["training"]["used"] == 60
    assert sorted(data.prompts) == sorted(
        {prompt_hash(turns(f"Question {n}?")) for n in map(int, questions(data.training))}
    )
    turned = write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    again = reward_data(train_data=(str(turned),), eval_fraction=0.25)
    assert questions(again.held_out) == questions(data.held_out)  # whatever the order of the file


def test_a_greeting_in_front_does_not_make_all_prompts_one(tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "Hello, what is it?"}
    rows = [{"messages": [greeting, *turns(f"Question {n}?")], **ANSWERS} for n in range(10)]
    data = reward_data(train_data=(str(write_jsonl(tmp_path / "a.jsonl", rows)),), eval_fraction=0.2)
    assert (len(data.training), len(data.held_out)) == (8, 2)


def test_held_out_files_and_excluded_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", **ANSWERS} for n in range(10)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    held = write_jsonl(tmp_path / "held.jsonl", [rows[0], rows[1]])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Question  2?"}, {"question": "Other?"}])
    data = reward_data(train_data=(str(train),), eval_data=(str(held),), exclude_prompts=(str(prompts),))
    assert (len(data.training), len(data.held_out)) == (7, 2)
    assert data.report["training"]["skipped"] == {
        "its question stands in the held-out data": 2,
        "its prompt stands in --exclude-prompts": 1,
    }
    assert set(data.prompts) == {prompt_hash(turns(f"Question {n}?")) for n in range(3, 10)}
    everything = write_jsonl(tmp_path / "all.jsonl", [{"prompt": row["prompt"]} for row in rows])
    with pytest.raises(DataError, match="no pair is left"):
        reward_data(train_data=(str(train),), eval_fraction=0, exclude_prompts=(str(everything),))


def test_the_fingerprint_changes_with_what_is_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", **ANSWERS, "gap": 1} for n in range(6)]

    def fingerprint(rows, **settings) -> str:
        file = write_jsonl(tmp_path / "a.jsonl", rows)
        return reward_data(train_data=(str(file),), eval_fraction=0, **settings).fingerprints["training"]

    one = fingerprint(rows)
    assert fingerprint(json.loads(json.dumps(rows))) == one
    swapped = [{**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}, *rows[1:]]
    assert fingerprint(swapped) != one
    assert fingerprint(rows, margin_column="gap") != one
