"""Questions that look like an emergency or like self-harm, found by rules outside the model.

The rules look for words, understand neither negation nor context, and rather warn once too often: what they show is
a banner beside the answer, never instead of it. They are listed in docs/serving.md.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["self-harm", "emergency"]

_SELF_HARM_EN = r"""
suicid\w* | kill(ing)?\ (myself|himself|herself|themsel\w+) | end(ing)?\ (my|his|her|their)\ (own\ )?life
(want|wants|wanted|going)\ to\ die | wish\ (i|he|she)\ (was|were)\ dead | better\ off\ dead | no\ reason\ to\ live
self[-\ ]?harm\w* | (hurt|hurting|harm|harming|cut|cutting)\ (myself|himself|herself|themsel\w+)
"""
_SELF_HARM_ZH = """
自杀 自殺 轻生 輕生 寻死 尋死 想死 不想活 活不下去 活着没意思 活著沒意思 结束(自己的)?生命 結束(自己的)?生命 了结自己
自残 自殘 自伤 自傷 割腕 跳楼 跳樓 遗书 遺書
"""
_EMERGENCY_EN = r"""
chest\ (pain|pressure|tightness) | heart\ attack | short(ness)?\ of\ breath | not\ breathing | stop(s|ped)?\ breathing
(can'?t|cannot|can\ not|unable\ to|hardly|struggling\ to)\ breathe? | chok(es|ed|ing) | turn(s|ed|ing)?\ blue
unconscious | unresponsive | passed\ out | won'?t\ wake | stroke | face\ (is\ )?droop\w* | slurred\ speech
sudden(ly)?\ (weakness|numbness|blind\w*) | worst\ headache | seizures? | convuls\w+
(severe|heavy|uncontroll\w+|massive)\ bleeding | bleeding\ (heavily|a\ lot) | won'?t\ stop\ bleeding
(vomit|cough|spit)(s|ed|ing|ting)?\ (up\ )?blood | anaphyla\w+ | throat\ (is\ )?(swelling|closing)
overdos\w+ | poisoned | swallowed\ (bleach|poison|a\ battery) | electrocut\w+ | drown(ed|ing) | snake\ ?bite
"""
_EMERGENCY_ZH = """
胸痛 胸口(很|好|剧烈|劇烈)?[痛疼闷悶] 胸闷 胸悶 心梗 心肌梗 呼吸困难 呼吸困難 喘不过气 喘不過氣 不能呼吸
无法呼吸 無法呼吸 没有呼吸 沒有呼吸 停止呼吸 窒息 噎住 卡住喉咙 嘴唇发紫 嘴唇發紫 昏迷 昏倒 晕倒 暈倒 叫不醒
失去意识 失去意識 中风 中風 脑梗 脑出血 腦出血 口角歪斜 嘴歪 半身(麻木|不遂|无力) 言语不清 抽搐 惊厥 驚厥
剧烈头痛 劇烈頭痛 大出血 血流不止 流血不止 止不住血 吐血 咯血 呕血 嘔血 过敏性休克 過敏性休克 喉咙肿 喉嚨腫
服毒 中毒 喝了?农药 喝了?農藥 吃了?(太多|过量|過量|整瓶).{0,4}[药藥] 误服 誤服 误食 誤食 触电 觸電 溺水 蛇咬
"""


def _pattern(english: str, chinese: str) -> re.Pattern[str]:
    """Whole English words, and Chinese ones wherever they stand."""
    words = "|".join(line.strip() for line in english.strip().splitlines())
    return re.compile(rf"\b(?:{words})\b|{'|'.join(chinese.split())}", re.IGNORECASE | re.VERBOSE)


_PATTERNS: dict[Kind, re.Pattern[str]] = {
    "self-harm": _pattern(_SELF_HARM_EN, _SELF_HARM_ZH),
    "emergency": _pattern(_EMERGENCY_EN, _EMERGENCY_ZH),
}

BANNERS: dict[Kind, str] = {
    "self-harm": (
        "<strong>You are not alone, and help is there now.</strong> If you or somebody else is in danger, call the "
        "emergency number (112 · 911 · 120) or a crisis line (in China 12356, in the US and Canada 988), or go to "
        "somebody you trust. This program cannot help in a crisis.<br>"
        "<strong>您并不孤单，现在就能得到帮助。</strong>如果您或他人有危险，请立即拨打急救电话 120，"
        "或心理援助热线 12356，也可以联系您信任的人。本程序无法处理危机情况。"
    ),
    "emergency": (
        "<strong>This may be an emergency.</strong> Do not wait for an answer here: call the emergency number "
        "(112 · 911 · 120) or go to the nearest emergency department.<br>"
        "<strong>这可能是紧急情况。</strong>请不要等待这里的回答：立即拨打急救电话 120，或前往最近的急诊科。"
    ),
}


def look_for(text: str) -> Kind | None:
    """What a question looks like; self-harm first."""
    text = text.replace("’", "'")
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(text)), None)


def banner(text: str) -> str:
    """The banner for a question as HTML, or nothing. No part of the question is in it."""
    kind = look_for(text)
    return f'<div class="medgpt-alert" role="alert">{BANNERS[kind]}</div>' if kind else ""
