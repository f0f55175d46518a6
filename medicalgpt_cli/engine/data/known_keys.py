"""The keys that records are read by: what each means, and how else people spell it.

A spelling is compared after folding: small letters, and underscores for spaces and hyphens. A message may name these
keys whatever file they stand in.
"""

from __future__ import annotations

from collections.abc import Mapping

# What medgpt reads: the meaning, and its spellings.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    # conversations
    "messages": ("messages",),
    "conversations": ("conversations", "conversation", "dialogue", "dialog", "对话"),
    "dialogue": ("data",),  # a list of texts with their speakers (HuatuoGPT)
    "history": ("history", "历史", "历史对话"),
    "system": ("system", "system_prompt", "系统", "系统提示", "系统提示词"),
    # questions, in the order in which they are joined
    "instruction": ("instruction", "指令"),
    "prompt": ("prompt", "提示", "提示词"),
    "question": (
        *("question", "ask", "问题", "提问", "问", "患者问题", "病人问题", "用户问题", "患者提问", "主诉"),
        *("咨询", "咨询内容", "题目", "题干", "试题"),
    ),
    "query": ("query", "查询"),
    "input": ("input", "输入"),
    "context": ("context", "背景", "上下文"),
    # answers
    "output": ("output", "输出"),
    "response": ("response",),
    "answer": (
        *("answer", "回答", "答案", "答", "答复", "回复", "医生回答", "医生回复", "医生建议", "诊断建议"),
        *("正确答案", "参考答案"),
    ),
    "completion": ("completion",),
    "reference": ("reference",),
    "questions": ("questions",),
    "answers": ("answers",),
    "reasoning": (
        *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "complex_cot", "cot"),
        *("chain_of_thought", "思考", "思考过程", "推理", "推理过程"),
    ),
    # preferences
    "chosen": ("chosen", "response_chosen", "chosen_messages", "better", "好的回答", "优选回答"),
    "rejected": ("rejected", "response_rejected", "rejected_messages", "worse", "差的回答", "劣选回答"),
    "responses": ("responses", "completions", "outputs", "candidates"),
    "ranked": ("ranked", "ranked_responses", "ranking"),
    "scores": ("scores", "ratings", "rewards"),
    "ranks": ("ranks", "rank"),
    "label": ("label", "kto_tag"),
    "weight": ("weight", "train", "loss", "loss_weight"),
    # tools
    "tools": ("tools", "functions"),
    "tool_calls": ("tool_calls",),
    "function_call": ("function_call",),
    "tool_call_id": ("tool_call_id",),
    "name": ("name",),
    # turns and their parts
    "role": ("role", "from"),
    "content": ("content", "value"),
    "type": ("type",),
    "text": ("text", "文本", "正文"),
    # multiple choice
    "options": ("options", "option", "choices", "选项"),
    "opa": ("opa",),
    "opb": ("opb",),
    "opc": ("opc",),
    "opd": ("opd",),
    "ope": ("ope",),
    "answer_idx": ("answer_idx", "answer_index", "correct_option", "correct_answer_idx"),
    "cop": ("cop",),
    "explanation": ("explanation", "exp", "rationale", "解析", "答案解析"),
    # files of another kind beside the text
    "images": ("images", "image", "图片", "图像"),
    "audios": ("audios", "audio"),
    "videos": ("videos", "video"),
    "id": ("id",),
    "group": ("group",),
}
MEDIA = ("images", "audios", "videos")

# Keys that say something about a record and nothing to be learnt.
NO_MEANING = frozenset(
    {
        *("source", "lang", "language", "score", "score_chosen", "score_rejected", "category", "categories"),
        *("dataset", "subset", "split", "subject", "subject_name", "topic", "topic_name", "exam_type"),
        *("exam_class", "exam_subject", "question_type", "choice_type", "prompt_id", "idx", "index", "uid"),
        *("uuid", "url", "license", "licence", "author", "date", "time", "timestamp", "created_at", "model"),
        *("difficulty", "tag", "tags", "domain", "version", "task", "task_type", "data_source", "type"),
        *("来源", "类别", "分类", "编号", "序号", "日期", "时间", "科室", "难度"),
    }
)
_META = "meta"  # and what begins with it

KEYS = frozenset({*(one for some in SPELLINGS.values() for one in some), *NO_MEANING})

_MEANINGS = {spelling: meaning for meaning, some in SPELLINGS.items() for spelling in some}


def fold(key: str) -> str:
    """A key as it is compared: `Complex CoT` and `complex-cot` are `complex_cot`."""
    return key.strip().strip("\ufeff").casefold().replace("-", "_").replace(" ", "_")


def meaning_of(key: str) -> str | None:
    """What a key means to medgpt, by its first spelling; None for a key that is not known."""
    return _MEANINGS.get(fold(key))


def has_no_meaning(key: str) -> bool:
    """Whether a key is known to say nothing that could be learnt."""
    folded = fold(key)
    return folded in NO_MEANING or folded.startswith(_META)


def is_known(key: str) -> bool:
    """Whether a message may name this key whatever file it stands in."""
    return fold(key) in KEYS
