"""Policy, reference, value and reward over one copy of the base weights.

policy      the adapter that learns: a new one, or the sft adapter going on
reference   the model as rl found it: no adapter, or a frozen copy of the sft adapter
value       for PPO: an adapter of its own with a scalar head; it starts from the reward model where that fits
            (its head once it is known in which units scores are learnt from: `PPOTrainer._start_values`)
reward      the reward model's adapter and head, frozen; a reward model over other weights stays apart
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from medicalgpt_cli.engine.model.parts import body_of
from medicalgpt_cli.engine.model.references import ModelReference, ResolvedModel
from medicalgpt_cli.engine.model.score_head import HEAD
from medicalgpt_cli.engine.training.losses import log_probabilities
from medicalgpt_cli.errors import UsageError

POLICY = "default"  # PEFT's name for an adapter that stands alone


class Roles(torch.nn.Module):
    """One base under several adapters. `policy` is an ordinary PeftModel; save that."""

    def __init__(
        self, policy: Any, *, has_reference: bool, reward: ModelReference | None, has_value: bool = True
    ):
        """
        Args:
            policy: a PeftModel whose adapter learns.
            has_reference: whether rl starts from that adapter; its weights as they are become the reference.
            reward: a reward adapter over the same base, or None.
            has_value: whether there is a value function; only PPO has one.
        """
        super().__init__()
        self.policy = policy
        self.has_reference = has_reference
        config = policy.peft_config[POLICY]
        width = policy.get_output_embeddings().in_features  # BLT's configuration does not say
        device = policy.get_input_embeddings().weight.device
        own = _adapter_weights(policy, POLICY)
        if has_reference:
            _add(policy, "reference", config, own)
        self.reward_head: torch.nn.Linear | None = None
        self.value_head: torch.nn.Linear | None = None
        if has_value:
            self.value_head = torch.nn.Linear(width, 1, device=device)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)
        if reward is not None:
            theirs, head = _reward_weights(reward)
            reward_config = _as_language_adapter(Path(reward.path))
            _add(policy, "reward", reward_config, theirs)
            self.reward_head = torch.nn.Linear(width, 1, bias="bias" in head, device=device)
            for name, values in head.items():
                getattr(self.reward_head, name).data.copy_(values)
            if self.value_head is not None:
                _add(policy, "value", reward_config, theirs)
        elif self.value_head is not None:
            _add(policy, "value", config, own if has_reference else None)
        self.learning = {
            "policy": _of_adapter(policy, POLICY),
            "value": _of_adapter(policy, "value"),
        }
        if self.value_head is not None:
            self.learning["value"] += [self.value_head.weight, self.value_head.bias]
        for weight in self.learning["policy"] + self.learning["value"]:
            weight.data = weight.data.float()
        _no_dropout(policy)
        self.role = "policy"
        self._activate(self.role)

    @property
    def config(self) -> Any:
        return self.policy.config

    @property
    def device(self) -> torch.device:
        return self.policy.get_input_embeddings().weight.device

    def get_base_model(self) -> Any:
        """The library's model under all adapters."""
        return self.policy.get_base_model()

    def set_attn_implementation(self, name: str) -> None:
        self.policy.set_attn_implementation(name)

    def _activate(self, role: str) -> None:
        """Switch the adapter. PEFT then marks the others as frozen; what learns is marked again."""
        self.policy.set_adapter(POLICY if role == "policy" else role)
        self.requires_grad_(False)
        for weight in self.learning["policy"] + self.learning["value"]:
            weight.requires_grad_(True)

    @contextmanager
    def acting_as(self, role: str) -> Iterator[Any]:
        """Inside, the base computes as "policy", "reference", "value" or "reward"; afterwards as before.

        A backward pass belongs inside, too: it may compute layers anew (`recomputing`).
        """
        before, self.role = self.role, role
        try:
            if role == before:
                yield self.policy
            elif role == "reference" and not self.has_reference:
                with self.policy.disable_adapter():
                    yield self.policy
            else:
                self._activate(role)
                yield self.policy
        finally:
            self.role = before
            if role != before:
                self._activate(before)

    @property
    def can_recompute(self) -> bool:
        return bool(self._recomputable)

    @property
    def _recomputable(self) -> list[Any]:
        return [layer for layer in self.policy.modules() if isinstance(layer, GradientCheckpointingLayer)]

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, layers keep nothing for the backward pass but their inputs, and are computed anew in it.

        The library does so in training mode alone, which switches a model's own dropout on, too. Here a layer is in
        that mode only when the library asks, not while it computes.
        """
        layers = self._recomputable
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(_recompute, layer)
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    def hidden(self, role: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Last hidden states (rows · length, width) of token rows as `laid_end_to_end` or `padded_right` lay them."""
        inputs = {name: value for name, value in batch.items() if name != "ends"}
        with self.acting_as(role):
            return body_of(self.policy)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def log_probabilities(
        self,
        role: str,
        batch: dict[str, torch.Tensor],
        positions: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float,
        *,
        entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`losses.log_probabilities` under a role."""
        inputs = {name: value for name, value in batch.items() if name != "ends"}
        with self.acting_as(role) as model:
            return log_probabilities(
                model.get_base_model(), inputs, positions, tokens, temperature, entropy=entropy
            )

    def values(self, batch: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """The value function at positions counted through all rows: (positions,)."""
        return _through(self.value_head, self.hidden("value", batch)[positions])

    def head_from_reward_model(self, scale: float, shift: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias of a value head that predicts scale · score + shift; None without a shared reward model."""
        head = self.reward_head
        if head is None or self.value_head is None:
            return None
        bias = torch.zeros_like(self.value_head.bias) if head.bias is None else head.bias.detach()
        return head.weight.detach() * scale, bias.detach() * scale + shift

    @torch.no_grad()
    def scores(self, batch: dict[str, torch.Tensor]) -> list[float]:
        """The shared reward model's score at each row's end."""
        return _through(self.reward_head, self.hidden("reward", batch)[batch["ends"]]).tolist()


def _through(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """A head's number for each row, in float32 at least."""
    found = head(hidden.to(head.weight.dtype)).squeeze(-1)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _recompute(layer: Any, run: Callable[..., Any], *inputs: Any) -> Any:
    def without_dropout(*again: Any) -> Any:
        layer.training = False
        try:
            return run(*again)
        finally:
            layer.training = True

    return checkpoint(without_dropout, *inputs, use_reentrant=False)


def shares_base(resolved: ResolvedModel, reward: ResolvedModel) -> bool:
    """Whether a reward model is an adapter over the base that the policy has, too."""
    if reward.adapter is None or not resolved.base.folder or not reward.base.folder:
        return reward.adapter is not None and reward.base.path == resolved.base.path
    return reward.base.folder.resolve() == resolved.base.folder.resolve()


def _of_adapter(policy: Any, adapter: str) -> list[torch.nn.Parameter]:
    """The weights of one adapter. Layers of the base may be called like it: BERT has a `value`, too."""
    place = re.compile(rf"\.(lora_\w+|modules_to_save)\.{re.escape(adapter)}(\.|$)")
    return [weight for name, weight in policy.named_parameters() if place.search(name)]


def _adapter_weights(policy: Any, name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in found.items()}


def _add(policy: Any, name: str, config: Any, weights: dict[str, torch.Tensor] | None) -> None:
    from copy import deepcopy

    from peft import set_peft_model_state_dict

    policy.add_adapter(name, deepcopy(config))
    if weights is not None:
        result = set_peft_model_state_dict(policy, weights, adapter_name=name)
        if result.unexpected_keys:
            raise UsageError(
                "the reward model's adapter does not fit the policy's base",
                "were both made over the same base?",
            )


def _as_language_adapter(folder: Path) -> Any:
    """A reward adapter's configuration without its head, which is kept apart."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(folder)
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = None
    config.inference_mode = False
    return config


def _reward_weights(reward: ModelReference) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a reward model's adapter, and of its head ("weight", and "bias" where there is one)."""
    weights = load_file(Path(reward.path) / "adapter_model.safetensors")
    heads = [name for name in weights if f".{HEAD}." in name]
    head = {name.rpartition(".")[2]: weights[name] for name in heads}
    return {name: value for name, value in weights.items() if name not in heads}, head


def _no_dropout(policy: Any) -> None:
    """Dropout would make the same weights give two probabilities, and the ratio of PPO start beside 1."""
    for module in policy.modules():
        layers = getattr(module, "lora_dropout", None)
        if isinstance(layers, torch.nn.ModuleDict):
            for name in list(layers):
                layers[name] = torch.nn.Identity()


def rows_of(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each prompt with its answer as one token row."""
    return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
