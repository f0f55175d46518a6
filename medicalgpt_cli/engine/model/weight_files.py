"""The files that a model's weights are read from: which they are, that all of them are used, and that they are numbers.

The library follows whatever path an index of shards names, drops weights that the configuration has no place for, and
computes with NaN. Each of these gives a model that answers, and answers wrongly.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from medicalgpt_cli.engine.model.gguf_header import check_header
from medicalgpt_cli.engine.model.references import ModelReference
from medicalgpt_cli.engine.model.spread import is_spread
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.errors import UnsafeRefused, UsageError

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

_BUFFERS = "buffers that are computed"
# What files may hold beside the weights of a language model, and what a message calls it.
_HARMLESS = {
    _BUFFERS: r"(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias)$",
    "heads of other tasks": r"^(base_model\.|model\.)?"
    r"(lm_head|embed_out|lm_loss|pred_layer|generator_lm_head|cls|score|classifier|qa_outputs|v_head|value_head|mtp)\b",
    "parts for images or sound": r"(^|[._])(vision|visual|image|audio|speech|multi_modal)",
}


def weight_files_of(model: ModelReference) -> list[Path]:
    """The safetensors files that a model or adapter is loaded from; empty for others, and before a download.

    Raises:
        What `weight_files` does.
    """
    folder = files_folder(model)
    if folder is None or model.kind in ("gguf", "config"):
        return []
    if model.kind == "adapter":
        return [folder / ADAPTER]
    return weight_files(folder, model.name)


def files_folder(model: ModelReference) -> Path | None:
    """The folder with a model's files, also that of the hub's cache; None for a hub model that is not here yet."""
    if model.kind != "hub":
        return model.folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model.path, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, as the library chooses them; empty where there are none.

    Args:
        name: what messages call the model.

    Raises:
        UnsafeRefused: an index names a file outside the folder.
        UsageError: the index is damaged, or a file that it names is missing.
    """
    named = _config(folder).get("transformers_weights")
    if named is not None:
        _must_stay_inside(name, "config.json", named)
        if not str(named).endswith(".json"):
            return [folder / named]
    elif (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    index = folder / (named or INDEX)
    if not index.is_file():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{name}: {index.name} is damaged", "was the copy complete?") from None
    for shard in shards:
        _must_stay_inside(name, index.name, shard)
        if not (folder / shard).is_file():
            raise UsageError(
                f"{name}: {shard} is missing, which {index.name} names", "was the copy complete?"
            )
    return [folder / shard for shard in shards]


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json; what is wrong with it is said where the model is loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _must_stay_inside(name: str, source: str, path: Any) -> None:
    """A path inside the folder. The file itself may be a link: the hub's cache is made of links."""
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if not parts or ".." in parts or "\\" in path or ":" in path or PurePosixPath(path).is_absolute():
        raise UnsafeRefused(
            f"{name}: {source} names weight files outside the model's folder",
            "the model was put together by hand: take it from its source",
        )


def check_all_used(
    name: str, files: Iterable[Path], model: Any, unexpected: Iterable[str], observer: Observer
) -> None:
    """Refuse weights that the model has no place for; those that are known to be beside it are named.

    Args:
        unexpected: names of weights that the library has not used; under ZeRO-3 it names none.

    Raises:
        UsageError: some are none of the known ones, as where the configuration has fewer layers than the files; or one
            stands in two files.
    """
    files = list(files)
    _must_stand_once(name, files)
    if is_spread(model):
        unexpected = {*unexpected, *_beyond_the_layers(files, model)}
    strange = sorted(key for key in unexpected if _harmless(key) is None)
    if strange:
        raise UsageError(
            f"{name}: {len(strange)} weights of the files have no place in the model, "
            f"as config.json describes it; the first is {_short(strange[0])}",
            "config.json and weights do not belong together: was one of them changed?",
        )
    beside = Counter(
        _harmless(key) or "parts that this architecture leaves out"
        for key in {*unexpected, *_left_out_by_the_library(files, model)}
    )
    if beside:
        listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(beside.items()))
        observer.on_notice(f"{name}: weights that are not used: {listed}")


def _must_stand_once(name: str, files: Sequence[Path]) -> None:
    """The library reads all files, and takes of two weights of one name whichever comes last."""
    found: dict[str, Path] = {}
    for file in files if len(files) > 1 else ():
        for key in _keys(file):
            if key in found:
                raise UsageError(
                    f"{name}: {_short(key)} stands in {found[key].name} and in {file.name}",
                    "files of two copies of a model were mixed: take them anew from one",
                )
            found[key] = file


_NUMBERED = re.compile(r"([A-Za-z_]\w*)\.(\d+)(?=\.)")  # "layers.12"


def _beyond_the_layers(files: Iterable[Path], model: Any) -> list[str]:
    """Weights of layers whose number the model does not have; other names may be older ones that are converted."""
    own = [found for key in model.state_dict() if (found := _NUMBERED.search(key))]
    places, kinds = {found.group() for found in own}, {found.group(1) for found in own}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [
        key
        for file in files
        for key in _keys(file)
        if (found := _NUMBERED.search(key))
        and found.group(1) in kinds
        and found.group() not in places
        and not any(re.search(pattern, key) for pattern in ignored)
    ]


def _harmless(key: str) -> str | None:
    return next((kind for kind, pattern in _HARMLESS.items() if re.search(pattern, key)), None)


def _left_out_by_the_library(files: Iterable[Path], model: Any) -> list[str]:
    """Weights that the library passes over: buffers, and what the architecture's own code names, such as layers that
    predict further tokens."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), _HARMLESS[_BUFFERS]]
    own = set(model.state_dict().keys())
    return [
        key
        for file in files
        for key in _keys(file)
        if key not in own and any(re.search(pattern, key) for pattern in patterns)
    ]


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as content:
        return list(content.keys())


def check_gguf_blocks(name: str, file: Path) -> None:
    """The same of a GGUF file: the library reads the blocks that the header counts, and drops those behind them.

    Raises:
        UsageError: there are some.
    """
    from gguf import GGUFReader

    check_header(file)
    reader = GGUFReader(file)
    architecture = reader.get_field("general.architecture")
    counted = architecture and reader.get_field(f"{architecture.contents()}.block_count")
    numbers = [re.match(r"blk\.(\d+)\.", tensor.name) for tensor in reader.tensors]
    blocks = 1 + max((int(number.group(1)) for number in numbers if number), default=-1)
    if counted and blocks > int(counted.contents()):
        raise UsageError(
            f"{name}: the file has {blocks} blocks, and its header counts {counted.contents()}",
            "the file was changed by hand or damaged",
        )


def explain_shapes(name: str, problem: RuntimeError) -> None:
    """
    Raises:
        UsageError: `problem` is the library's word for weights of other shapes than the model's.
    """
    if "ignore_mismatched_sizes" in str(problem):
        raise UsageError(
            f"{name}: weights have other shapes than config.json describes",
            "config.json and weights do not belong together: was one of them changed?",
        ) from None


def _short(key: str) -> str:
    """A weight's name comes from a file: no more of it than a message can hold."""
    return key if len(key) <= 100 and key.isprintable() else f"{key[:60]!r}…"


def check_numbers(name: str, model: Any, dtype: torch.dtype) -> None:
    """Refuse a loaded model with weights that are NaN or infinite. One pass over the weights where they lie.

    Raises:
        UsageError: there are some.
    """
    seen: set[int] = set()
    for key, weight in model.state_dict().items():
        if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        _must_be_numbers(name, key, weight, dtype)


def check_numbers_in(name: str, files: Iterable[Path]) -> None:
    """The same of files, one tensor at a time: for weights that are quantised or shared out as they are loaded.

    Raises:
        UsageError: some numbers are NaN or infinite, or a file is damaged.
    """
    for file in files:
        try:
            with safe_open(file, "pt") as content:
                for key in content.keys():  # noqa: SIM118 - no mapping
                    _must_be_numbers(name, key, content.get_tensor(key))
        except (OSError, SafetensorError):
            raise UsageError(f"{name}: {file.name} is damaged", "was the copy complete?") from None


def _must_be_numbers(name: str, key: str, weight: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    if not weight.is_floating_point() or not weight.numel() or _are_numbers(weight):
        return
    half = dtype == torch.float16
    raise UsageError(
        f"{name}: {_short(key)} holds numbers that are not finite" + (" in fp16" if half else ""),
        "take --dtype bf16 or fp32: fp16 ends at 65,504"
        if half
        else "its training went wrong, or the file is damaged; take an earlier one",
    )


@torch.no_grad()
def _are_numbers(weight: torch.Tensor) -> bool:
    """Whether all are finite. NaN passes through minimum and maximum.

    One pass of about 3 GB a second on two cores, in every format: `isfinite` of each number takes twenty times as long.
    """
    if weight.element_size() == 1:  # 8-bit floats have no order of their own
        weight = weight.to(torch.float32)
    least, most = torch.aminmax(weight)
    return bool(torch.isfinite(least) and torch.isfinite(most))
