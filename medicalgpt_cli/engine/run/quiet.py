"""Silence the libraries: no progress bars, advice or telemetry of theirs. medgpt says what matters itself.

Called before any of them is imported, since most read these variables only once. A variable that the
user has set stays as it is.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# No library that medgpt uses may report to anyone. These win over what the user's shell has.
NO_TELEMETRY = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "TQDM_DISABLE": "1",  # bars of libraries that know no variable of their own (reading GGUF)
    "RUST_BACKTRACE": "0",  # what a library in Rust says as it gives up stays one line
    # Data workers are forked after the tokenizer was used; without this, each fork is a warning.
    "TOKENIZERS_PARALLELISM": "false",
}
_LOGGERS = (
    "bitsandbytes",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "torch",
    "httpx",
    "filelock",
)


def quieten() -> None:
    """Switch telemetry off, fetched code, and progress bars, advice and warnings of the libraries."""
    os.environ.update(NO_TELEMETRY)
    # Where this package is installed, bitsandbytes fetches compiled code from the hub as it is imported, and runs it.
    sys.modules.setdefault("kernels", None)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level itself, and writes to standard output.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not os.environ.get("PYTHONWARNINGS"):
        warnings.simplefilter("ignore")
