"""Which names are asked for on the Hugging Face hub. A path that was mistyped is not: nobody else has to read it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

# One part of `owner/name`, as the hub allows it.
_PART = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_FILES = re.compile(
    r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt|md|xlsx?|gz|zst|zip|tar|tgz|bz2|xz|7z|gguf|ggml|safetensors|bin|pt|pth"
    r"|ckpt|pkl|npz?|onnx|h5|model|tiktoken|jinja2?|ya?ml|toml|ini|cfg|py|ipynb|html?|xml|pdf|docx?|tmp|partial|log)"
    r"(:\w*)?",
    re.IGNORECASE,
)


def is_hub_name(name: str) -> bool:
    """Whether `name` is `owner/name` and nothing speaks for a path: no part is the name of something in this folder,
    it does not end like a file, and it is no slip of the pen for a path that there is."""
    parts = name.split("/")
    if len(parts) != 2 or not all(_PART.fullmatch(part) for part in parts):
        return False
    if _FILES.fullmatch(Path(name).suffix):
        return False
    here = {one.name.lower() for one in Path().iterdir()}
    return not here & {part.lower() for part in parts} and nearest_path(name) is None


def nearest_path(name: str) -> str | None:
    """What there is here instead of a path of two parts: the second part in a folder whose name is nearly the first, or
    nearly the second part in a folder whose name is the first."""
    first, _, second = name.rstrip("/").partition("/")
    folders = {one.name: one for one in Path().iterdir() if one.is_dir()}
    for folder in difflib.get_close_matches(first, folders, 3, 0.6):
        inside = [one.name for one in _inside(folders[folder])]
        if second in inside:
            return f"{folder}/{second}"
        near = difflib.get_close_matches(second, inside, 1, 0.6) if folder == first else []
        if near:
            return f"{folder}/{near[0]}"
    return None


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
