"""Bytes that follow from shapes alone. Each formula names where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

_NF4_BLOCK, _SCALES_BLOCK = 64, 256  # bitsandbytes' defaults: weights a scale, scales a scale of scales


def quantised_bytes(bits: str, rows: int, columns: int) -> int:
    """A linear layer's weights as bitsandbytes holds them.

    4 bits (Dettmers et al. 2023, QLoRA, section 3): half a byte a weight; an 8-bit scale for every 64 weights and a
    32-bit scale for every 256 of these; 16 levels of nf4, 256 of the scales and their mean in fp32. 0.516 bytes a
    weight.
    8 bits (Dettmers et al. 2022, LLM.int8(), section 3): a byte a weight and an fp32 scale for every row.
    """
    weights = rows * columns
    if bits == "8bit":
        return weights + 4 * rows
    scales = -(-weights // _NF4_BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // _SCALES_BLOCK) + 4 * (16 + 256 + 1)


def moments_bytes(weights: int, optimizer: str) -> int:
    """AdamW's two moments (Loshchilov & Hutter 2019): fp32, or 8 bits with an fp32 scale a block of 256 each.

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". Tensors of under 4,096 weights stay in fp32,
    which is left out here: a part in a thousand.
    """
    return weights * 8 if not optimizer.endswith("8bit") else weights * 2 + 8 * -(-weights // 256)


def step_bytes(trainable_bytes: int, on_gpu: bool) -> int:
    """What an update needs for a moment: torch's AdamW goes through the tensors together on a GPU (`foreach`).

    The square roots of the second moments then exist for all of them at once; on a processor for one tensor.
    """
    return trainable_bytes if on_gpu else 0


def cache_bytes(layers: int, key_value_heads: int, head_size: int, tokens: int, element: int) -> int:
    """Keys and values of `tokens` positions, of all rows together. Pope et al. 2022, section 3.3."""
    return 2 * layers * key_value_heads * head_size * tokens * element


@dataclass(frozen=True)
class States:
    """Bytes that a model in training holds from step to step, on one device."""

    frozen: int
    weights: int  # those that learn
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.frozen + self.weights + self.gradients + self.moments


def sharded(states: States, way: str, devices: int) -> States:
    """The part of one of `devices` (Rajbhandari et al. 2020, "ZeRO", section 5).

    ddp: everything on each. zero2: moments and gradients in N parts. zero3 and fsdp: the weights, too.
    """

    def part(size: int, divided: bool) -> int:
        return -(-size // devices) if divided else size

    all_parts = way in ("zero3", "fsdp")
    return States(
        frozen=part(states.frozen, all_parts),
        weights=part(states.weights, all_parts),
        gradients=part(states.gradients, way != "ddp"),
        moments=part(states.moments, way != "ddp"),
    )


def exchange_bytes(layer: int, way: str, devices: int) -> int:
    """Buffers through which devices talk.

    ddp: none of their own, the gradients lie in them (`gradient_as_bucket_view`). zero2: a bucket as large as a square
    of the model's width, which is little. zero3, fsdp: the layer at work and the next one, gathered (Zhao et al. 2023,
    "PyTorch FSDP", section 3.3).
    """
    return 2 * layer if devices > 1 and way in ("zero3", "fsdp") else 0
