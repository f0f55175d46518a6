"""Continuous batching: the same answers as one at a time, whoever else is there, comes or goes."""

from __future__ import annotations

import queue
import threading
import time

import pytest
import torch

from medicalgpt_cli.engine.generation.answer_reader import content_of
from medicalgpt_cli.engine.generation.local import LocalBackend
from medicalgpt_cli.engine.generation.scheduler import Busy, Limits, Scheduler
from medicalgpt_cli.settings.groups import SamplingSettings
from tests.engine.generation.test_local import models_of_other_families, prompts
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path_factory.mktemp("scheduler") / "m", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


class Asker:
    """Collects the pieces of one answer."""

    def __init__(self):
        self.pieces: list[str] = []
        self.events: queue.Queue = queue.Queue()
        self.answer = None
        self.done = threading.Event()

    def __call__(self, deltas, answer):
        piece = content_of(deltas)
        self.pieces.append(piece)
        self.events.put(piece)
        if answer is not None:
            self.answer = answer
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self.answer


@pytest.fixture
def scheduler(loaded):
    opened = []

    def make(model=loaded, **limits) -> Scheduler:
        opened.append(Scheduler(LocalBackend(*model, SamplingSettings()), Limits(**limits)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def alone(loaded, prompt, number=0, **sampling) -> tuple[str, list[int]]:
    backend = LocalBackend(*loaded, SamplingSettings(**sampling))
    text = "".join(backend.stream(prompt, number=number))
    return text, backend.last.token_ids


def test_answers_do_not_depend_on_who_comes_and_goes(loaded, scheduler):
    """40 requests of several lengths and samplings arrive while others are being answered."""
    ids = prompts(loaded[1])
    kinds = [
        {"max_new_tokens": 90},
        {"max_new_tokens": 3},
        {"max_new_tokens": 20, "temperature": 1.3, "top_p": 0.9, "seed": 5},
        {"max_new_tokens": 40, "repetition_penalty": 1.3},
        {"max_new_tokens": 24, "stop": ("e",)},
    ]
    running = scheduler(batch=6)
    asked = []
    for number in range(40):
        prompt, sampling = ids[number % len(ids)], kinds[number % len(kinds)]
        asker = Asker()
        running.submit(prompt, SamplingSettings(**sampling), asker, number=number, client=str(number))
        asked.append((prompt, number, sampling, asker))
        time.sleep(0.003 * (number % 4))
    for prompt, number, sampling, asker in asked:
        answer = asker.wait()
        assert (answer.text, answer.token_ids) == alone(loaded, prompt, number, **sampling)
        assert "".join(asker.pieces) == answer.text
    assert running.load == {"waiting": 0, "running": 0}
    assert running.counters.finished == 40 and running.counters.rows > running.counters.steps


def test_a_short_question_is_not_stuck_behind_a_long_one(loaded, scheduler):
    running = scheduler()
    long, short = Asker(), Asker()
    prompt = prompts(loaded[1])[4] * 10  # is read in pieces
    running.submit(prompt, SamplingSettings(max_new_tokens=900), long)
    long.events.get(timeout=60)
    running.submit(prompts(loaded[1])[0], SamplingSettings(max_new_tokens=2), short)
    short.wait()
    assert not long.done.is_set()
    assert long.wait().token_ids == alone(loaded, prompt, max_new_tokens=900)[1]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2", "bloom", "qwen3-next"])
def test_other_families(loaded, scheduler, family):
    """Sliding windows are joined and trimmed; layers with a recurrent state are decoded beside each other."""
    from transformers import AutoModelForCausalLM

    tokenizer = loaded[1]
    kind, settings = models_of_other_families()[family]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    config = kind(vocab_size=len(tokenizer), bos_token_id=None, **ends, **settings)
    model = (AutoModelForCausalLM.from_config(config).eval(), tokenizer)
    ids = prompts(tokenizer)
    running = scheduler(model)
    askers = []
    for number, prompt in enumerate([*ids, *ids]):
        limit = 12 + 9 * (number % 5)
        askers.append((prompt, limit, Asker()))
        running.submit(prompt, SamplingSettings(max_new_tokens=limit), askers[-1][-1])
        time.sleep(0.01 * (number % 3))
    for prompt, limit, asker in askers:
        assert asker.wait().token_ids == alone(model, prompt, max_new_tokens=limit)[1]
    assert running.counters.rows > running.counters.steps or family == "qwen3-next"


def test_who_went_away_frees_the_place(loaded, scheduler):
    running = scheduler(batch=1, queue=1)
    first, second, third = Asker(), Asker(), Asker()
    prompt = prompts(loaded[1])[0]
    ticket = running.submit(prompt, SamplingSettings(max_new_tokens=1900), first)
    first.events.get(timeout=60)
    running.submit(prompt, SamplingSettings(max_new_tokens=2), second)
    with pytest.raises(Busy, match="1 requests are waiting") as refused:
        running.submit(prompt, SamplingSettings(max_new_tokens=2), third)
    assert not refused.value.mine
    running.cancel(ticket)
    assert second.wait().completion_tokens <= 2
    assert not first.done.is_set() and running.counters.cancelled == 1 and running.counters.refused == 1


def test_one_client_cannot_take_all_places(loaded, scheduler):
    running = scheduler(client=2)
    prompt = prompts(loaded[1])[0]
    for _ in range(2):
        running.submit(prompt, SamplingSettings(max_new_tokens=1900), Asker(), client="a")
    with pytest.raises(Busy) as refused:
        running.submit(prompt, SamplingSettings(), Asker(), client="a")
    assert refused.value.mine
    other = Asker()
    running.submit(prompt, SamplingSettings(max_new_tokens=2), other, client="b")
    assert other.wait().error is None


def test_time_memory_and_the_end_bound_a_request(loaded, scheduler):
    prompt = prompts(loaded[1])[0]
    running = scheduler(seconds=0.3, batch=1)
    cut, late = Asker(), Asker()
    running.submit(prompt, SamplingSettings(max_new_tokens=2000), cut)
    # A moment earlier, so that its time ends while it waits, and never in the instant between the two limits.
    running.submit(prompt, SamplingSettings(max_new_tokens=2000), late).deadline -= 0.1
    assert cut.wait().finish_reason == "length" and 0 < cut.answer.completion_tokens < 2000
    assert "time limit" in late.wait().error
    narrow = scheduler(batch_tokens=len(prompt) + 1900)
    askers = [Asker() for _ in range(2)]
    for asker in askers:
        narrow.submit(prompt, SamplingSettings(max_new_tokens=1000), asker)
    askers[0].events.get(timeout=60)
    assert narrow.load == {"waiting": 1, "running": 1}
    narrow.close()
    assert all("stopping" in asker.wait().error for asker in askers)
    with pytest.raises(Busy):
        narrow.submit(prompt, SamplingSettings(), Asker())


def test_a_failing_step_fails_its_requests_only(loaded, scheduler, monkeypatch):
    from medicalgpt_cli.engine.generation import decoding

    running = scheduler()
    prompt = prompts(loaded[1])[0]
    with monkeypatch.context() as patch:
        patch.setattr(decoding.Batch, "step", lambda self: 1 / 0)
        broken = Asker()
        running.submit(prompt, SamplingSettings(), broken)
        assert "ZeroDivisionError" in broken.wait().error
    fine = Asker()
    running.submit(prompt, SamplingSettings(max_new_tokens=4), fine)
    assert fine.wait().error is None and running.alive
