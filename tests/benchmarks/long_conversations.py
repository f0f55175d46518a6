"""Seconds to make examples of conversations, against their turns.

    python -m tests.benchmarks.long_conversations [CONVERSATIONS]

First one conversation of each length, best of two; then 1,000 (or CONVERSATIONS) of 5 to 330 turns at 1,024 tokens.
Processor seconds, so that other programs do not count. Own text, tiny tokenizers of the tests.
"""

from __future__ import annotations

import json
import random
import sys
import time

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.examples import render_conversation
from medicalgpt_cli.engine.data.messages import Conversation
from tests.benchmarks.many_rows import WORDS
from tests.tiny import tiny_tokenizer

STYLES = ("chatml", "llama3", "mistral", "qwen3")
MAX_LENGTH = 1024


def conversation(turns: int, choose: random.Random) -> Conversation:
    """Questions and answers by turns; an odd one is left out."""
    messages = []
    for _ in range(turns // 2):
        messages.append({"role": "user", "content": " ".join(choose.choices(WORDS, k=8)) + "?"})
        messages.append({"role": "assistant", "content": " ".join(choose.choices(WORDS, k=16)) + "."})
    return Conversation(tuple(messages), "made.jsonl:1")


def seconds(style: str, conversations: list[Conversation]) -> float:
    tokenizer = tiny_tokenizer(style)
    render_conversation(tokenizer, conversation(4, random.Random(1)), MAX_LENGTH, Counts())
    begin = time.process_time()
    for one in conversations:
        render_conversation(tokenizer, one, MAX_LENGTH, Counts())
    return time.process_time() - begin


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for turns in (82, 165, 330, 660):
        one = [conversation(turns, random.Random(turns))]
        print(
            json.dumps(
                {"turns": turns, **{s: round(min(seconds(s, one) for _ in range(2)), 2) for s in STYLES}}
            )
        )
    choose = random.Random(0)
    many = [conversation(choose.randint(5, 330), choose) for _ in range(number)]
    for style in STYLES[:1]:
        print(
            json.dumps({"conversations": number, "style": style, "seconds": round(seconds(style, many), 1)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
