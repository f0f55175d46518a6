"""Models whose text part alone cannot be loaded again, and heads of scores where the library's classes resist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.model.references import resolve_models
from medicalgpt_cli.engine.model.reward_model import new_reward_model
from medicalgpt_cli.engine.model.score_head import HEAD
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.training.tuning import load_trainable
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.stages import RewardSettings, SftSettings
from tests.engine.model.architectures import make_model


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.2 Vision, of which the library takes the text part."""
    folder = tmp_path_factory.mktemp("mllama") / "model"
    make_model("mllama", folder)
    return folder


def reward_model(base: Path, **options):
    settings = RewardSettings(base_model=str(base), train_data=("x",), use_cpu=True, **options)
    return new_reward_model(settings, resolve_models(settings), Observer())


def test_full_tuning_of_a_part_is_refused_before_it_trains(vision: Path) -> None:
    """It ended well, and no command could load what it wrote."""
    settings = SftSettings(base_model=str(vision), train_data=("x",), use_cpu=True, tuning="full")
    with pytest.raises(UsageError, match="text part of a larger model, which cannot be saved"):
        load_trainable(settings, resolve_models(settings), Observer())
    with pytest.raises(UsageError, match="text part of a larger model, which cannot be saved"):
        reward_model(vision, tuning="full")


def test_the_output_head_of_a_part_is_left_out_under_its_prefix(vision: Path) -> None:
    model = reward_model(vision)
    scores = model(input_ids=torch.arange(3, 12)[None], ends=torch.tensor([8])).logits
    assert scores.shape == (1,)


@pytest.mark.parametrize("name", ["modernbert-decoder", "blt"])
def test_a_head_of_scores_goes_on_models_of_other_habits(name: str, tmp_path: Path) -> None:
    """One draws weights for its output head by itself, the other has no width of its own."""
    make_model(name, tmp_path / "model")
    model = reward_model(tmp_path / "model")
    assert getattr(model.get_base_model(), HEAD).modules_to_save["default"].out_features == 1
    assert torch.isfinite(model(input_ids=torch.arange(3, 12)[None], ends=torch.tensor([8])).logits).all()
