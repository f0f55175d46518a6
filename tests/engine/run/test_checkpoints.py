"""Only complete checkpoints count, whatever their number."""

from __future__ import annotations

from pathlib import Path

import pytest

from medicalgpt_cli.engine.run import checkpoints


def save(folder: Path, step: int, content: str = "weights") -> Path:
    writing = folder / f"checkpoint-{step}.tmp"
    (writing / "sub").mkdir(parents=True)
    (writing / "model.safetensors").write_text(f"{content} {step}")
    (writing / "sub" / "state.json").write_text("{}")
    return checkpoints.publish(writing, folder / f"checkpoint-{step}")


def test_the_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-100"
    assert checkpoints.step_of(tmp_path / "checkpoint-100") == 100
    assert checkpoints.incomplete(tmp_path) == {}


def test_no_checkpoint_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert checkpoints.newest_complete(tmp_path) is None
    assert checkpoints.newest_complete(tmp_path / "missing") is None


def damage_flip(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_text("Weights 20")  # same length


def damage_cut(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_text("we")


def damage_lose(checkpoint: Path) -> None:
    (checkpoint / "sub" / "state.json").unlink()


def damage_unseal(checkpoint: Path) -> None:
    (checkpoint / checkpoints.SEAL).unlink()


def damage_tear(checkpoint: Path) -> None:
    (checkpoint / checkpoints.SEAL).write_text('{"files": {"model')


def damage_list(checkpoint: Path) -> None:
    (checkpoint / checkpoints.SEAL).write_text("[1]")


def damage_empty_seal(checkpoint: Path) -> None:
    (checkpoint / checkpoints.SEAL).write_text('{"format": 1, "files": {}}')


def damage_add(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_text("not ours")


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_cut,
        damage_lose,
        damage_unseal,
        damage_tear,
        damage_list,
        damage_empty_seal,
        damage_add,
    ],
    ids=lambda one: one.__name__,
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage) -> None:
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-10"
    assert list(checkpoints.incomplete(tmp_path)) == ["checkpoint-20"]


def test_a_save_that_was_killed_before_its_name_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "checkpoint-20.tmp").mkdir()
    assert checkpoints.newest_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_publishing_the_same_step_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    damage_flip(save(tmp_path, 20))
    again = save(tmp_path, 20, "second")
    assert checkpoints.problem(again) is None
    assert (again / "model.safetensors").read_text() == "second 20"
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint-20"]


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "checkpoint-50.tmp").mkdir()
    checkpoints.prune(tmp_path, 2, protect=[tmp_path / "checkpoint-10"])
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-30",
        "checkpoint-40",
    ]


def test_drop_after_removes_what_a_resumed_run_will_write_again(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    checkpoints.drop_after(tmp_path, 20)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]
