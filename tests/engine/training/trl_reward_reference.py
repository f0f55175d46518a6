"""TRL's RewardTrainer on the pairs, order, initial adapter, head and schedule of a `medgpt reward` run."""

from __future__ import annotations

from pathlib import Path

from tests.engine.training.trl_reference import Rates, rates


def trl_reward_losses(model: Path, folder: Path, run: Path, *, steps: int, pad_token: str) -> list[float]:
    """The loss of each update: its collator, its loss, its loop, and the library's way of finding an answer's end.

    Args:
        pad_token: one that no answer ends with, because the library finds the end by it.
    """
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from medicalgpt_cli.engine.model.loading import load_tokenizer
    from medicalgpt_cli.engine.model.references import resolve_models
    from medicalgpt_cli.engine.model.reward_model import new_reward_model
    from medicalgpt_cli.engine.observer import Observer
    from medicalgpt_cli.engine.run.manifest import read, resumed_settings
    from medicalgpt_cli.engine.training.batches import EpochSampler
    from medicalgpt_cli.engine.training.reward_data import load_reward_data
    from medicalgpt_cli.engine.training.trainer_args import learning_rate, schedule
    from medicalgpt_cli.settings.stages import RewardSettings

    settings = resumed_settings(read(run), RewardSettings(resume=run), run)
    resolved = resolve_models(settings)
    tokenizer = load_tokenizer(settings, resolved)
    pairs = load_reward_data(settings, tokenizer, Observer()).training
    plan = schedule(settings, len(pairs))
    rows: list[dict] = []
    for epoch in range(-(-plan.updates // plan.updates_per_epoch)):
        order = EpochSampler(
            [len(one.chosen) + len(one.rejected) for one in pairs],
            settings.batch_size,
            settings.seed,
            settings.batch_order == "by-length",
        )
        order.set_epoch(epoch)
        rows += [
            {"chosen_ids": pairs[i].chosen, "rejected_ids": pairs[i].rejected, "margin": pairs[i].margin}
            for i in order
        ]
    if settings.margin_column is None:
        rows = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]

    ours = new_reward_model(settings, resolved, Observer())
    net = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=1)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )
    net = get_peft_model(net, config)
    copied = set_peft_model_state_dict(net, get_peft_model_state_dict(ours))
    assert not copied.unexpected_keys and not [name for name in copied.missing_keys if "lora" in name]
    args = RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=steps,
        learning_rate=learning_rate(settings, settings),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        center_rewards_coefficient=settings.centring or None,
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        pad_token=pad_token,
    )
    trainer = RewardTrainer(
        model=net,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Rates(rates(learning_rate(settings, settings), plan.warmup, plan.updates))],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
