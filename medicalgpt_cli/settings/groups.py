"""Settings that several commands share. A command's settings inherit the groups that it needs.

Engine functions take the narrowest group: `load_model(model: ModelSettings)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import check_bounds, flag_of, opt, options_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The root of all groups."""

    panel: ClassVar[str] = "Options"

    # Where each value came from: flag, environment, recipe or default. The bridge fills it in.
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_bounds(self)
        self.check()

    def check(self) -> None:
        """Rules between fields. Raises UsageError. Overrides call `super().check()`."""

    def chosen(self, name: str) -> bool:
        """Whether a person decided on a field: one that differs from its default, or was given as a flag or variable.

        A recipe that a run leaves spells every default out; these decide nothing.
        """
        is_default = getattr(self, name) == options_of(self)[name][0].default
        return not is_default or self.origins.get(name, "default") in ("flag", "environment")


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """How a command speaks; every command has these."""

    panel: ClassVar[str] = "Output"

    json: bool = opt(False, "Print one JSON object on stdout; everything else goes to stderr.")
    debug: bool = opt(False, "Show the traceback of an error.")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    panel: ClassVar[str] = "Device"

    use_cpu: bool = opt(False, "Run on the processor even where a GPU is present.", aliases=("--only-cpu",))
    gpus: str | None = opt(None, "Which of the visible GPUs to use.", metavar="0,1")
    dtype: str = opt(
        "auto",
        "Number format of the weights in memory; auto takes bf16 where the hardware computes it natively.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )

    def check(self) -> None:
        super().check()
        if self.gpus is None:
            return
        if self.use_cpu:
            raise UsageError("--use-cpu and --gpus contradict each other", "give one of them")
        if not all(part.strip().isdigit() for part in self.gpus.split(",")):
            raise UsageError(f"--gpus {self.gpus}: not a list of device numbers", "for example --gpus 0,1")
        if len(set(self.gpu_numbers)) != len(self.gpu_numbers):
            raise UsageError(f"--gpus {self.gpus}: a device is named twice", "name each device once")

    @property
    def gpu_numbers(self) -> tuple[int, ...]:
        """The devices of `--gpus`, empty where it was not given."""
        return tuple(int(part) for part in self.gpus.split(",")) if self.gpus else ()

    @property
    def quantization(self) -> str | None:
        """In which way the base's weights are quantised as they are loaded: "8bit", "4bit" or not at all."""
        return None

    @property
    def wanted_processes(self) -> int:
        """In how many processes a command works that can work in several."""
        return 1


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    panel: ClassVar[str] = "Device"

    force: bool = opt(False, "Go on although it is expected not to fit into memory.")


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings(DeviceSettings):
    panel: ClassVar[str] = "Device"

    load_in_8bit: bool = opt(False, "Hold the base's weights in 8 bits (LLM.int8()).")
    load_in_4bit: bool = opt(False, "Hold the base's weights in 4 bits (nf4, double quantisation).")

    def check(self) -> None:
        super().check()
        if self.load_in_8bit and self.load_in_4bit:
            raise UsageError("--load-in-8bit and --load-in-4bit contradict each other", "give one of them")

    @property
    def quantization(self) -> str | None:
        return "8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None


@dataclass(frozen=True, kw_only=True)
class NamedModelSettings(Settings):
    """Which model and tokenizer; enough where no weights are loaded."""

    panel: ClassVar[str] = "Model"

    base_model: str | None = opt(
        None,
        "A model folder, hub name, medgpt run folder, .gguf file or pulled name; "
        "where no model is named, the starter (a small demonstration model).",
        metavar="NAME",
    )
    lora_model: str | None = opt(
        None, "An adapter folder or run folder; its base is found by itself.", metavar="NAME"
    )
    tokenizer_path: str | None = opt(
        None, "Tokenizer folder; falls back to the adapter's, then the base model's.", metavar="DIR"
    )
    template: str | None = opt(
        None,
        "Chat template for a model that has none: plain, alpaca, chatml or a Jinja file.",
        metavar="NAME|FILE",
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(NamedModelSettings, DeviceSettings):
    """Which model, and where its weights go."""


@dataclass(frozen=True, kw_only=True)
class OtherBaseSettings(Settings):
    """Whether an adapter or an interrupted run may meet another base than it was made over."""

    panel: ClassVar[str] = "Model"

    accept_other_base: bool = opt(
        False,
        "Take a base whose files are not those that the adapter or run was made over, "
        "such as a converted or re-sharded copy.",
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Settings):
    panel: ClassVar[str] = "Tuning"

    tuning: str = opt("lora", "Train a LoRA adapter, or all weights.", choices=("lora", "full"))
    lora_rank: int = opt(8, "Rank of the adapter.", min=1, max=4096)
    lora_alpha: float = opt(16.0, "Scale of the adapter: its output is multiplied by alpha / rank.", above=0)
    lora_dropout: float = opt(0.05, "Dropout in front of the adapter.", min=0, max=0.99)
    target_modules: tuple[str, ...] = opt(
        ("all",),
        "Layers that get an adapter: all (every linear layer but the head; beside experts, attention's), or names.",
    )
    dora: bool = opt(False, "Weight-decomposed LoRA (DoRA).")
    rslora: bool = opt(False, "Rank-stabilised LoRA: scale by alpha / sqrt(rank).")
    embeddings: str = opt(
        "auto",
        "Which rows of the embeddings learn beside the adapter: the ones that `medgpt vocabulary` added "
        "(auto where there are any), all, or none.",
        choices=("auto", "new", "all", "frozen"),
    )

    def check(self) -> None:
        super().check()
        if self.tuning == "full":
            self.refuse_adapter_options("--tuning full")

    def refuse_adapter_options(self, instead: str) -> None:
        """
        Raises:
            UsageError: an option about adapters was chosen where all weights are trained.
        """
        about_adapters = options_of(self).keys() & {*AdapterSettings.__annotations__} - {"tuning"}
        for name in sorted(about_adapters):
            if self.chosen(name):
                raise UsageError(
                    f"{flag_of(name)} is about an adapter, and {instead} trains all weights",
                    f"leave out {flag_of(name)} or {instead}",
                )


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(Settings):
    """How files are read where they do not say it themselves."""

    panel: ClassVar[str] = "Data"

    columns: tuple[str, ...] = opt(
        (),
        "Which columns of a table or keys of a record are meant by the keys that medgpt reads: "
        "question=患者问题,answer=医生回答.",
        metavar="KEY=NAME,…",
    )
    sheet: str | None = opt(
        None,
        "Name or number of the sheet of a workbook; the first with data where not given.",
        metavar="NAME",
    )
    encoding: str | None = opt(
        None,
        "Encoding of all text, JSON and .csv files; UTF-8, GB18030 or UTF-16 as found where not given.",
        metavar="NAME",
    )
    strict: bool = opt(False, "Refuse data with a key that nothing is made of.")
    ignore: tuple[str, ...] = opt(
        (), "A key that is not needed, and is left out whatever it holds; can be repeated.", metavar="KEY"
    )


@dataclass(frozen=True, kw_only=True)
class GroupSettings(Settings):
    """Which records belong together."""

    panel: ClassVar[str] = "Data"

    group: str | None = opt(
        None,
        "The key whose value says which records belong together (a patient, a document): "
        "all of a group stand on one side of a split.",
        metavar="KEY",
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings(ReadingSettings):
    panel: ClassVar[str] = "Data"

    train_data: tuple[str, ...] = opt(
        (),
        "A file, folder or hub data set to learn from; can be repeated. FILE:0.7 gives it the weight 0.7.",
        metavar="PATH",
    )
    eval_data: tuple[str, ...] = opt((), "Held-out data to measure on; can be repeated.", metavar="PATH")
    eval_fraction: float = opt(
        0.05, "Share of the training data held out where no --eval-data is given.", min=0, max=0.5
    )
    max_samples: int | None = opt(
        None, "Use at most this many training records: the first of each file, shared over the files.", min=1
    )

    def check(self) -> None:
        super().check()
        if not self.train_data and getattr(self, "resume", None) is None:  # a resumed run knows its data
            raise UsageError(
                "--train-data is missing",
                "name a file, a folder or a hub data set; `medgpt data FILE` shows what a file holds",
            )
        if self.eval_data and self.chosen("eval_fraction") and self.eval_fraction > 0:
            raise UsageError("--eval-fraction has no effect beside --eval-data", "give one of them")


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(Settings):
    """How plain text becomes documents."""

    panel: ClassVar[str] = "Data"

    text_unit: str = opt(
        "auto",
        "What one document of a text file is; auto: blocks between blank lines where there are any, else lines.",
        choices=("auto", "line", "block", "file"),
    )


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings(Settings):
    """Which model scores answers."""

    panel: ClassVar[str] = "Model"

    reward_model: str | None = opt(
        None, "A run of `medgpt reward`, a reward model's folder or a hub name.", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class ExampleSettings(Settings):
    """How conversations become batches; pretraining packs blocks instead."""

    panel: ClassVar[str] = "Data"

    max_length: int = opt(1024, "Longest example in tokens.", min=8)
    batch_order: str = opt(
        "by-length",
        "Which examples meet in a batch: of similar length, or any.",
        choices=("by-length", "shuffled"),
    )
    layout: str = opt(
        "padding-free",
        "Examples of a batch end to end where the model allows it, or padded to the longest.",
        choices=("padding-free", "padded"),
    )


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Settings):
    panel: ClassVar[str] = "Optimisation"

    batch_size: int = opt(4, "Examples a step on each device.", min=1)
    gradient_accumulation: int = opt(1, "Steps whose gradients are summed before an update.", min=1)
    epochs: float = opt(1.0, "Passes over the training data.", above=0)
    max_steps: int | None = opt(None, "Stop after this many updates (wins over --epochs).", min=1)
    learning_rate: float | None = opt(
        None,
        "Peak learning rate; 2e-4 for LoRA, 2e-5 for full tuning and 1e-3 for a new model where not given.",
        above=0,
    )
    schedule: str = opt(
        "cosine", "Course of the learning rate after warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = opt(
        0.03, "Share of the updates in which the learning rate rises to its peak.", min=0, max=1
    )
    warmup_steps: int | None = opt(None, "Updates in which it rises, instead of a share of them.", min=0)
    optimizer: str = opt(
        "adamw",
        "AdamW with its moments in 32 bits, in 8 bits, or paged out to the host where a GPU's memory is full.",
        choices=("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"),
    )
    weight_decay: float = opt(0.0, "AdamW's weight decay.", min=0)
    max_grad_norm: float = opt(
        1.0,
        "Clip the gradient's norm to this; in rl the policy's and the value function's, each by itself.",
        above=0,
    )
    neftune_alpha: float | None = opt(None, "Noise on the embeddings (NEFTune); 5 is usual.", above=0)
    gradient_checkpointing: bool = opt(False, "Recompute activations: less memory, about a third slower.")
    eval_steps: int | None = opt(
        None, "Updates between measurements; a tenth of the run, at least 20.", min=1
    )
    save_steps: int | None = opt(None, "Updates between checkpoints; a tenth of the run, at least 10.", min=1)
    keep_checkpoints: int = opt(2, "How many checkpoints to keep.", min=1)
    log_steps: int = opt(1, "Updates between lines of metrics.jsonl.", min=1)
    early_stopping: int | None = opt(
        None, "Stop after this many measurements without a better held-out loss.", min=1
    )
    seed: int = opt(42, "Seed of everything random.", min=0)

    def check(self) -> None:
        super().check()
        if self.warmup_steps is not None and self.chosen("warmup_ratio"):
            raise UsageError("--warmup-steps and --warmup-ratio contradict each other", "give one of them")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(Settings):
    """Faster kernels, where the hardware and the installed packages have them; never taken unasked."""

    panel: ClassVar[str] = "Speed"

    attention: str = opt(
        "auto",
        "What computes attention over training batches: torch's, an example at a time (auto) or with a mask "
        "(sdpa), the model's own code (eager), or FlashAttention on a GPU.",
        choices=("auto", "sdpa", "eager", "flash2", "flash3"),
    )
    liger: bool = opt(False, "Liger's kernels for norms, positions and gated layers; on a GPU.")
    compile: bool = opt(
        False, "Compile the model's layers (torch.compile): a slow first step, faster ones later."
    )
    fp8: bool = opt(False, "Multiply in 8-bit floats (torchao); --tuning full on a GPU that has them.")


@dataclass(frozen=True, kw_only=True)
class RunSettings(MemorySettings, OutputSettings):
    panel: ClassVar[str] = "Run"

    output_dir: Path | None = opt(
        None, "The run folder; runs/<stage>-<model>-<time> where not given.", metavar="DIR"
    )
    resume: Path | None = opt(None, "Go on with this interrupted run folder.", metavar="RUN")
    group_readable: bool = opt(
        False,
        "Let the run folder's group read model/, for a server of another user; all else stays readable by you alone.",
    )
    dry_run: bool = opt(False, "Show data, steps and settings; load no weights and write nothing.")
    report_to: tuple[str, ...] = opt(
        (), "Experiment trackers, for example tensorboard or wandb; none where not given."
    )

    def check(self) -> None:
        super().check()
        if self.resume and self.output_dir:
            raise UsageError(
                "--resume and --output-dir contradict each other", "a resumed run goes on in its own folder"
            )


@dataclass(frozen=True, kw_only=True)
class ThinkingSettings(Settings):
    """Whether a model that can reason in front of its answer is asked to."""

    panel: ClassVar[str] = "Answers"

    thinking: str = opt(
        "auto",
        "Reasoning in front of an answer, where the chat template has a switch; auto is its default.",
        choices=("auto", "on", "off"),
    )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(ThinkingSettings):
    panel: ClassVar[str] = "Answers"

    max_new_tokens: int = opt(512, "Longest answer in tokens.", min=1)
    temperature: float = opt(0.0, "0 takes the likeliest token each time (greedy); above 0 draws.", min=0)
    top_p: float = opt(1.0, "Draw from the likeliest tokens that make up this share.", above=0, max=1)
    top_k: int = opt(0, "Draw from this many likeliest tokens; 0 means all.", min=0)
    repetition_penalty: float = opt(1.0, "Above 1 makes tokens already used less likely.", above=0)
    no_repeat_ngram: int = opt(0, "Never repeat a run of this many tokens; 0 means off.", min=0)
    stop: tuple[str, ...] = opt(
        (), "Stop when the answer contains this text; can be repeated.", metavar="TEXT"
    )
    seed: int = opt(42, "Seed of the draw.", min=0)
    system_prompt: str | None = opt(None, "System message in front of each conversation.", metavar="TEXT")
    max_context: int | None = opt(
        None, "Tokens of question and answer together; the model's own limit where not given.", min=16
    )

    def check(self) -> None:
        super().check()
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            flag = "--top-p" if self.top_p < 1 else "--top-k"
            raise UsageError(
                f"{flag} has no effect at temperature 0", "add --temperature 0.7, or leave it out"
            )
        if "" in self.stop:
            raise UsageError("--stop is empty", "give the text to stop at")


@dataclass(frozen=True, kw_only=True)
class EndpointSettings(
    SamplingSettings, QuantizationSettings, OtherBaseSettings, ModelSettings, MemorySettings
):
    """A model of one's own, or one behind a server."""

    panel: ClassVar[str] = "Endpoint"

    endpoint: str | None = opt(
        None,
        "Use an OpenAI-compatible server (vLLM, SGLang, llama.cpp) instead of a model here.",
        metavar="URL",
    )
    endpoint_model: str | None = opt(None, "The server's model; needed where it has several.", metavar="NAME")
    endpoint_key_file: Path | None = opt(
        None, "A file with the server's API key; else the variable MEDGPT_ENDPOINT_KEY.", metavar="FILE"
    )

    def check(self) -> None:
        super().check()
        if self.endpoint is None:
            for name in ("endpoint_model", "endpoint_key_file"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{flag_of(name)} goes with --endpoint", "add --endpoint URL")
            return
        if not self.endpoint.startswith(("http://", "https://")):
            raise UsageError(
                f"--endpoint {self.endpoint}: not an address", "for example http://127.0.0.1:8000/v1"
            )
        groups = (NamedModelSettings, OtherBaseSettings, DeviceSettings, QuantizationSettings, MemorySettings)
        own = {name for group in groups for name in group.__annotations__} & options_of(self).keys()
        for name in sorted(own | {"repetition_penalty", "no_repeat_ngram", "max_context"}):
            if self.chosen(name):
                raise UsageError(
                    f"{flag_of(name)} has no effect on the model of another server",
                    f"leave out {flag_of(name)}",
                )
