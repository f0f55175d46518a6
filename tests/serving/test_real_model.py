"""The server and the command line on a real model: `pytest -m slow --medgpt-model FOLDER tests/serving`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medicalgpt_cli.engine.generation.infer import run_infer
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import InferSettings
from tests.conftest import DATA
from tests.serving.running import running


@pytest.mark.slow
def test_forty_questions_get_the_same_greedy_answers(real_model: Path, tmp_path: Path) -> None:
    """Sixteen at once through the scheduler, in other company than in a file's batches."""
    pytest.importorskip("openai")
    from openai import OpenAI

    lines = (DATA / "medquad_en_dev.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    asked = [json.loads(line)["question"] for line in lines]
    questions = tmp_path / "q.txt"
    questions.write_text("\n".join(asked) + "\n", encoding="utf-8")

    def answers(name: str, **settings) -> list[dict]:
        out = tmp_path / f"{name}.jsonl"
        files = {"data_file": str(questions), "predictions_file": str(out), "max_new_tokens": 48}
        run_infer(InferSettings(**files, **settings), Observer())
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    here = answers("here", base_model=str(real_model), use_cpu=True, dtype="fp32")
    with running(real_model, max_client_requests=64) as server:
        there = answers("there", endpoint=server.url, batch_size=16)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model=server.served.answers.default_model,
            messages=[{"role": "user", "content": asked[0]}],
            max_tokens=48,
            stream=True,
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    same = sum(a == b for a, b in zip(here, there, strict=True))
    print(f"{same} of {len(here)} answers are identical")
    assert said == here[0]["output"] and same == len(here)
