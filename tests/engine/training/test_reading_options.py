"""--columns, --sheet and --encoding reach every command that reads data, and belong to a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.inspection import inspect
from medicalgpt_cli.engine.data.reading import counts_for
from medicalgpt_cli.engine.generation.questions import counts_of_questions, read_questions
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.engine.run import manifest
from medicalgpt_cli.engine.training.pretrain_data import load_pretrain_data
from medicalgpt_cli.engine.training.reward_data import load_reward_data
from medicalgpt_cli.engine.training.rl_data import load_rl_data
from medicalgpt_cli.engine.training.sft_data import load_sft_data
from medicalgpt_cli.errors import DataError, UsageError
from medicalgpt_cli.settings import stages
from medicalgpt_cli.settings.fields import options_of
from medicalgpt_cli.settings.groups import Settings
from tests.engine.data import office
from tests.tiny import tiny_tokenizer

COLUMNS = ("question=病人的话", "answer=我的意见")
ROWS = [["病人的话", "我的意见"], *([f"头痛第{day}天怎么办？", f"建议休息{day}天。"] for day in range(12))]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


def workbook(folder: Path) -> Path:
    return office.xlsx(
        folder / "a.xlsx", {"first": [["question", "answer"], ["wrong", "sheet"]], "second": ROWS}
    )


def table(folder: Path) -> Path:
    """In Big5, which is recognised nowhere."""
    path = folder / "a.csv"
    text = "\n".join(",".join(row) for row in ROWS).translate(str.maketrans("头怎么办议", "頭怎麼辦議"))
    path.write_bytes(
        text.translate(str.maketrans({"见": "見", "话": "話", "医": "醫", "个": "個"})).encode("big5")
    )
    return path


def test_every_command_that_reads_data_has_the_options():
    have = {
        name: {"columns", "sheet", "encoding"} <= options_of(one).keys()
        for name, one in vars(stages).items()
        if isinstance(one, type) and issubclass(one, Settings) and one is not Settings
        if {"train_data", "data_file", "files"} & options_of(one).keys()
    }
    assert len(have) >= 8 and all(have.values()), have


def test_sft_reads_the_sheet_and_the_columns(tokenizer, tmp_path):
    for options in (
        {"train_data": (str(workbook(tmp_path)),), "sheet": "second", "columns": COLUMNS},
        {"train_data": (str(table(tmp_path)),), "encoding": "big5",
         "columns": ("question=病人的話", "answer=我的意見")},
    ):  # fmt: skip
        data = load_sft_data(stages.SftSettings(**options, eval_fraction=0.2), tokenizer, Observer())
        assert len(data.training) + len(data.held_out) == 12
        assert "休息" in tokenizer.decode(data.training[0].input_ids)


def test_held_out_data_may_have_the_keys_already(tokenizer, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    options = {
        "train_data": (str(workbook(tmp_path)),), "eval_data": (str(tmp_path / "held.jsonl"),), "sheet": "second",
    }  # fmt: skip
    data = load_sft_data(stages.SftSettings(**options, columns=COLUMNS), tokenizer, Observer())
    assert (len(data.training), len(data.held_out)) == (12, 1)
    with pytest.raises(DataError, match="病人话"):
        load_sft_data(stages.SftSettings(**options, columns=("question=病人话",)), tokenizer, Observer())


def test_reward_rl_and_pretrain(tokenizer, tmp_path):
    path = str(workbook(tmp_path))
    prompts = load_rl_data(
        stages.RlSettings(train_data=(path,), sheet="2", columns=COLUMNS[:1], reward_rule=("length",)),
        tokenizer, [], 512, Observer(),
    )  # fmt: skip
    assert len(prompts.training) + len(prompts.held_out) == 12
    pairs = [["病人的话", "好", "坏"], *([f"第{day}天？", f"好{day}", f"坏{day}"] for day in range(6))]
    path = str(office.xlsx(tmp_path / "p.xlsx", {"x": [], "pairs": pairs}))
    columns = ("prompt=病人的话", "chosen=好", "rejected=坏")
    found = load_reward_data(
        stages.RewardSettings(train_data=(path,), columns=columns), tokenizer, Observer()
    )
    assert len(found.training) + len(found.held_out) == 6
    path = tmp_path / "t.jsonl"
    path.write_bytes('{"body": "糖尿病患者應注意"}\n{"body": "應控制飲食"}\n'.encode("big5"))
    corpus = load_pretrain_data(
        stages.PretrainSettings(
            train_data=(str(path),), columns=("text=body",), encoding="big5", block_size=16, eval_fraction=0,
            dry_run=True,
        ),
        tokenizer, Observer(),
    )  # fmt: skip
    assert corpus.report["training"]["used"] == 2


def test_data_and_infer(tmp_path):
    path = str(workbook(tmp_path))
    settings = stages.InspectDataSettings(files=(path,), sheet="second", columns=COLUMNS)
    found = inspect(settings.files, counts_for(settings, settings.files), None, 1024, Observer())
    assert found.report["used"] == 12 and "sheet 2 of 2" in found.report["notices"][0]
    asked = stages.InferSettings(data_file=path, predictions_file="-", sheet="second", columns=COLUMNS)
    assert len(read_questions(path, counts_of_questions(asked))) == 12
    assert read_questions(path, Counts())[0].input == "wrong"


def test_a_resumed_run_reads_as_before(tmp_path):
    began = stages.SftSettings(
        train_data=("a.xlsx",), sheet="second", columns=COLUMNS, encoding="gbk", ignore=("bed",), group="ward"
    )
    recorded = {"settings": manifest.with_origins(began)}
    same = manifest.resumed_settings(recorded, stages.SftSettings(resume=tmp_path))
    assert (same.sheet, same.columns, same.encoding) == ("second", COLUMNS, "gbk")
    for name, value in (
        ("sheet", "first"),
        ("columns", COLUMNS[:1]),
        ("encoding", "big5"),
        ("ignore", ("ward",)),
        ("group", "bed"),
        ("strict", True),
    ):
        given = stages.SftSettings(resume=tmp_path, **{name: value}, origins={name: "flag"})
        with pytest.raises(UsageError, match=f"--{name}"):
            manifest.resumed_settings(recorded, given)
