"""ZeRO and FSDP2: losses and weights of one process, proved to be sharded, killed and gone on with, refused in time."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medicalgpt_cli.engine.run.accelerate_file import read_launch
from medicalgpt_cli.engine.run.processes import free_port
from medicalgpt_cli.engine.training.sharding import _check_environment, check_spread
from medicalgpt_cli.errors import EnvironmentFailure, UsageError
from medicalgpt_cli.settings.stages import SftSettings
from tests.cli import ROOT, environment, medgpt, start
from tests.engine.training.several import (
    arguments,
    assert_equal_weights,
    assert_the_same,
    curve,
    gone,
    held_out,
    make_place,
    members,
    running,
)
from tests.tiny import tiny_model

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (docs/testing.md)"
)
FULL = ("--tuning", "full", "--learning-rate", "0.001")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("sharded"))


def without_lora(given: tuple[object, ...]) -> list[object]:
    """Arguments without those about an adapter."""
    return [one for n, one in enumerate(given) if "lora" not in str(one) and "lora" not in str(given[n - 1])]


def given(stage: str, run: str, count: int, more: tuple[object, ...]) -> list[object]:
    found = arguments(stage, run, count, *more)
    return without_lora(found) if "full" in more else list(found)


@pytest.fixture(scope="module")
def alone(place: Path):
    """The run of one process with the same options; made once."""
    known: dict[tuple[object, ...], Path] = {}

    def run(stage: str, *more: object) -> Path:
        if (stage, *more) not in known:
            name = f"{stage}-alone-{len(known)}"
            done = medgpt(*given(stage, name, 1, more), cwd=place)
            assert done.returncode == 0, done.stderr
            known[stage, *more] = place / name
        return known[stage, *more]

    return run


def assert_measured_alike(one: Path, two: Path) -> None:
    first, second = held_out(one), held_out(two)
    for name in ("loss", "reward", "kl", "bits_per_byte"):
        if name in first:
            assert first[name] == pytest.approx(second[name], abs=1e-4), name


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "parallel", "more"),
    [
        ("sft", "zero3", ()),
        slow("sft", "zero2", ()),
        slow("pretrain", "zero2", ()),
        slow("pretrain", "zero3", ()),
        slow("reward", "zero2", ()),
        slow("reward", "zero3", ()),
        slow("rl", "zero2", ()),
        slow("pretrain", "zero2", FULL),
        slow("pretrain", "zero3", FULL),
        slow("sft", "zero3", ("--gradient-checkpointing", "--eval-fraction", "0.2")),
        slow("sft", "zero2", ("--load-in-4bit",)),
        slow("sft", "zero2", ("--dora",)),
        slow("sft", "zero2", ("--embeddings", "all")),
    ],
)
def test_shares_of_two_processes_are_one_run(place: Path, alone, stage: str, parallel: str, more) -> None:
    one = alone(stage, *more)
    run = f"{one.name}-{parallel}"
    done = medgpt(*given(stage, run, 2, more), "--parallel", parallel, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout)["steps"] == 10
    )  # and nothing else on standard output: DeepSpeed writes there
    assert_the_same(one, place / run)
    assert_measured_alike(one, place / run)
    assert json.loads((place / run / "run.json").read_text())["parallel"] == parallel


@needs_deepspeed
@pytest.mark.slow
def test_weights_beyond_the_layers_of_the_configuration_are_refused(tmp_path: Path) -> None:
    """DeepSpeed loads what it has places for, and says nothing of the rest."""
    tiny_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (tmp_path / "text.txt").write_text("\n\n".join(["Tea helps against thirst. " * 9] * 9))
    done = medgpt(
        *(
            "pretrain",
            "--base-model",
            "model",
            "--train-data",
            "text.txt",
            "--eval-fraction",
            "0",
            "--use-cpu",
        ),
        *("--block-size", "32", "--max-steps", "1", "--processes", "2", "--parallel", "zero3"),
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "9 weights of the files have no place in the model" in done.stderr


@needs_deepspeed
@pytest.mark.slow
def test_rl_learns_from_the_same_answers(place: Path, alone) -> None:
    """The same rollouts at equal seeds: rewards are those of the same answers, to the last digit."""
    one = alone("rl")
    done = medgpt(*arguments("rl", "rl-same", 2), "--parallel", "zero2", cwd=place)
    assert done.returncode == 0, done.stderr
    for a, b in zip(curve(one), curve(place / "rl-same"), strict=True):
        for name in ("reward", "answer_tokens", "ended", "distinct_2"):
            assert a[name] == b[name], name


def fsdp(place: Path, *more: object) -> list[subprocess.CompletedProcess[str]]:
    """The two processes of a run, started as torchrun would."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.training.fsdp_on_cpu", *map(str, more)],
            env=environment(
                {
                    **{
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": "2",
                        "LOCAL_WORLD_SIZE": "2",
                    },
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)},
                }
            ),
            cwd=place,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *one)
        for process, one in zip(processes, said, strict=True)
    ]


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sft", ()),
        slow("reward", ()),
        slow("pretrain", FULL),
        slow("sft", ("--gradient-checkpointing", "--eval-fraction", "0.2")),
    ],
)
def test_weights_in_fsdp_are_one_run(place: Path, alone, stage: str, more) -> None:
    one = alone(stage, *more)
    run = f"{one.name}-fsdp"
    for done in fsdp(place, *given(stage, run, 2, more)[0:1], *without_processes(stage, run, more)):
        assert done.returncode == 0, done.stderr
    assert_the_same(one, place / run)
    assert_measured_alike(one, place / run)


def without_processes(stage: str, run: str, more: tuple[object, ...]) -> list[object]:
    found = given(stage, run, 2, more)[1:]
    at = found.index("--processes")
    return [*found[:at], *found[at + 2 :], "--parallel", "fsdp"]


def test_fsdp_that_only_copies_is_noticed(place: Path) -> None:
    """accelerate leaves FSDP out on a processor and says nothing; the run must not."""
    for done in fsdp(place, "silently", "sft", *without_processes("sft", "copied", ())):
        assert done.returncode == 3, done.stderr
        assert "did not set up fsdp" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp"])
def test_a_model_that_is_not_sharded_is_noticed(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = SftSettings(train_data=("x",), parallel=kind, processes=2)
    with pytest.raises(EnvironmentFailure, match=f"did not set up {kind}"):
        check_spread(settings, model, model, torch.optim.AdamW(model.parameters()))


# -- killed, and gone on with ------------------------------------------------------------------------------------


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_goes_on_after_a_kill(place: Path, parallel: str) -> None:
    """In as many processes to the same weights bit for bit, in one to the same within rounding."""
    more = ("--parallel", parallel, "--max-steps", "40", "--eval-fraction", "0.2")
    whole = medgpt(*arguments("sft", f"whole-{parallel}", 2), *more, cwd=place)
    assert whole.returncode == 0, whole.stderr
    for count, tolerance in ((None, 0), (1, 2e-4)):
        run = f"killed-{parallel}-{count}"
        process = running(place, run, 8, *more[:2], "--max-steps", "40", *more[4:])
        ranks = members(process)
        process.kill()
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        process.wait()
        assert gone(ranks)
        processes = ("--processes", count) if count else ()
        done = medgpt("sft", "--resume", run, "--use-cpu", *processes, cwd=place)
        assert done.returncode == 0, done.stderr
        assert_equal_weights(place / f"whole-{parallel}", place / run, tolerance)


@pytest.mark.slow
def test_goes_on_in_fsdp(place: Path) -> None:
    more = ("--max-steps", "9", "--eval-fraction", "0.2", "--parallel", "fsdp")
    base = [one for one in without_processes("sft", "whole-fsdp", ()) if one not in ("--parallel", "fsdp")]
    assert all(done.returncode == 0 for done in fsdp(place, "sft", *base, *more))
    half = [one if one != "whole-fsdp" else "half-fsdp" for one in base]
    assert all(done.returncode == 0 for done in fsdp(place, "sft", *half, *more, "--keep-checkpoints", "9"))
    undo_after(place / "half-fsdp", 3)
    assert all(done.returncode == 0 for done in fsdp(place, "sft", "--resume", "half-fsdp", "--use-cpu"))
    assert_equal_weights(place / "whole-fsdp", place / "half-fsdp", 0)


def undo_after(run: Path, step: int) -> None:
    """Make a run what it was just after a checkpoint."""
    import shutil

    shutil.rmtree(run / "model")
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)
    content = json.loads((run / "run.json").read_text())
    content |= {"status": "stopped", "finished": None}
    content.pop("result")
    (run / "run.json").write_text(json.dumps(content))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_a_sharded_run(place: Path, which: int) -> None:
    process = running(place, f"one-killed-{which}", 5, "--parallel", "zero3")
    ranks = members(process)
    os.kill(ranks[which], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"process {which + 1} of 2 was ended by SIGKILL" in said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert gone(ranks)


@needs_deepspeed
@pytest.mark.slow
def test_a_signal_ends_a_sharded_run_with_a_checkpoint(place: Path) -> None:
    process = running(place, "signalled", 5, "--parallel", "zero3")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "a checkpoint is saved" in said and said.count("error:") <= 1


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "flags", "word"),
    [
        slow("rl", ("--parallel", "zero3"), "not for rl"),
        ("sft", ("--parallel", "fsdp"), "silently copy the weights"),
        slow("sft", ("--parallel", "zero3", "--load-in-4bit"), "quantised weights"),
        slow("sft", ("--parallel", "zero3", "--dora"), "DoRA needs whole weights"),
        slow("sft", ("--parallel", "zero2", "--optimizer", "adamw-8bit"), "AdamW's in 32 bits"),
        slow("sft", ("--parallel", "zero3", "--embeddings", "all"), "whole tables"),
    ],
)
def test_what_cannot_be_sharded_is_said_once(place: Path, stage: str, flags, word: str) -> None:
    if "fsdp" not in flags:
        pytest.importorskip("deepspeed")
    done = medgpt(*arguments(stage, "refused", 2), *flags, cwd=place)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr and done.stderr.count("error:") == 1 and done.stderr.count("hint:") == 1
    assert not (place / "refused").exists()


def test_sharding_is_not_for_a_step_of_a_pipeline(place: Path) -> None:
    (place / "sharded.yaml").write_text(
        "output-dir: pipe\nsteps:\n  sft: {base-model: model, train-data: [talk.jsonl], parallel: zero2}\n"
    )
    done = medgpt("pipeline", "--recipe", "sharded.yaml", cwd=place)
    assert done.returncode == 2 and "inside a pipeline" in done.stderr, done.stderr


# -- the file of `accelerate config` -------------------------------------------------------------------------------

ZERO3 = """compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {zero_stage: 3, zero3_init_flag: true, offload_optimizer_device: none, offload_param_device: none}
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
use_cpu: false
"""


def test_a_file_of_accelerate_says_what_is_launched(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    file = tmp_path / "accelerate.yaml"
    text = ZERO3.replace("num_machines: 1", "num_machines: 2").replace("machine_rank: 0", "machine_rank: 1")
    file.write_text(text + "main_process_ip: 192.0.2.7\nmain_process_port: 29501\n")
    launch = read_launch(file)
    assert (launch.here, launch.total, launch.first) == (1, 2, 1)
    assert (launch.address, launch.port) == ("192.0.2.7", 29501)
    assert launch.environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert launch.environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: b\n", "accelerate does not take it"),
        (ZERO3.replace("DEEPSPEED", "MEGATRON_LM"), "MEGATRON_LM is not supported"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\nnum_processes: 2\n", "FSDP 1"),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 3\nnum_machines: 2\nmachine_rank: 0\n",
            "3 processes on 2",
        ),
    ],
)
def test_a_file_that_medgpt_does_not_take_is_refused(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=word):
        read_launch(file)


@needs_deepspeed
@pytest.mark.slow
def test_two_machines_by_a_file(place: Path, alone) -> None:
    """Two launches that know of each other by address and port only."""
    text = ZERO3.replace("num_machines: 1", "num_machines: 2")
    text += f"main_process_ip: 127.0.0.1\nmain_process_port: {free_port()}\n"
    launches = []
    for number in range(2):
        file = place / f"machine-{number}.yaml"
        file.write_text(text.replace("machine_rank: 0", f"machine_rank: {number}"))
        flags = without_processes("sft", "machines", ())[:-2]
        launches.append(start("sft", *flags, "--accelerate-config", file, cwd=place))
    said = [launch.communicate(timeout=120)[1] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], said
    assert "step 10/10" in said[0] and said[1] == ""
    assert_the_same(alone("sft"), place / "machines")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "flag"),
    [
        ("mixed_precision: 'no'", "mixed_precision: bf16", "--dtype"),
        ("zero_stage: 3,", "zero_stage: 3, gradient_accumulation_steps: 4,", "--gradient-accumulation"),
    ],
)
def test_a_file_that_contradicts_a_flag_is_refused(place: Path, old: str, new: str, flag: str) -> None:
    file = place / "contradicts.yaml"
    file.write_text(ZERO3.replace(old, new))
    done = medgpt(
        "sft", *without_processes("sft", "refused", ())[:-2], "--accelerate-config", file, cwd=place
    )
    assert done.returncode == 2, done.stderr
    assert flag in done.stderr and done.stderr.count("error:") == 1


@pytest.mark.parametrize(("key", "flag"), [("scheduler", "--schedule"), ("optimizer", "--optimizer")])
def test_a_file_of_deepspeed_that_overrules_a_flag_is_refused(
    tmp_path: Path, key: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate's launch leaves in the environment; with it the library would take its own schedule."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {"type": "WarmupLR"}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    settings = SftSettings(train_data=("x",), accelerate_config=tmp_path / "accelerate.yaml", dtype="fp32")
    with pytest.raises(UsageError, match=flag):
        _check_environment(settings, torch.device("cpu"))
