"""Judged answers as preference pairs, in a local file that `medgpt reward` reads as it is."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from medicalgpt_cli.engine.data.messages import Message
from medicalgpt_cli.engine.data.normalised import turn_of
from medicalgpt_cli.errors import UsageError

_MANY = 2000  # conversations whose thumbs are remembered while the server runs


class FeedbackFile:
    """Appends a line a pair, each whole and on the disk before the reader is thanked.

    A thumb alone is no pair. It is remembered, and a pair is written once another answer to the same
    conversation got the opposite one from the same person.
    """

    def __init__(self, path: Path):
        """
        Raises:
            UsageError: the file cannot be written.
        """
        self.path = path
        self._lock = threading.Lock()
        self._thumbs: OrderedDict[str, dict[str, bool]] = OrderedDict()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        except OSError as problem:
            raise UsageError(f"--feedback-file {path}: {problem.strerror}", "name another file") from None

    def prefer(self, messages: Sequence[Message], chosen: str, rejected: str) -> bool:
        """Write a pair; False where there is nothing to learn from it."""
        if not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
            return False
        pair = {"messages": [turn_of(one) for one in messages], "chosen": chosen, "rejected": rejected}
        line = json.dumps(pair, ensure_ascii=False) + "\n"
        with self._lock:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line.encode("utf-8", "replace"))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return True

    def rate(self, person: str, messages: Sequence[Message], answer: str, liked: bool) -> int:
        """Remember a thumb; gives how many pairs it completed."""
        key = hashlib.sha256(json.dumps([person, list(messages)]).encode()).hexdigest()
        with self._lock:
            thumbs = self._thumbs.setdefault(key, {})
            if thumbs.get(answer) is liked:
                return 0
            thumbs[answer] = liked
            self._thumbs.move_to_end(key)
            while len(self._thumbs) > _MANY:
                self._thumbs.popitem(last=False)
            opposite = [other for other, thumb in thumbs.items() if thumb is not liked]
        return sum(
            self.prefer(messages, *((answer, other) if liked else (other, answer))) for other in opposite
        )
