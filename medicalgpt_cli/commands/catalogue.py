"""Every subcommand: its name, settings and examples. Its code is `commands/<name>.py`, imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medicalgpt_cli.settings import planning, stages
from medicalgpt_cli.settings.groups import Settings


@dataclass(frozen=True)
class Command:
    name: str  # of one in a group with the group's name in front: "plan sft"
    settings: type[Settings]
    examples: tuple[str, str, str]  # run by the tests, up to the model's name
    panel: str

    @property
    def module(self) -> str:
        return f"medicalgpt_cli.commands.{self.name.split()[0].replace('-', '_')}"


GROUPS = {"plan": "Will a stage fit, and how long will it take? Said without loading weights."}

COMMANDS = (
    Command(
        "pretrain",
        stages.PretrainSettings,
        (
            "medgpt pretrain --base-model smollm2-135m --train-data books.txt",
            "medgpt pretrain --base-model smollm2-135m --train-data zh.jsonl:0.7 --train-data en.jsonl:0.3",
            "medgpt pretrain --base-model smollm2-135m --train-data books.txt --dry-run",
        ),
        "Training",
    ),
    Command(
        "sft",
        stages.SftSettings,
        (
            "medgpt sft --base-model smollm2-135m --train-data train.jsonl",
            "medgpt sft --base-model smollm2-135m --train-data train.jsonl --eval-data dev.jsonl --epochs 3",
            "medgpt sft --base-model smollm2-135m --train-data train.jsonl --dry-run",
        ),
        "Training",
    ),
    Command(
        "reward",
        stages.RewardSettings,
        (
            "medgpt reward --base-model smollm2-135m --train-data pairs.jsonl",
            "medgpt reward --lora-model runs/sft --train-data pairs.jsonl --eval-data dev_pairs.jsonl",
            "medgpt reward --base-model smollm2-135m --train-data pairs.jsonl --dry-run",
        ),
        "Training",
    ),
    Command(
        "rl",
        stages.RlSettings,
        (
            "medgpt rl --lora-model runs/sft --reward-model runs/reward --train-data prompts.jsonl",
            "medgpt rl --base-model smollm2-135m --reward-rule right-option --train-data exam.jsonl",
            "medgpt rl --lora-model runs/sft --reward-model runs/reward --train-data prompts.jsonl --dry-run",
        ),
        "Training",
    ),
    Command(
        "merge-lora",
        stages.MergeLoraSettings,
        (
            "medgpt merge-lora --lora-model runs/sft --output-dir merged",
            "medgpt merge-lora --lora-model runs/sft --output-dir merged --dtype fp32",
            "medgpt merge-lora --base-model smollm2-135m --lora-model runs/sft --output-dir merged",
        ),
        "Training",
    ),
    Command(
        "infer",
        stages.InferSettings,
        (
            "medgpt infer --lora-model runs/sft --data-file in.txt --predictions-file out.json",
            "medgpt infer --base-model smollm2-135m --data-file in.jsonl --predictions-file out.jsonl",
            "medgpt infer --base-model smollm2-135m --data-file in.txt --predictions-file - --max-new-tokens 64",
        ),
        "Use",
    ),
    Command(
        "chat",
        stages.ChatSettings,
        (
            "medgpt chat --lora-model runs/sft",
            "medgpt chat --base-model smollm2-135m --system-prompt 'You are a careful doctor.'",
            "medgpt chat --base-model smollm2-135m --temperature 0.7 --top-p 0.9",
        ),
        "Use",
    ),
    Command(
        "serve-demo",
        stages.ServeSettings,
        (
            "medgpt serve-demo --lora-model runs/sft",
            "medgpt serve-demo --base-model smollm2-135m --port 8000 --feedback-file pairs.jsonl",
            "medgpt serve-demo --lora-model runs/sft --host 0.0.0.0 --auth-file users.txt",
        ),
        "Use",
    ),
    Command(
        "data",
        stages.InspectDataSettings,
        (
            "medgpt data train.jsonl",
            "medgpt data train.jsonl --base-model smollm2-135m --max-length 512",
            "medgpt data export.xlsx --output clean.jsonl --split 0.9/0.1 --deduplicate",
        ),
        "Tools",
    ),
    Command(
        "vocabulary",
        stages.VocabularySettings,
        (
            "medgpt vocabulary --base-model smollm2-135m --train-data corpus.jsonl --output-dir wider",
            "medgpt vocabulary --base-model smollm2-135m --train-data corpus.txt --output-dir wider "
            "--size 16000 --check-data general.txt",
            "medgpt vocabulary --base-model smollm2-135m --train-data corpus.txt --output-dir wider "
            "--sentencepiece-model words.model --max-new 2000",
        ),
        "Tools",
    ),
    Command(
        "score",
        stages.ScoreSettings,
        (
            "medgpt score --reward-model runs/reward --data-file pairs.jsonl --predictions-file scores.jsonl",
            "medgpt score --reward-model runs/reward --data-file answers.jsonl --predictions-file -",
            "medgpt score --reward-model runs/reward --data-file pairs.jsonl --predictions-file scores.jsonl --json",
        ),
        "Tools",
    ),
    Command(
        "plan pretrain",
        planning.PlanPretrainSettings,
        (
            "medgpt plan pretrain --base-model smollm2-135m --train-data books.txt --throughput 1500",
            "medgpt plan pretrain --base-model smollm2-135m --train-data books.txt --tuning full "
            "--plan-for gpu --device-memory 24GB",
            "medgpt plan pretrain --base-model smollm2-135m --train-data books.txt --devices 4",
        ),
        "Tools",
    ),
    Command(
        "plan sft",
        planning.PlanSftSettings,
        (
            "medgpt plan sft --base-model smollm2-135m --train-data train.jsonl --throughput 1500",
            "medgpt plan sft --base-model smollm2-135m --train-data train.jsonl --load-in-4bit "
            "--plan-for gpu --device-memory 24GB",
            "medgpt plan sft --base-model smollm2-135m --train-data train.jsonl --throughput runs/sft",
        ),
        "Tools",
    ),
    Command(
        "plan reward",
        planning.PlanRewardSettings,
        (
            "medgpt plan reward --base-model smollm2-135m --train-data pairs.jsonl --throughput 1500",
            "medgpt plan reward --lora-model runs/sft --train-data pairs.jsonl --throughput 1500",
            "medgpt plan reward --base-model smollm2-135m --train-data pairs.jsonl --devices 2 --json",
        ),
        "Tools",
    ),
    Command(
        "plan rl",
        planning.PlanRlSettings,
        (
            "medgpt plan rl --lora-model runs/sft --reward-model runs/reward --train-data prompts.jsonl",
            "medgpt plan rl --base-model smollm2-135m --reward-rule right-option --train-data exam.jsonl "
            "--throughput 500",
            "medgpt plan rl --lora-model runs/sft --reward-model runs/reward --train-data prompts.jsonl "
            "--plan-for gpu --device-memory 80GB",
        ),
        "Tools",
    ),
    Command(
        "plan infer",
        planning.PlanInferSettings,
        (
            "medgpt plan infer --base-model smollm2-135m --data-file questions.txt",
            "medgpt plan infer --lora-model runs/sft --data-file questions.txt --plan-for gpu --device-memory 24GB",
            "medgpt plan infer --base-model smollm2-135m --data-file questions.txt --batch-size 64 --json",
        ),
        "Tools",
    ),
    Command(
        "pipeline",
        stages.PipelineSettings,
        (
            "medgpt pipeline --recipe pipeline.yaml",
            "medgpt pipeline --recipe pipeline.yaml --dry-run",
            "medgpt pipeline --recipe pipeline.yaml --output-dir runs/second",
        ),
        "Tools",
    ),
    Command(
        "quickstart",
        stages.QuickstartSettings,
        ("medgpt quickstart", "medgpt quickstart --output-dir runs/try", "medgpt quickstart --json"),
        "Tools",
    ),
    Command(
        "pull",
        stages.PullSettings,
        (
            "medgpt pull --list",
            "medgpt pull smollm2-135m",
            "medgpt pull smollm2-135m --from-file smollm2.gguf",
        ),
        "Tools",
    ),
    Command("env", stages.EnvSettings, ("medgpt env", "medgpt env --json", "medgpt env --debug"), "Tools"),
)


def find(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that `words` begin with, and the words behind its name."""
    for length in (2, 1):
        name = " ".join(words[:length])
        for command in COMMANDS:
            if command.name == name:
                return command, list(words[length:])
    raise LookupError(" ".join(words))
