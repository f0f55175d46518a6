"""Answers read as they grow: reasoning, text and calls apart, whatever token ends where."""

from __future__ import annotations

import pytest

from medicalgpt_cli.engine.data.prompts import Prompt
from medicalgpt_cli.engine.evaluation.samples import answer_questions
from medicalgpt_cli.engine.generation.answer_reader import EncodedPrompt, content_of
from medicalgpt_cli.engine.generation.decoding import Row, Sampler, answer_of
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.generation.wire import as_text, conversation_to_wire, with_call_ids
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.rewards.sources import model_reward, rule_rewards
from medicalgpt_cli.engine.training.ppo.rollout import Asked, draw
from medicalgpt_cli.settings.groups import SamplingSettings
from medicalgpt_cli.settings.stages import RlSettings
from tests.engine.data.tool_templates import TEMPLATES, tokenizer_of
from tests.talker import ANSWER, CALL, LEARNT, PLAIN, QUESTION, RESULT, THOUGHT, TOOLS, talker

CALLED = CALL["tool_calls"][0]


def row(tokenizer, text: str, *, stops=(), tools=TOOLS, raw=False) -> Row:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampler = Sampler(SamplingSettings(stop=stops))
    return Row(0, [1], 999, sampler, None, said=ids, asked=EncodedPrompt([1], tools, raw=raw))


def as_it_grows(tokenizer, whole: Row) -> tuple[list, bool]:
    """The deltas of a row whose tokens come one by one, and whether a stop text ended it."""
    grown = row(tokenizer, "", stops=whole.sampler.stop, tools=whole.asked.tools, raw=whole.asked.raw)
    deltas = []
    for token in whole.said:
        grown.said.append(token)
        reader = grown.reader(tokenizer)
        reader.read(grown.said)
        deltas += reader.take()
        if reader.stopped:
            return deltas, True
    answer_of(tokenizer, grown, "stop")
    return deltas + grown.reader(tokenizer).take(), False


SAID = "<think>\nWhy? a\n\nb\n</think>\n\nRest. \n\n Drink 中文 🙂!\n"
WITH_CALL = (
    '<think>\nx\n</think>\n\nI look.\n<tool_call>\n{"name": "dose", "arguments": {"kg": 40}}\n</tool_call>'
)


@pytest.mark.parametrize("stops", [(), ("!",), ("\n",), ("\n\n",), ("nk 中",), ("zzz", "Res")])
@pytest.mark.parametrize("text", [SAID, WITH_CALL, "plain, no thoughts \n"])
def test_token_by_token_is_the_same_as_at_once(text, stops):
    tokenizer = tokenizer_of("qwen3")
    whole = answer_of(tokenizer, row(tokenizer, text, stops=stops), "stop")
    deltas, stopped = as_it_grows(tokenizer, row(tokenizer, text, stops=stops))
    assert content_of(deltas) == whole.text and not any(stop in whole.text for stop in stops)
    assert "".join(one.text for one in deltas if one.kind == "reasoning") == (whole.reasoning or "")
    content = {SAID: "Rest. \n\n Drink 中文 🙂!\n", WITH_CALL: "I look."}.get(text, text)
    place = min((content.find(one) for one in stops if one in content), default=None)
    assert whole.text == content[:place]
    if (text, stops) != (WITH_CALL, ("\n",)):  # a line end in front of a call stops what comes token by token
        assert tuple(one.call for one in deltas if one.call) == whole.tool_calls
        assert not stopped or place is not None
    if text == SAID:
        assert whole.reasoning == "Why? a\n\nb"  # a stop text in the thoughts ends nothing
    if text == WITH_CALL and place is None:
        assert whole.tool_calls == ({"name": "dose", "arguments": {"kg": 40}},)


def test_nothing_is_a_call_or_a_thought_in_raw_text():
    tokenizer = tokenizer_of("qwen3")
    answer = answer_of(tokenizer, row(tokenizer, WITH_CALL, raw=True), "stop")
    assert answer.text == WITH_CALL and answer.reasoning is None and not answer.tool_calls


def test_a_broken_call_stays_text_and_is_told():
    tokenizer = tokenizer_of("qwen3")
    broken = '<tool_call>\n{"name": "dose", "arguments": {"kg": }}\n</tool_call>'
    answer = answer_of(tokenizer, row(tokenizer, broken), "stop")
    assert answer.text == broken and answer.malformed and not answer.tool_calls


def test_ids_of_calls_differ_and_are_the_same_again():
    calls = [CALLED, {**CALLED, "id": "a"}, {**CALLED, "id": "a"}, {**CALLED, "id": "old"}]
    history = [{"role": "assistant", "content": "", "tool_calls": [{**CALLED, "id": "old"}]}]
    found = [one["id"] for one in with_call_ids(calls, "x", history)]
    assert len({*found, "old"}) == 5 and found[1] == "a"  # the model's own where it is new
    assert found == [one["id"] for one in with_call_ids(calls, "x", history)]
    assert found[0] != with_call_ids(calls, "y")[0]["id"]


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> LocalBackend:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = talker(tmp_path_factory.mktemp("reader") / "model", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return LocalBackend(model, AutoTokenizer.from_pretrained(folder), SamplingSettings(max_new_tokens=120))


def test_samples_show_thoughts_and_calls(backend):
    rows = answer_questions(backend.model, backend.tokenizer, LEARNT[:2], 120, Observer())
    assert [one["answer"] for one in rows] == [one["reference"] for one in rows]
    assert "look it up" in rows[0]["answer"] and '"dose"' in rows[0]["answer"]
    off = answer_questions(backend.model, backend.tokenizer, LEARNT[2:], 120, Observer(), "off")
    assert off[0]["answer"] == PLAIN[1]["content"]


def test_a_reward_sees_answers_and_calls_without_their_thoughts(backend):
    """The reward model's own template renders the policy's turn: as in its training, without the reasoning."""
    prompts = [Prompt((QUESTION,), "a:1", "a", tools=TOOLS), Prompt(THOUGHT[:1], "a:2", "a")]
    asked = [Asked(one, backend.prompt(one.messages, one.tools).ids) for one in prompts]
    answers = draw(backend, asked, 2, [0, 1])
    assert [one.message for one in answers] == [CALL, THOUGHT[1]]
    seen = []
    judge = tokenizer_of("hermes")
    reward = model_reward(lambda rows: seen.extend(rows) or [0.0] * len(rows), judge, 2000)
    reward(prompts, [one.message for one in answers], [one.token_ids for one in answers])
    texts = [judge.decode(ids) for ids in seen]
    assert all(one in texts[0] for one in ("The dose for a weight.", "扑热息痛"))
    assert THOUGHT[1]["content"] in texts[1]
    assert not any(one in text for one in ("look it up", THOUGHT[1]["reasoning"]) for text in texts)
    settings = RlSettings(train_data=("x",), base_model="x", reward_rule=("right-option",))
    [(_, rule)] = rule_rewards(settings).values()
    question = Prompt((QUESTION,), "a:1", "a", options={"A": "x", "B": "y"}, key=("B",))
    said = {"role": "assistant", "content": "The answer is B.", "reasoning": "The answer is A, or not."}
    assert rule([question], [said], [[1]]) == [1.0] and rule([question], ["The answer is A."], [[1]]) == [0.0]


def test_an_answer_as_one_text():
    assert as_text(PLAIN[1]) == PLAIN[1]["content"]
    assert as_text(CALL).endswith("</tool_call>") and as_text(CALL, reasoning=False).startswith("<tool_call>")
    wire = conversation_to_wire([QUESTION, CALL, RESULT, ANSWER])
    assert wire[2]["tool_call_id"] == wire[1]["tool_calls"][0]["id"] and wire[1]["content"] is None
    assert set(TEMPLATES) >= {"qwen3", "hermes"}
