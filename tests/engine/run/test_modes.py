"""Who may read what the commands leave on disk: real tiny runs under two umasks, and every file looked at."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest

from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.settings.stages import SftSettings
from tests.cli import medgpt, start
from tests.tiny import tiny_model

MASKS = (0o000, 0o022)
QUICK = ["--max-steps", "2", "--batch-size", "2", "--max-length", "128", "--eval-questions", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("modes")
    tiny_model(place / "model", seed=3)
    for name in ("train", "dev"):
        rows = [{"instruction": f"Why {name} {number}?", "output": "Because."} for number in range(4)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    pairs = [
        {"prompt": f"Why {number}?", "chosen": "Because of fever.", "rejected": "No."} for number in range(6)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    (place / "prompts.jsonl").write_text("".join(f'{{"prompt": "Why {n}?"}}\n' for n in range(4)))
    (place / "text.txt").write_text("Fever is a sign of many illnesses.\n" * 200)
    (place / "questions.txt").write_text("Why?\n")
    return place


def modes(folder: Path) -> dict[str, str]:
    """Each folder and file that is not private, with its mode."""
    found = {}
    for one in (folder, *folder.rglob("*")):
        mode, wanted = stat.S_IMODE(one.lstat().st_mode), 0o700 if one.is_dir() else 0o600
        if mode != wanted and not one.is_symlink():
            found[str(one.relative_to(folder))] = oct(mode)
    return found


STAGES = {
    "sft": ["--base-model", "model", "--train-data", "train.jsonl", "--eval-data", "dev.jsonl", *QUICK],
    "pretrain": [
        *("--base-model", "model", "--train-data", "text.txt", "--max-steps", "2", "--batch-size", "2"),
        *("--block-size", "32"),
    ],
    "reward": [
        *("--base-model", "model", "--train-data", "pairs.jsonl", "--max-steps", "2", "--batch-size", "2"),
        *("--eval-fraction", "0.5"),
    ],
    "rl": [
        *("--base-model", "model", "--train-data", "prompts.jsonl", "--reward-rule", "length:1"),
        *("--max-steps", "1", "--max-new-tokens", "4", "--batch-size", "2", "--minibatch-size", "2"),
        *("--eval-fraction", "0"),
    ],
}


@pytest.mark.parametrize(
    ("stage", "mask"),
    [
        *((stage, 0o000) for stage in STAGES),
        ("sft", 0o022),
        *(pytest.param(stage, 0o022, marks=pytest.mark.slow) for stage in ("pretrain", "reward", "rl")),
    ],
)
def test_a_run_is_readable_by_its_user_alone(place, stage, mask):
    out, home = place / f"{stage}-{mask}", place / f"home-{mask}"
    done = medgpt(
        stage, *STAGES[stage], "--output-dir", out, cwd=place, umask=mask, env={"MEDGPT_HOME": str(home)}
    )
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").is_file() and list((out / "model").iterdir())
    assert modes(out) == {}
    if stage == "pretrain":  # the text as token ids
        assert modes(home / "tokens") == {} and list((home / "tokens").iterdir())


def test_answers_and_scores_are_readable_by_their_user_alone(place):
    ask = ["infer", "--base-model", "model", "--data-file", "questions.txt", "--max-new-tokens", "2"]
    for mask in MASKS:
        answers = place / f"answers-{mask}" / "out.jsonl"
        done = medgpt(*ask, "--predictions-file", answers, cwd=place, umask=mask)
        assert done.returncode == 0, done.stderr
        assert {oct(stat.S_IMODE(one.stat().st_mode)) for one in answers.parent.iterdir()} == {"0o600"}
        saved = place / f"saved-{mask}.json"
        done = medgpt(
            *("chat", "--base-model", "model", "--max-new-tokens", "2"),
            cwd=place,
            umask=mask,
            input=f"Why?\n/save {saved}\n",
        )
        assert done.returncode == 0 and stat.S_IMODE(saved.stat().st_mode) == 0o600, done.stderr


def test_group_readable_opens_the_model_and_the_way_to_it(place):
    out = place / "shared"
    done = medgpt("sft", *STAGES["sft"], "--group-readable", "--output-dir", out, cwd=place, umask=0o077)
    assert done.returncode == 0, done.stderr
    inside = {str(one.relative_to(out)): "0o640" for one in (out / "model").iterdir()}
    assert modes(out) == {".": "0o710", "model": "0o750", **inside}
    place.chmod(0o700)
    done = medgpt(
        *("sft", *STAGES["sft"], "--group-readable", "--output-dir", place / "shut"), cwd=place, umask=0o022
    )
    assert "--group-readable" in done.stderr and "lets nobody else through" in done.stderr


def test_merged_weights_follow_the_umask(place):
    run = place / "to-merge"
    assert medgpt("sft", *STAGES["sft"], "--output-dir", run, cwd=place).returncode == 0
    for mask in MASKS:
        merged = place / f"merged-{mask}"
        done = medgpt("merge-lora", "--lora-model", run, "--output-dir", merged, cwd=place, umask=mask)
        assert done.returncode == 0, done.stderr
        assert stat.S_IMODE(merged.stat().st_mode) == 0o777 & ~mask
        assert {stat.S_IMODE(one.stat().st_mode) for one in merged.iterdir()} == {0o666 & ~mask}


def test_a_folder_that_was_open_is_closed_when_it_is_taken_up(tmp_path):
    with RunFolder.create("sft", "tiny", SftSettings(train_data=("x",), output_dir=tmp_path / "run")) as run:
        run.finish("stopped")
    (run.path / "checkpoints").mkdir()
    for one in (run.path, *run.path.rglob("*")):
        one.chmod(0o777 if one.is_dir() else 0o666)
    with RunFolder.open_for_resume(run.path, "sft") as again:
        assert again.was_open and modes(run.path) == {}
    with RunFolder.open_for_resume(run.path, "sft") as again:
        assert not again.was_open


@pytest.mark.slow
def test_a_run_that_was_open_is_closed_by_its_resume(place):
    out = place / "opened"
    process = start(
        *("sft", *STAGES["sft"], "--max-steps", "2000", "--save-steps", "1", "--output-dir", out), cwd=place
    )
    for _ in range(600):
        if (out / "checkpoints" / "checkpoint-2").is_dir():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert stat.S_IMODE(out.stat().st_mode) == 0o700  # also of a run that was killed
    for one in (out, *out.rglob("*")):
        one.chmod(0o755 if one.is_dir() else 0o644)
    process = start("sft", "--resume", out, cwd=place)
    for _ in range(600):
        if json.loads((out / "run.json").read_text()).get("resumed"):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert f"others could read {out}; now you alone can" in "".join(said.splitlines())
    assert modes(out) == {}
    shutil.rmtree(out)


@pytest.mark.slow
def test_a_run_of_two_processes_and_a_pipeline_are_private(place):
    out = place / "two"
    done = medgpt(
        "sft", *STAGES["sft"], "--processes", "2", "--output-dir", out, cwd=place, umask=0, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert modes(out) == {}
    done = medgpt("quickstart", "--output-dir", place / "quick", "--use-cpu", cwd=place, umask=0, timeout=900)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((place / "quick").stat().st_mode) == 0o700
    for one in ("pretrain", "sft", "reward", "rl", "recipes"):
        assert modes(place / "quick" / one) == {}
