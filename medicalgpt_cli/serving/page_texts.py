"""The page's words, English and Chinese; the browser's language decides."""

from __future__ import annotations

TEXTS = {
    "ask": ("Ask a question", "请输入问题"),
    "answer": ("Answer", "回答"),
    "base": ("Base model", "基础模型"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示"),
    "temperature": ("Temperature (0: always the likeliest token)", "温度（0：始终取概率最高的词）"),
    "top_p": ("Top-p (above temperature 0)", "Top-p（温度大于 0 时有效）"),
    "top_k": ("Top-k (0: all; above temperature 0)", "Top-k（0：全部；温度大于 0 时有效）"),
    "penalty": ("Repetition penalty", "重复惩罚"),
    "longest": ("Longest answer in tokens", "回答最长词元数"),
    "seed": ("Seed of the draw", "随机种子"),
    "compare": ("Compare with the base model", "与基础模型对比"),
    "clear": ("New conversation", "新对话"),
    "download": ("Download", "下载对话"),
    "theme": ("Light / dark", "浅色 / 深色"),
    "left": ("Tuned is better", "微调模型更好"),
    "right": ("Base is better", "基础模型更好"),
}

DISCLAIMER = (
    '<div class="medgpt-disclaimer">A language model makes things up. What it says is no medical advice: do not '
    "diagnose, treat or change a treatment by it. Enter nothing that identifies a patient. "
    "语言模型会编造内容，其回答不构成医疗建议，不能用于诊断或治疗；请勿输入可识别患者身份的信息。</div>"
)
STARTER = (
    "This is the small model that comes with medgpt: it shows that everything works, and knows very little. "
    "这是 medgpt 自带的小模型，仅用于演示，知识非常有限。"
)
EXAMPLES = (
    "What are the symptoms of diabetes?",
    "How is high blood pressure treated?",
    "感冒发烧39度怎么办？",
    "高血压患者日常要注意什么？",
)
THOUGHTS = "Thoughts 思考过程"
THANKS = "Thank you: saved as a preference. 谢谢，已保存。"
NOTED = "Noted. A pair is saved once another answer to this question gets the other thumb. 已记录。"
BUSY = "The server is busy: try again in a moment. 服务器繁忙，请稍后再试。"
NOT_SAVED = "The preference could not be saved. 未能保存。"


def translations() -> dict[str, dict[str, str]]:
    english = {key: pair[0] for key, pair in TEXTS.items()}
    chinese = {key: pair[1] for key, pair in TEXTS.items()}
    return {"en": english, "zh": chinese, "zh-CN": chinese}
