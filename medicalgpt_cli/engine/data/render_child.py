"""A process that renders conversations for another one: they come in at standard input, their examples go out.

Started by `tokenising` as a script of its own, so that nothing of the program that asks is run again. What is said is
pickled, as between any two processes of one program; it ends where its input does.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys


def main() -> None:
    """Answer each pickled list of conversations with ("chunk", Chunk), or ("problem", what was raised)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    sys.path.insert(0, sys.argv[1])

    from medicalgpt_cli.engine.data.tokenising import render_chunk

    rendering = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("chunk", render_chunk(chunk, rendering))
        except Exception as problem:
            answer = ("problem", problem)
        pickle.dump(answer, said, protocol=pickle.HIGHEST_PROTOCOL)
        said.flush()


if __name__ == "__main__":
    main()
