"""A process that renders conversations for another one: they come in at standard input, their examples go out.

Started by `tokenising` as a script of its own, so that nothing of the program that asks is run again. It reads lines
of JSON: how to render, then lists of conversations. It writes the fingerprint of the tokenizer that it loaded, then a
chunk for each list (`example_table.write_chunk`), or what was wrong. It ends where its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    sys.path.insert(0, sys.argv[1])

    from transformers import AutoTokenizer

    from medicalgpt_cli.engine.data.example_table import write_chunk
    from medicalgpt_cli.engine.data.messages import conversation_from
    from medicalgpt_cli.engine.data.tokenising import Rendering, render_chunk
    from medicalgpt_cli.engine.model.tokenizer import fingerprint
    from medicalgpt_cli.errors import MedgptError

    def tell(about: dict[str, object]) -> None:
        said.write(json.dumps(about).encode() + b"\n")
        said.flush()

    how = json.loads(sys.stdin.buffer.readline())
    tokenizer = AutoTokenizer.from_pretrained(how["tokenizer"], trust_remote_code=False)
    rendering = Rendering(tokenizer, how["max_length"], how["thinking"])
    tell({"fingerprint": fingerprint(tokenizer)})
    for line in sys.stdin.buffer:
        try:
            chunk = render_chunk([conversation_from(one) for one in json.loads(line)], rendering)
        except MedgptError as problem:
            tell({"problem": type(problem).__name__, "message": problem.message, "hint": problem.hint})
            continue
        write_chunk(chunk, said)


if __name__ == "__main__":
    main()
