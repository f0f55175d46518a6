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


def step_bytes(learnt: int, way: str, on_gpu: bool) -> int:
    """What an update needs for a moment: roots of second moments, in fp32.

    On a GPU torch's AdamW has them for all tensors at once (`foreach`), on a processor for one tensor, and there twice.
    With ZeRO a process' whole share is one tensor.

    Args:
        learnt: weights that this device moves.
    """
    if on_gpu:
        return 4 * learnt
    return 8 * learnt if way.startswith("zero") else 0


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


_REUSED = 10**9  # DeepSpeed keeps what is needed again within so many weights (`stage3_max_reuse_distance`)


def exchange_bytes(weights: int, layer: int, tables: int, element: int, way: str, devices: int) -> int:
    """What a device holds of the others' shares, and the buffers through which they talk.

    ddp: none of their own, the gradients lie in them (`gradient_as_bucket_view`). zero2: a bucket as large as a square
    of the model's width, which is little. fsdp: the layer at work, the next one, and the tables of words (Zhao et al.
    2023, "PyTorch FSDP", section 3.3). zero3: these, or as much as is soon needed again: half of `_REUSED` on
    the way forward and half on the way back.

    Args:
        weights, layer, tables: how many there are of each. element: bytes of one.
    """
    if devices == 1 or way in ("ddp", "zero2"):
        return 0
    gathered = 2 * layer + tables
    if way == "zero3":
        gathered += _REUSED // 2
    gathered = min(gathered, weights)
    return element * (gathered - gathered // devices)
