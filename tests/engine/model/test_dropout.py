"""The dropout that LoRA uses on a processor."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from medicalgpt_cli.engine.model.dropout import FastDropout, use_fast_dropout
from tests.tiny import tiny_model


def test_drops_and_scales_as_torch_does() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    out = FastDropout(0.1).train()(x)
    share = float((out == 0).float().mean())
    assert abs(share - 0.1) < 0.002  # a standard deviation is 0.0003
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.9), atol=1e-4)
    assert abs(float(out.mean()) - 1) < 0.002
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())  # the same elements, the same scale


def test_neighbours_fall_independently() -> None:
    torch.manual_seed(1)
    dropped = (FastDropout(0.5).train()(torch.ones(400_000)) == 0).float()
    for distance in (1, 2, 3, 4):
        both = float((dropped[:-distance] * dropped[distance:]).mean())
        assert abs(both - 0.25) < 0.005


def test_same_seed_same_mask_and_nothing_in_evaluation() -> None:
    x = torch.randn(7, 13)
    layer = FastDropout(0.3).train()
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), x)


def test_stands_in_front_of_every_adapter(tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path))
    model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear"))
    names = [name for name, one in model.named_modules() if type(one) is torch.nn.Dropout]
    assert names
    use_fast_dropout(model)
    assert not [name for name, one in model.named_modules() if type(one) is torch.nn.Dropout]
    found = [one for one in model.modules() if isinstance(one, FastDropout)]
    assert len(found) == len(names) and {one.p for one in found} == {0.2}
