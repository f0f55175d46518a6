"""A run folder is made once, never overwritten, and used by one process at a time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medicalgpt_cli.commands.bridge import read_recipe
from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.engine.run.folder import RunFolder
from medicalgpt_cli.errors import UsageError
from medicalgpt_cli.settings.fields import options_of
from medicalgpt_cli.settings.stages import SftSettings
from tests.cli import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(**values) -> SftSettings:
    return SftSettings(**{"train_data": ("a.jsonl", "数据"), "base_model": "tiny", **values})


def test_the_default_name_says_stage_model_and_time_and_is_never_taken_twice() -> None:
    runs = [RunFolder.create("sft", "hub/Tiny Model", settings()) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    for run in runs:
        assert re.fullmatch(r"sft-Tiny-Model-\d{8}-\d{6}(-\d)?", run.path.name)
        assert run.path.parent == Path("runs")
        run.close()


def test_a_new_run_says_what_it_is_made_of() -> None:
    with RunFolder.create("sft", "tiny", settings(seed=7, origins={"seed": "flag"})) as run:
        content = run.read()
    assert content["stage"] == "sft" and content["status"] == "running" and content["model"] == "tiny"
    assert content["settings"]["seed"] == {"value": 7, "origin": "flag"}
    assert content["settings"]["train_data"] == {"value": ["a.jsonl", "数据"], "origin": "default"}
    assert set(content["settings"]) == set(options_of(SftSettings))
    assert content["environment"]["versions"]["torch"]


def test_the_recipe_gives_the_same_settings_again() -> None:
    one = settings(
        learning_rate=1e-5, gpus="1", max_samples=3, target_modules=("q_proj", "v_proj"), dora=True
    )
    with RunFolder.create("sft", "tiny", one) as run:
        values = read_recipe(run.recipe, SftSettings)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    assert SftSettings(**plain) == one
    assert "output_dir" not in values and "json" not in values


@pytest.mark.parametrize("what", ["file inside", "a file"])
def test_an_existing_place_is_never_written_to(what: str) -> None:
    place = Path("mine")
    if what == "a file":
        place.write_text("x")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder.create("sft", "tiny", settings(output_dir=place))
    assert [str(one) for one in Path().rglob("*")] in (["mine"], ["mine", "mine/notes.txt"])


def test_an_empty_folder_is_fine() -> None:
    Path("mine").mkdir()
    with RunFolder.create("sft", "tiny", settings(output_dir=Path("mine"))) as run:
        assert run.path == Path("mine") and run.manifest.exists()


def test_two_processes_cannot_work_in_one_run() -> None:
    code = (
        "import sys; from medicalgpt_cli.engine.run.folder import RunFolder\n"
        "from medicalgpt_cli.errors import UsageError\n"
        "try: RunFolder.open_for_resume(sys.argv[1], 'sft'); print('opened')\n"
        "except UsageError as error: print(error.message)"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(run.path)],
            env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    with RunFolder.create("sft", "tiny", settings()) as run:
        assert other().startswith("another process is working in")
    assert other() == "opened\n"  # and its end, however it ends, frees the folder
    assert other() == "opened\n"


def test_resume_takes_up_stopped_runs_and_refuses_others() -> None:
    run = RunFolder.create("sft", "tiny", settings())
    run.finish("stopped", {"steps": 3})
    run.close()
    with RunFolder.open_for_resume(run.path, "sft") as again:
        content = again.read()
        assert content["status"] == "running" and content["finished"] is None and len(content["resumed"]) == 1
    with pytest.raises(UsageError, match="is a sft run"):
        RunFolder.open_for_resume(run.path, "reward")
    with RunFolder.open_for_resume(run.path, "sft") as again:
        again.finish("done", {"steps": 5})
    with pytest.raises(UsageError, match="is finished"):
        RunFolder.open_for_resume(run.path, "sft")
    with pytest.raises(UsageError, match="not a run folder"):
        RunFolder.open_for_resume(Path("elsewhere"), "sft")


def test_update_and_finish_keep_the_rest() -> None:
    with RunFolder.create("sft", "tiny", settings()) as run:
        run.update(fingerprints={"training": "ab"})
        run.finish("done", {"steps": 5})
        content = run.read()
    assert content["fingerprints"] == {"training": "ab"}
    assert content["result"] == {"steps": 5} and content["finished"] >= content["started"]


def test_the_model_appears_as_a_whole_also_when_an_earlier_process_left_one() -> None:
    with RunFolder.create("sft", "tiny", settings()) as run:
        for content in ("first", "second"):
            run.new_model.mkdir()
            (run.new_model / "weights").write_text(content)
            assert run.publish_model() == run.model
            assert (run.model / "weights").read_text() == content
        assert not run.new_model.exists() and not list(run.path.glob("*.tmp"))


def resumed(run: RunFolder, **values) -> SftSettings:
    given = SftSettings(**values, resume=run.path, origins=dict.fromkeys(values, "flag"))
    return manifest.resumed_settings(run.read(), given, run.path)


def test_resumed_settings_are_those_the_run_began_with() -> None:
    one = settings(learning_rate=1e-5, target_modules=("q_proj",), epochs=3.0, output_dir=Path("out"))
    with RunFolder.create("sft", "tiny", one) as run:
        again = resumed(run)
        assert dataclasses.replace(again, resume=None, output_dir=Path("out")) == one
        assert again.resume == run.path
        # saying the same thing again is no change, and what does not change the result may change
        same = resumed(run, epochs=3.0, keep_checkpoints=5, json=True)
        assert same.epochs == 3.0 and same.keep_checkpoints == 5 and same.json


def test_a_changed_resume_is_refused_with_each_difference() -> None:
    with RunFolder.create("sft", "tiny", settings(seed=1)) as run, pytest.raises(UsageError) as caught:
        resumed(run, seed=2, train_data=("b.jsonl",))
    assert "--seed 1 → 2" in caught.value.message
    assert "--train-data a.jsonl,数据 → b.jsonl" in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not written by medgpt"),
        ('{"format": 99, "stage": "x"}', "newer medgpt"),
    ],
)
def test_a_foreign_or_damaged_manifest_is_refused(content: str, message: str) -> None:
    Path("run.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        manifest.read(Path())


def test_a_parent_run_is_recorded_with_the_hash_of_its_manifest() -> None:
    with RunFolder.create("sft", "tiny", settings()) as run:
        run.model.mkdir()
        described = manifest.parent("runs/x", run.model)
        assert described["run"] == str(run.path)
        run.finish("done")
        assert manifest.parent("runs/x", run.path)["run_json_sha256"] != described["run_json_sha256"]
    assert manifest.parent("hub/name", None) == {"name": "hub/name"}
