"""The banner's rules: what they find, and ordinary questions that they leave alone."""

from __future__ import annotations

import json

import pytest

from medicalgpt_cli.serving.emergency import BANNERS, banner, look_for
from tests.conftest import DATA

FOUND = {
    "self-harm": [
        "I want to die",
        "I am thinking about suicide.",
        "my son is cutting himself",
        "I’m going to kill myself",
        "Is he suicidal?",
        "self-harm",
        "我不想活了",
        "他留下遗书说要自杀",
        "我想結束生命",
        "一直有轻生的念头",
    ],
    "emergency": [
        "My father has chest pain and sweats",
        "I can't breathe",
        "she can’t breathe!",
        "He is UNCONSCIOUS",
        "signs of a stroke?",
        "My child swallowed a battery",
        "bleeding heavily after birth",
        "she is vomiting blood",
        "took an overdose of paracetamol",
        "突然胸口剧烈疼痛",
        "呼吸困难怎么办",
        "孩子误服了洗衣液",
        "爷爷口角歪斜、言语不清",
        "他喝了农药",
        "吃了整瓶安眠药",
        "晕倒了叫不醒",
    ],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind in FOUND for text in FOUND[kind]])
def test_found(kind, text):
    assert look_for(text) == kind
    assert BANNERS[kind] in banner(text) and text not in banner(text)


def test_self_harm_comes_first():
    assert look_for("I took an overdose because I want to die") == "self-harm"


@pytest.mark.parametrize(
    "text",
    [
        "What are the symptoms of diabetes?",
        "How is high blood pressure treated?",
        "Is breathing exercise good for sleep?",
        "What is the outlook for stroked glass?",
        "感冒发烧39度怎么办？",
        "高血压患者日常要注意什么？",
        "",
    ],
)
def test_left_alone(text):
    assert look_for(text) is None and banner(text) == ""


def test_few_ordinary_questions_are_taken_for_emergencies():
    found = total = 0
    for line in (DATA / "medquad_en_alpaca.jsonl").read_text(encoding="utf-8").splitlines():
        total += 1
        found += look_for(json.loads(line)["instruction"]) is not None
    assert total >= 40 and found / total < 0.05


def test_long_texts_take_no_time():
    assert look_for("a" * 200_000) is None and look_for("吃" * 200_000) is None
