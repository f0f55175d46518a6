"""Pairs and prompts with tools are rendered with them, in `reward` and in `rl`."""

from __future__ import annotations

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.preferences import Pair
from medicalgpt_cli.engine.data.rendering import encode_prompt
from medicalgpt_cli.engine.data.tool_messages import as_functions
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.reward_data import render_pair
from medicalgpt_cli.engine.training.rl_data import load_rl_data
from medicalgpt_cli.settings.stages import RlSettings
from tests.engine.data.tool_templates import tokenizer_of
from tests.talker import CALL, QUESTION, RESULT, TOOLS
from tests.tiny import write_jsonl

PLAIN = "tools written in a plain form: the template has no place for them"


def test_a_pair_stands_behind_its_tools():
    for style, notes in (("qwen3", {}), ("plain", {PLAIN: 1})):
        tokenizer, counts = tokenizer_of(style), Counts()
        pair = Pair((QUESTION, CALL, RESULT), "Take 400 mg.", "Take four.", None, "a:1", "a", tools=TOOLS)
        rendered = render_pair(tokenizer, pair, 2000, counts)
        prompt = encode_prompt(tokenizer, pair.messages, TOOLS)
        assert rendered.chosen[: len(prompt)] == rendered.rejected[: len(prompt)] == prompt
        assert "The dose for a weight." in tokenizer.decode(prompt)
        assert dict(counts.merged) == notes and not counts.truncated


def test_prompts_of_rl_have_their_tools_and_thinking(tmp_path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"messages": [QUESTION], "tools": as_functions(TOOLS)}])
    lengths = {}
    for style in ("qwen3", "plain"):
        for thinking in ("auto", "off") if style == "qwen3" else ("auto",):
            settings = RlSettings(
                train_data=(str(file),),
                base_model="x",
                reward_rule=("length",),
                eval_fraction=0,
                thinking=thinking,
            )
            tokenizer = tokenizer_of(style)
            data = load_rl_data(settings, tokenizer, (), 2048, Observer())
            [asked] = data.training
            assert asked.ids == encode_prompt(tokenizer, [QUESTION], TOOLS, thinking)
            assert (PLAIN in data.report["training"]["merged"]) == (style == "plain")
            lengths[style, thinking] = len(asked.ids)
    assert lengths["qwen3", "off"] > lengths["qwen3", "auto"]
