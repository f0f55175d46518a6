"""Tokenizer and configuration of a GGUF file, converted once for all commands.

Converting a vocabulary of 262,144 tokens takes two minutes. What comes out is kept in the cache:

<cache>/gguf/<key>/
  tokenizer/      as any Hugging Face program reads it
  config/         config.json
  files.json      the SHA-256 of each of these files

The key covers the GGUF file (size, time of change, and the hash of its beginning, where vocabulary and settings stand)
and the versions of the libraries that convert. Files that are not what was written are made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from filelock import FileLock
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from medicalgpt_cli.engine.model.gguf_header import check_header
from medicalgpt_cli.engine.model.tokenizer import fingerprint
from medicalgpt_cli.engine.run.environment import cache_folder
from medicalgpt_cli.engine.run.files import remove_tree, sha256_file, staged

_FORMAT = 1
_BEGINNING = 64 * 2**20  # bytes; a vocabulary of 262,144 tokens with its merges takes 16 MB


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a GGUF file, with what the conversion loses put back.

    Raises:
        OSError, ValueError, KeyError: the file cannot be read, or holds none.
        UnsafeRefused, UsageError: what `check_header` raises.
    """
    check_header(path)
    kept = _kept(path)
    return AutoTokenizer.from_pretrained(kept / "tokenizer") if kept else _convert_tokenizer(path)


def gguf_config(path: Path) -> Any:
    """The configuration of the model in a GGUF file.

    Raises:
        OSError, ValueError, KeyError: the file cannot be read.
        UnsafeRefused, UsageError: what `check_header` raises.
    """
    check_header(path)
    kept = _kept(path)
    return AutoConfig.from_pretrained(kept / "config") if kept else _convert_config(path)


def _kept(path: Path) -> Path | None:
    """The folder of the converted parts; None where they cannot be kept, or do not come back as they were."""
    folder = cache_folder() / "gguf" / _key(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError:  # a home that cannot be written
        return None
    with lock:
        if _is_whole(folder):
            return folder
        tokenizer, config = _convert_tokenizer(path), _convert_config(path)
        with contextlib.suppress(OSError):
            remove_tree(folder)
            with staged(folder) as new:
                tokenizer.save_pretrained(new / "tokenizer")
                config.save_pretrained(new / "config")
                (new / "files.json").write_text(json.dumps(_hashes(new)), encoding="utf-8")
            if _comes_back(folder, tokenizer, config):
                return folder
            remove_tree(folder)
    return None


def _key(path: Path) -> str:
    with path.open("rb") as file:
        beginning = hashlib.sha256(file.read(_BEGINNING)).hexdigest()
    about = path.stat()
    parts = [_FORMAT, transformers.__version__, tokenizers.__version__]
    parts += [about.st_size, about.st_mtime_ns, beginning]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(one for one in folder.rglob("*") if one.is_file() and one.name != "files.json")
    return {str(one.relative_to(folder)): sha256_file(one) for one in files}


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / "files.json").read_text(encoding="utf-8")) == _hashes(folder)
    except (OSError, ValueError):
        return False


def _comes_back(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Any) -> bool:
    """Whether the files give the same again: some classes rebuild a tokenizer in a way of their own."""
    again = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return (
        again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        and fingerprint(again) == fingerprint(tokenizer)
        and again.model_max_length == tokenizer.model_max_length
        and AutoConfig.from_pretrained(folder / "config").to_diff_dict() == config.to_diff_dict()
    )


def _convert_config(path: Path) -> Any:
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _convert_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and bytes(field.parts[field.data[0]]).decode() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.model_max_length = (
        getattr(_convert_config(path), "max_position_embeddings", None) or tokenizer.model_max_length
    )
    return tokenizer
