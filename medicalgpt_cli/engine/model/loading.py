"""Weights and tokenizer into memory: the device, the number format, and what is refused."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from medicalgpt_cli.engine import starter
from medicalgpt_cli.engine.model.causality import must_be_causal
from medicalgpt_cli.engine.model.experts import has_experts
from medicalgpt_cli.engine.model.gguf_parts import gguf_config, gguf_tokenizer
from medicalgpt_cli.engine.model.longrope import choose_by_text
from medicalgpt_cli.engine.model.model_files import (
    building,
    check_sizes,
    is_about_memory,
    is_panic,
    read_object,
)
from medicalgpt_cli.engine.model.model_files import read_config as read_sizes
from medicalgpt_cli.engine.model.pull import check_pulled
from medicalgpt_cli.engine.model.quantization import (
    check_quantization,
    compute_alike,
    quantization_config,
    stored_quantization,
)
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel
from medicalgpt_cli.engine.model.spread import is_shared, is_spread
from medicalgpt_cli.engine.model.tokenizer import apply_template, check_fingerprint
from medicalgpt_cli.engine.model.tokenizer_check import check_tokenizer
from medicalgpt_cli.engine.model.weight_files import (
    check_all_used,
    check_gguf_blocks,
    check_numbers,
    check_numbers_in,
    explain_shapes,
    weight_files_of,
)
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import processes
from medicalgpt_cli.errors import EnvironmentFailure, MedgptError, UnsafeRefused, UsageError
from medicalgpt_cli.settings.groups import DeviceSettings, ModelSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLER = "--dtype bf16, or --use-cpu"


def choose_device(device: DeviceSettings) -> torch.device:
    """The first device that a command, or this process of it, uses.

    Only the devices of `--gpus` are visible (run/devices.py).

    Raises:
        EnvironmentFailure: `--gpus` names a device that is not there.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() and not device.use_cpu else 0
    if present < len(device.gpu_numbers):
        raise EnvironmentFailure(
            f"--gpus {device.gpus}: {present} of these {len(device.gpu_numbers)} GPUs are there",
            "--use-cpu runs without a GPU; `medgpt env` shows what is visible",
        )
    if not present:
        return torch.device("cpu")
    if processes.local_rank() >= present:
        raise EnvironmentFailure(
            f"process {processes.local_rank() + 1} of this machine has no GPU: {present} are visible",
            "fewer --processes, or --use-cpu",
        )
    return torch.device("cuda", processes.local_rank())


def gpus_of_the_model(device: DeviceSettings) -> int:
    """Over how many GPUs the layers of one model are spread: those of `--gpus`, unless each process takes one."""
    if processes.size() > 1 or device.wanted_processes > 1:
        return 1
    return max(len(device.gpu_numbers), 1)


def choose_dtype(device: DeviceSettings, torch_device: torch.device) -> torch.dtype:
    """The number format of weights in memory.

    `auto` is bf16 on a GPU that computes it natively (fp16 on an older one) and fp32 on a processor: there
    bf16 is slow without special instructions, and fp32 keeps greedy answers independent of the batch.

    Raises:
        EnvironmentFailure: bf16 was asked for on a GPU that could only imitate it, slowly.
    """
    native = torch_device.type != "cuda" or torch.cuda.get_device_capability(torch_device)[0] >= 8
    if device.dtype == "bf16" and not native:
        raise EnvironmentFailure(
            f"--dtype bf16: {torch.cuda.get_device_name(torch_device)} does not compute in it natively",
            "take --dtype fp16, or leave it out",
        )
    if device.dtype != "auto":
        return DTYPES[device.dtype]
    if torch_device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if native else torch.float16


def load_tokenizer(
    model: ModelSettings,
    resolved: ResolvedModel,
    observer: Observer | None = None,
    *,
    plain_template: bool = True,
) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token and its chat template.

    Args:
        plain_template: give a model that has no template the plain one, and say so.

    Raises:
        UsageError: there is none, or it is not the one that the adapter was trained with.
    """
    tokenizer = read_tokenizer(resolved.tokenizer)
    if resolved.is_starter and observer:
        observer.on_notice(starter.NOTICE)
    notice = apply_template(tokenizer, model.template, fallback=plain_template)
    if notice and observer:
        observer.on_notice(notice)
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{resolved.label}: the tokenizer has no end-of-text token", "medgpt needs one to end answers"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # never masked by its id: only by position
    _must_fit(tokenizer, resolved.base)
    for place in (resolved.adapter, resolved.base):
        if place is not None and place.folder is not None and place.kind in ("adapter", "folder"):
            check_fingerprint(place.folder, tokenizer)
            break
    return tokenizer


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    path = Path(source)
    try:
        if path.suffix == ".gguf":
            return gguf_tokenizer(path)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check_tokenizer(tokenizer, source)
        tokenizer("A few words, 12 of them. 几个字。")  # a damaged file shows itself
        return tokenizer
    except (MedgptError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as problem:  # a panic of the Rust library is no Exception
        if not isinstance(problem, Exception) and not is_panic(problem):
            raise
        if not path.exists():
            raise EnvironmentFailure(
                f"{source} is no local folder, and the hub does not give it ({type(problem).__name__})",
                "check the name; offline, only models in the cache can be used",
            ) from None
        raise UsageError(
            f"{source}: the tokenizer cannot be read ({type(problem).__name__})",
            "the folder needs tokenizer.json or tokenizer.model; --tokenizer-path names another one",
        ) from None


def _must_fit(tokenizer: PreTrainedTokenizerBase, base: ModelReference) -> None:
    """Refuse a tokenizer with more tokens than a base folder's embedding has rows."""
    if base.kind != "folder":
        return
    config = read_object(Path(base.path) / "config.json")
    inner = config.get("text_config")
    rows = (inner if isinstance(inner, dict) else config).get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, {base.name} only {rows}",
            "they do not belong together: check --tokenizer-path and --base-model",
        )


def load_model(
    model: ModelSettings,
    resolved: ResolvedModel,
    *,
    trainable: bool = False,
    observer: Observer | None = None,
) -> Any:
    """The base with its adapter, in evaluation mode; without gradients unless `trainable`.

    Raises:
        UsageError: the files are not a causal language model, or base and adapter do not fit.
        UnsafeRefused: the weights are pickled or the model wants its own code to run.
        EnvironmentFailure: not enough memory, or the hub cannot be reached.
    """
    observer = observer or Observer()
    device = choose_device(model)
    dtype = choose_dtype(model, device)
    check_quantization(resolved, model.quantization)
    task = "loading weights"
    observer.on_task_start(task, None, "")
    try:
        if resolved.base.kind == "config":
            loaded = _to_device(_new_model(resolved, dtype), device)
        else:
            spread = gpus_of_the_model(model)
            loaded = load_base(
                resolved.base, dtype, device, spread, quantization=model.quantization, observer=observer
            )
        if resolved.adapter is not None:
            recorded = resolved.adapter.base
            if recorded is not None and recorded.path != resolved.base.path:
                observer.on_notice(
                    f"{resolved.adapter.name} was made over {recorded.name}, not {resolved.base.name}"
                )
            loaded = attach_adapter(loaded, Path(resolved.adapter.path), trainable=trainable)
    finally:
        observer.on_task_end(task)
    loaded.eval()
    if not trainable:
        loaded.requires_grad_(False)
    return loaded


def must_be_loadable_alone(model: Any, name: str) -> None:
    """See that what is written of a model can be read again.

    The library takes the text part of some models (Llama 3.2 Vision, Emu3) out of the whole, and has no way to load
    that part by itself.

    Raises:
        UsageError: it has none.
    """
    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"{name} is loaded as the text part of a larger model, which cannot be saved as a model of its own",
            "train a LoRA adapter over it, and leave that an adapter: --lora-model takes it in every command",
        )


def load_base(
    base: ModelReference,
    dtype: torch.dtype,
    device: torch.device,
    gpus: int = 1,
    *,
    kind: Any = AutoModelForCausalLM,
    config: Any = None,
    may_lack: Collection[str] = (),
    quantization: str | None = None,
    kept: tuple[str, ...] = (),
    observer: Observer | None = None,
) -> Any:
    """The weights of a base model on `device`, or its layers spread over the first `gpus` GPUs.

    Args:
        kind: the class; a reward model's is found by `score_head.class_with_head`, with the `config` that it takes.
        may_lack: weights that the files need not have.
        quantization: "8bit" or "4bit"; the layers that are `kept`, and the output head, are not.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    source = base.path
    if base.kind == "gguf":
        from transformers import GgufConfig

        source = str(Path(base.path).parent)
        options |= {"gguf_file": Path(base.path).name, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options["use_safetensors"] = True
    if quantization:
        options["quantization_config"] = quantization_config(quantization, dtype, kept)
    quantised = quantization is not None or stored_quantization(base) == "bitsandbytes"
    if quantised:
        options["device_map"] = {"": device}  # bitsandbytes' weights are not moved later
    if gpus > 1:
        free = {number: torch.cuda.mem_get_info(number)[0] for number in range(gpus)}
        options |= {"device_map": "balanced", "max_memory": free}
    with _explained(base):
        _refuse_unsafe(base)
        weight_files_of(base)
        if base.kind == "folder" and processes.rank() == 0:
            check_pulled(Path(base.path), observer or Observer())
        if base.kind == "gguf":
            check_gguf_blocks(base.name, Path(base.path))
        if quantization:
            _refuse_experts(base, quantization)
        if kind is AutoModelForCausalLM:
            _refuse_reward_model(base)
        else:
            options["config"] = config
        try:
            loaded, found = kind.from_pretrained(source, output_loading_info=True, **options)
        except RuntimeError as problem:
            explain_shapes(base.name, problem)
            raise
    _must_be_complete(base.name, set(found["missing_keys"]) - set(may_lack))
    files = weight_files_of(base)
    check_all_used(base.name, files, loaded, found["unexpected_keys"], observer or Observer())
    # All processes read the same files, and under FSDP the others have no weights yet.
    if processes.rank() == 0:
        if quantised or is_spread(loaded):
            check_numbers_in(base.name, files)
        else:
            check_numbers(base.name, loaded, dtype)
    choose_by_text(loaded)
    if quantised:
        compute_alike(loaded)
    if gpus == 1 and not quantised:
        loaded = _to_device(loaded, device)
    if kind is AutoModelForCausalLM:
        must_be_causal(loaded, base.name)
    return loaded


def _refuse_experts(base: ModelReference, quantization: str) -> None:
    if has_experts(AutoConfig.from_pretrained(base.path, trust_remote_code=False)):
        raise UsageError(
            f"--load-in-{quantization}: {base.name} routes tokens to experts, which bitsandbytes leaves as they are",
            "leave the option out and take --dtype bf16, or take a model without experts",
        )


def read_config(resolved: ResolvedModel) -> Any:
    """The configuration of a base: a folder's, a hub model's, a GGUF file's, or that of a new model.

    Raises:
        UsageError: it is none. EnvironmentFailure: the hub does not give it.
    """
    if resolved.base.kind == "config":
        return config_of_new_model(resolved)
    return config_of(resolved.base)


def config_of(base: ModelReference) -> Any:
    """The configuration of a base that has weights: a folder's, a hub model's or a GGUF file's.

    Raises:
        UsageError: it is none. EnvironmentFailure: the hub does not give it.
    """
    with _explained(base):
        if base.kind == "gguf":
            return gguf_config(Path(base.path))
        if base.kind == "hub":
            check_sizes(PreTrainedConfig.get_config_dict(base.path)[0], base.path)
        return AutoConfig.from_pretrained(base.path, trust_remote_code=False)


def _new_model(resolved: ResolvedModel, dtype: torch.dtype) -> Any:
    """A model with random weights, which follow from the random state, and rows for the tokenizer's tokens.

    Raises:
        UsageError: the file is no configuration of a causal language model.
    """
    with _explained_config(Path(resolved.base.path)):
        config = config_of_new_model(resolved)
        return choose_by_text(AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False))


def config_of_new_model(resolved: ResolvedModel) -> Any:
    """The configuration of a new model, with rows for the tokenizer's tokens.

    Raises:
        UsageError: the file is none.
    """
    path = Path(resolved.base.path)
    content = read_sizes(path)
    tokenizer = read_tokenizer(resolved.tokenizer)
    with _explained_config(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        given = content.get("vocab_size", 0)
        config.vocab_size = max(given, -(-len(tokenizer) // 64) * 64)  # a multiple of 64 is faster
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        return config


def _unread(file: Any, loaded: dict[str, torch.Tensor]) -> list[str]:
    """Names of LoRA's weights that are not in the model as they are in the file, for which PEFT has but a warning."""
    found = []
    for name in file.keys():  # noqa: SIM118 - no mapping
        weight = loaded.get(name)
        if ".lora_" not in name or weight is None or weight.is_meta or is_shared(weight):
            continue
        if not torch.equal(file.get_tensor(name).to(weight.dtype), weight.cpu()):
            found.append(name)
    return found


def _explained_config(path: Path) -> Any:
    hint = 'expected a config.json with "model_type" and sizes; --debug shows more'
    return building(path, "no model can be made of it", hint)


def attach_adapter(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """Put a PEFT adapter over its base.

    Raises:
        UsageError: the shapes differ: it was trained over another base or vocabulary.
        UnsafeRefused: the adapter is pickled.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsafeRefused(
                f"{folder}: the adapter is pickled (adapter_model.bin)", "convert it to safetensors"
            )
        raise UsageError(f"{folder} has no adapter_model.safetensors", "was the copy complete?")
    if _config_of(folder).get("task_type") == "SEQ_CLS":
        raise UsageError(f"{folder} is a reward model: it scores answers", "medgpt score takes it")
    misfit = UsageError(
        f"the adapter in {folder} does not fit this base model: it was trained over another one",
        "leave out --base-model: the adapter knows its base",
    )
    check_numbers_in(str(folder), [folder / "adapter_model.safetensors"])
    with building(folder, "no adapter over this base model can be made of adapter_config.json"):
        try:
            own_tables = _restore_rows(model, folder / "adapter_model.safetensors")
            attached = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        except SafetensorError:
            raise UsageError(
                f"{folder}: adapter_model.safetensors is damaged", "was the copy complete?"
            ) from None
        except (RuntimeError, ValueError, KeyError) as problem:
            if "size mismatch" in str(problem) or "not found in the base model" in str(problem):
                raise misfit from None
            raise
        # PEFT only warns where the file and the model have different layers; the rest would stay untrained.
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            expected = get_peft_model_state_dict(attached, save_embedding_layers=False)
            # Of tables that were resized, PEFT saves copies under several names.
            different = set(file.keys()) ^ set(expected)
            if any(not name.startswith(tuple(own_tables)) for name in different):
                raise misfit
            if unread := _unread(file, expected):
                raise MedgptError(
                    f"{folder}: PEFT does not read {len(unread)} weights of the adapter, the first is {unread[0]}",
                    "please report this with the adapter's adapter_config.json",
                )
    return attached


def _config_of(adapter: Path) -> dict[str, Any]:
    return read_object(adapter / "adapter_config.json")


def _restore_rows(model: Any, file: Path) -> set[str]:
    """Give the model as many embedding rows as an adapter that brings its own embeddings has.

    Adapters that were trained after a resize hold the whole tables, of another length than the base's.

    Returns:
        The names of these tables, with a dot behind each, as the adapter's entries begin.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {f"base_model.model.{name}." for name, module in model.named_modules() if module in tables}
    with safe_open(file, "pt") as content:
        own = {name for name in names if f"{name}weight" in content.keys()}  # noqa: SIM118 - no mapping
        rows = {content.get_slice(f"{name}weight").get_shape()[0] for name in own}
    if rows and rows != {tables[0].weight.shape[0]}:
        model.resize_token_embeddings(max(rows), mean_resizing=False)
    return own


def _must_be_complete(name: str, missing: Collection[str]) -> None:
    """Refuse files that lack weights: the library would fill them in with random numbers."""
    if missing:
        raise UsageError(
            f"{name}: {len(missing)} weights are missing, the first is {sorted(missing)[0]}",
            "is the copy complete, and is it a causal language model?",
        )


def _refuse_unsafe(base: ModelReference) -> None:
    folder = base.folder
    if base.kind == "hub":
        check_sizes(PreTrainedConfig.get_config_dict(base.path)[0], base.path)
    if base.kind != "folder" or folder is None:
        return
    config = read_object(folder / "config.json")
    if "auto_map" in config and config.get("model_type") not in _known_types():
        raise UnsafeRefused(
            f"{base.name} wants to run code of its own (auto_map in config.json)",
            "medgpt runs no code from a model; use a version of the model that transformers supports",
        )
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise UnsafeRefused(
            f"{base.name}: the weights are pickled (.bin), and loading them could run code",
            "convert them to safetensors, or take the model's safetensors version",
        )


def _refuse_reward_model(base: ModelReference) -> None:
    """One with tied embeddings would load as a language model, and speak as one that was trained to score."""
    config = Path(base.path) / "config.json"
    if base.kind == "folder" and "SequenceClassification" in str(read_object(config).get("architectures")):
        raise UsageError(f"{base.name} is a reward model: it scores answers", "medgpt score takes it")


def _known_types() -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES


@contextlib.contextmanager
def _explained(base: ModelReference) -> Any:
    try:
        yield
    except (MedgptError, MemoryError):
        raise
    except torch.OutOfMemoryError:
        raise EnvironmentFailure(
            f"{base.name} does not fit into the GPU's memory", "--dtype bf16, or --use-cpu"
        ) from None
    except ImportError as problem:  # some towers for pictures come from packages of their own
        wanted = re.search(r"pip install ([\w.-]+)", str(problem))
        raise EnvironmentFailure(
            f"{base.name} needs a package that is not installed",
            f"pip install {wanted[1]}" if wanted else "--debug says which one",
        ) from problem
    except Exception as problem:  # whatever a library makes of files that it cannot use
        if is_about_memory(problem):
            raise
        if base.kind == "hub":
            raise EnvironmentFailure(
                f"{base.name} is no local folder, and the hub does not give it ({type(problem).__name__})",
                "check the name; offline, only models in the cache can be used",
            ) from None
        raise UsageError(
            f"{base.name} cannot be loaded as a causal language model ({type(problem).__name__})",
            "the folder needs config.json and *.safetensors; --debug shows more",
        ) from problem


def _to_device(model: Any, device: torch.device) -> Any:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return model  # it goes there in shares
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        raise EnvironmentFailure(
            "the model does not fit into the GPU's memory", "--dtype bf16, or --use-cpu"
        ) from None
