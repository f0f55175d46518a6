"""TRL's PPOTrainer on a job that `ppo_beside_trl.py` wrote; runs in an environment with trl 1.12, the last to have one.

    PYTHON tests/benchmarks/trl_ppo_reference.py JOB.json

It imports nothing of ours. What the library would choose by itself and the job does not is set explicitly.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import datasets
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Lines(TrainerCallback):
    """One line a step: score, KL in nats an answer, seconds since the first step began."""

    def __init__(self, path: Path):
        self.path, self.began = path, 0.0

    def on_train_begin(self, *_, **__) -> None:
        self.began = time.monotonic()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        line = {
            "reward": logs["objective/scores"],
            "kl": logs["objective/kl"],
            "seconds": time.monotonic() - self.began,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def load(kind, folder: str, **more):
    return kind.from_pretrained(folder, dtype=torch.float32, **more)


def value_model(job: dict, config: LoraConfig):
    """A model of its own, because the library wants one: base weights, a fresh adapter and a head of zeros."""
    model = load(AutoModelForSequenceClassification, job["model"], num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    inject_adapter_in_model(
        config, model
    )  # a PeftModel would not show the body under the name the library reads
    model.score.requires_grad_(True)
    return model


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    # The library finds ends by the padding token: one that the model cannot draw keeps them right.
    tokenizer.add_special_tokens({"pad_token": "<never drawn>"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {
        "r": job["lora_rank"],
        "lora_alpha": job["lora_alpha"],
        "lora_dropout": 0.0,
        "target_modules": targets,
    }
    arguments = PPOConfig(
        output_dir=job["output_dir"],
        seed=job["seed"],
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=1,
        num_mini_batches=job["batch_size"] // job["minibatch_size"],
        num_ppo_epochs=job["ppo_epochs"],
        total_episodes=job["steps"] * job["batch_size"],
        local_rollout_forward_batch_size=job["forward_batch_size"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        response_length=job["max_new_tokens"],
        temperature=job["temperature"],
        stop_token="eos",
        missing_eos_penalty=None,
        whiten_rewards=False,
        kl_coef=job["kl_coefficient"],
        kl_estimator="k1",
        cliprange=job["clip_range"],
        cliprange_value=job["clip_range_value"],
        vf_coef=job["value_coefficient"],
        gamma=job["gamma"],
        lam=job["gae_lambda"],
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,  # its loop never switches it on
        use_cpu=True,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, job["model"]),
        ref_model=None,  # the policy without its adapter
        reward_model=load(AutoModelForSequenceClassification, job["reward_model"], num_labels=1),
        value_model=value_model(job, LoraConfig(**lora)),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in job["prompts"]]),
        callbacks=[Lines(Path(job["lines"]))],
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
