"""Every causal architecture that the installed transformers lists, as a tiny random model through all that medgpt does.

    python -m tests.engine.model.architectures                      all, with a line each
    python -m tests.engine.model.architectures --only mamba,gemma2  some
    python -m tests.engine.model.architectures --json FILE          keeps what was found
    python -m tests.engine.model.architectures --write              and puts the table into docs/models.md

Each architecture runs in a process of its own, with a limit of time and memory: one that crashes is one row. What it
is held against is plain transformers: `forward` of each row alone, and `generate`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medicalgpt_cli.engine.run.files import atomic_write
from medicalgpt_cli.errors import MedgptError
from tests.engine.model.tiny_architectures import NOT_ALONE, WINDOW, tiny_config
from tests.tiny import tiny_tokenizer, write_jsonl

CHECKS = ("packed", "padded", "alone", "batch", "served", "lora", "merge", "reward", "rl", "plan")
LOSS_TOLERANCE = 1e-5  # nats a token, of a row in a batch against that row alone in plain transformers
TIE = 1e-4  # of logits: greedy answers may part where two tokens are as likely as each other
SECONDS, BYTES = 300, 12 * 2**30  # of a processor and of address space, for one architecture
NEW_TOKENS = 24

# No text twice: an index that chooses among tokens has to have something to choose by.
QUESTIONS = [
    "What are the symptoms of diabetes, and is tiredness with weight loss or easy bruising one of them?",
    "感冒发烧39度怎么办？高血压患者能喝酒吗？",
    "Check with your doctor if the treatment of hypertension is a change of diet, exercise and medicine.",
]
ANSWERS = [
    "Signs include thirst, fever and bleeding.",
    "建议多饮水、物理降温，并及时就医。",
    "You are right: rest, and have it checked.",
]


class Wrong(Exception):
    """What was computed is not what plain transformers computes."""


# -- the model and its data --------------------------------------------------------------------------------


def make_model(model_type: str, folder: Path) -> None:
    """Write a random model with a tokenizer; every weight counts, also those that the library begins with zeros.

    Raises:
        Exception: whatever the library says against it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    tokenizer = tiny_tokenizer("chatml")
    config = tiny_config(model_type, len(tokenizer), tokenizer.eos_token_id)
    kind: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
        # The text part of some has a configuration of its own, which the library loads as no language model: what
        # people have is the whole.
        if type(model.config) is not type(config) and type(model.config) not in kind._model_mapping:
            kind = AutoModelForImageTextToText
            model = kind.from_config(config)
        size = sum(weight.numel() for weight in model.parameters())
    if size > 2e7:
        raise ValueError(f"{size / 1e6:.0f} million weights")
    torch.manual_seed(1)
    model = kind.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.ndim == 1:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
            elif weight.is_floating_point() and weight.ndim > 1:
                # The row of a padding token begins with zeros, which leave an index nothing to choose by.
                rows = weight.flatten(1).abs().sum(1) == 0 if float(weight.std()) > 0.05 else slice(None)
                weight[rows] = 0.2 * torch.randn(weight.shape, generator=generator)[rows]
    ids = torch.arange(3, 3 + 3 * WINDOW)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its random weights give no finite logits")
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Conversations, pairs and prompts, and others of each to measure on."""
    for name, opening in (("", ""), ("_dev", "医生您好， ")):
        asked = [opening + question for question in QUESTIONS]
        turns = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in zip(asked, ANSWERS, strict=True)
        ]
        pairs = [
            {"prompt": question, "chosen": answer, "rejected": f"No, {number}."}
            for number, (question, answer) in enumerate(zip(asked, ANSWERS, strict=True))
        ]
        write_jsonl(folder / f"sft{name}.jsonl", turns)
        write_jsonl(folder / f"pairs{name}.jsonl", pairs)
        write_jsonl(folder / f"prompts{name}.jsonl", [{"prompt": question} for question in asked])


# -- the checks --------------------------------------------------------------------------------------------


class Checks:
    """All checks of one architecture. Each gives a word for the table, or raises."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.notices: list[str] = []
        self.generate = ""  # what is wrong with the library's

    def run(self, name: str) -> str:
        return getattr(self, name)()

    def packed(self) -> str:
        return self._held_out("padding-free")

    def padded(self) -> str:
        return self._held_out("padded")

    def alone(self) -> str:
        return self._greedy([[0], [1], [2]])

    def batch(self) -> str:
        return self._greedy([[2, 0, 1]])

    def served(self) -> str:
        from medicalgpt_cli.engine.generation.scheduler import Limits, Scheduler

        backend = self._backend()
        scheduler = Scheduler(backend, Limits())
        try:
            done: dict[int, Any] = {}
            for number, prompt in enumerate(self._prompts(backend)):
                scheduler.submit(prompt, backend.sampling, _keep(done, number))
            deadline = time.monotonic() + 60
            while len(done) < len(QUESTIONS) and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            scheduler.close()
        return self._as_generate([done[number] for number in range(len(QUESTIONS))])

    def lora(self) -> str:
        """Two updates of sft; the adapter alone has to change the loss."""
        before, after = self._trained("sft", "sft")
        if before == after:
            raise Wrong("two updates changed nothing")
        return "ok"

    def merge(self) -> str:
        """Merged weights in plain transformers against base + adapter in plain transformers and PEFT."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from medicalgpt_cli.engine.model.merging import merge
        from medicalgpt_cli.settings.stages import MergeLoraSettings

        adapter, output = self.folder / "sft", self.folder / "merged"
        merge(MergeLoraSettings(lora_model=str(adapter), output_dir=output, use_cpu=True), self._observer())
        ids = torch.tensor([self._prompts(self._backend())[0]])
        base = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)
        together = PeftModel.from_pretrained(base, adapter / "model").eval()
        merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        with torch.no_grad():
            one, other = (model(input_ids=ids, use_cache=False).logits for model in (together, merged))
        apart = float((one - other).abs().max() / one.abs().max().clamp(min=1))
        if apart > 1e-3:
            raise Wrong(f"logits {apart:.1e} apart")
        return "ok"

    def reward(self) -> str:
        """Two updates; scores of rows together against each alone."""
        import torch

        from medicalgpt_cli.engine.model.references import resolve_models
        from medicalgpt_cli.engine.model.reward_model import load_reward_model
        from medicalgpt_cli.engine.training import attention
        from medicalgpt_cli.engine.training.reward_data import laid_end_to_end, padded_right
        from medicalgpt_cli.settings.groups import ModelSettings

        self._trained("reward", "pairs")
        resolved = resolve_models(ModelSettings(base_model=str(self.folder / "reward"), use_cpu=True))
        model = load_reward_model(resolved, torch.float32, torch.device("cpu"))
        rows = self._prompts(self._backend())
        apart = attention.is_exact(model)
        with torch.no_grad():
            one_by_one = [
                float(model(input_ids=torch.tensor([row]), ends=torch.tensor([len(row) - 1])).logits)
                for row in rows
            ]
            with attention.for_batches(model, apart):
                batch = laid_end_to_end(rows) if apart else padded_right(rows, pad_id=0)
                together = model(**batch).logits.tolist()
        worst = max(abs(a - b) for a, b in zip(one_by_one, together, strict=True))
        if worst > 1e-4 * max(1.0, *map(abs, one_by_one)):
            raise Wrong(f"scores {worst:.1e} apart")
        return "ok"

    def rl(self) -> str:
        before, after = self._trained("rl", "prompts")
        if before == after:
            raise Wrong("two updates changed nothing")
        return "ok"

    def plan(self) -> str:
        """What a stage says about its memory before it loads weights; it need not know, but has to say so."""
        from medicalgpt_cli.engine.planning.start import before_loading

        self.notices.clear()
        stage = self._stage("sft", "sft", output_dir=self.folder / "unused")
        if before_loading(stage, self._observer()) is None:
            return f"said: {self.notices[-1]}"
        return "ok"

    # -- parts ---------------------------------------------------------------------------------------------

    def _observer(self) -> Any:
        from medicalgpt_cli.engine.observer import Observer

        notices = self.notices

        class Listening(Observer):
            def on_notice(self, text: str) -> None:
                notices.append(text)

            on_warning = on_notice

        return Listening()

    def _stage(self, name: str, data: str, **options: Any) -> Any:
        from medicalgpt_cli.engine.training.reward import RewardStage
        from medicalgpt_cli.engine.training.rl import RlStage
        from medicalgpt_cli.engine.training.sft import SftStage
        from medicalgpt_cli.settings.stages import RewardSettings, RlSettings, SftSettings

        settings, stage = {
            "sft": (SftSettings, SftStage),
            "reward": (RewardSettings, RewardStage),
            "rl": (RlSettings, RlStage),
        }[name]
        more: dict[str, Any] = {
            "max_steps": 2,
            "batch_size": 2,
            "learning_rate": 0.01,
            "output_dir": self.folder / name,
        }
        if name == "rl":
            more |= {
                "learning_rate": 0.003,
                "minibatch_size": 2,
                "max_new_tokens": 8,
                "reward_model": str(self.folder / "reward"),
            }
        if name == "sft":
            more |= {"eval_questions": 0}
        return stage(
            settings(
                base_model=str(self.folder / "model"),
                train_data=(str(self.folder / f"{data}.jsonl"),),
                eval_data=(str(self.folder / f"{data}_dev.jsonl"),),
                use_cpu=True,
                **{**more, **options},
            ),
            self._observer(),
        )

    def _trained(self, name: str, data: str) -> tuple[Any, Any]:
        """Held-out figures before and after two updates."""
        from medicalgpt_cli.engine.training.loop import run

        stage = self._stage(name, data)
        result = run(stage, self._observer())
        if result["steps"] != 2:
            raise Wrong(f"{result['steps']} updates of 2")
        for figures in (result["before"], result["after"]):
            bad = [key for key, value in figures.items() if isinstance(value, float) and value != value]
            if bad:
                raise Wrong(f"{bad[0]} is no number")
        return result["before"], result["after"]

    def _held_out(self, layout: str) -> str:
        import torch
        from transformers import AutoModelForCausalLM

        from medicalgpt_cli.engine.model.loading import load_model
        from medicalgpt_cli.engine.training import attention
        from medicalgpt_cli.engine.training.batches import IGNORED
        from medicalgpt_cli.engine.training.losses import target_loss

        stage = self._stage("sft", "sft", layout=layout, output_dir=self.folder / "unused")
        model = load_model(stage.settings, stage.resolved)
        stage.padding_free = stage.keeps_apart(model, self._observer())
        examples = [replace(one, labels=list(one.input_ids)) for one in stage.data.training]
        assert min(len(one.input_ids) for one in examples) > WINDOW
        plain = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()
        worst = 0.0
        with torch.no_grad():
            for number, example in enumerate(examples):
                ids = torch.tensor([example.input_ids])
                logits = plain(input_ids=ids, use_cache=False).logits[0, :-1].float()
                expected = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
                others = [
                    one if place == number else replace(one, labels=[IGNORED] * len(one.labels))
                    for place, one in enumerate(examples)
                ]
                with attention.for_batches(model, stage.padding_free):
                    found = float(target_loss(model, stage._collate(others))) / (ids.shape[1] - 1)
                worst = max(worst, abs(found - expected))
        if worst > LOSS_TOLERANCE:
            raise Wrong(f"loss {worst:.1e} apart")
        return "ok" if stage.padding_free == (layout == "padding-free") else "pads"

    def _backend(self) -> Any:
        if not hasattr(self, "_opened"):
            from medicalgpt_cli.engine.generation.local import LocalBackend, load_to_answer
            from medicalgpt_cli.engine.model.loading import load_tokenizer
            from medicalgpt_cli.engine.model.references import resolve_models
            from medicalgpt_cli.settings.stages import ChatSettings

            settings = ChatSettings(
                base_model=str(self.folder / "model"), use_cpu=True, max_new_tokens=NEW_TOKENS
            )
            resolved = resolve_models(settings)
            tokenizer = load_tokenizer(settings, resolved, self._observer())
            model = load_to_answer(settings, resolved, self._observer())
            self._opened = LocalBackend(model, tokenizer, settings)
        return self._opened

    def _prompts(self, backend: Any) -> list[list[int]]:
        from medicalgpt_cli.engine.data.rendering import encode_prompt

        return [encode_prompt(backend.tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]

    def _greedy(self, batches: Sequence[Sequence[int]]) -> str:
        backend = self._backend()
        prompts = self._prompts(backend)
        done: dict[int, Any] = {}
        for order in batches:
            backend.answer_batch([prompts[number] for number in order], _placed(done, order))
        return self._as_generate([done[number] for number in range(len(QUESTIONS))])

    def _as_generate(self, answers: Sequence[Any]) -> str:
        """Raise where an answer parts from `generate`'s, unless both tokens are as likely as each other."""
        for prompt, expected, answer in zip(
            self._prompts(self._backend()), self._expected(), answers, strict=True
        ):
            if answer.error:
                raise Wrong(answer.error)
            found = [*answer.token_ids, *([] if answer.end is None else [answer.end])]
            if found == expected:
                continue
            place = next(
                (n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found)
            )
            if place >= min(len(found), len(expected)):
                raise Wrong(f"{len(found)} tokens, generate has {len(expected)}")
            apart = self._logits_apart([*prompt, *expected[:place]], expected[place], found[place])
            if apart > TIE:
                raise Wrong(f"other tokens from {place + 1} on ({apart:.2g} of logits)")
        return "ok"

    def _plain(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        if not hasattr(self, "_plainly"):
            self._plainly = AutoModelForCausalLM.from_pretrained(
                self.folder / "model", dtype=torch.float32
            ).eval()
        return self._plainly

    def _expected(self) -> list[list[int]]:
        """What `generate` says to each prompt alone.

        Where it fails, or says other tokens than those that the model itself finds likeliest, reading the whole text
        anew without a cache, it is these.
        """
        if not hasattr(self, "_generated"):
            prompts = self._prompts(self._backend())
            try:
                self._generated = [self._generate(prompt) for prompt in prompts]
                if not all(map(self._are_likeliest, prompts, self._generated)):
                    raise Wrong("its tokens are not the model's likeliest")
            except Exception as problem:
                self.generate = _one_line(f"{type(problem).__name__}: {problem}")
                self._generated = [self._likeliest(prompt) for prompt in prompts]
        return self._generated

    def _are_likeliest(self, prompt: list[int], said: list[int]) -> bool:
        import torch

        with torch.no_grad():
            logits = self._plain()(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits[0]
        behind = logits[len(prompt) - 1 : -1]
        return bool((behind.amax(-1) - behind[range(len(said)), said] <= TIE).all())

    def _generate(self, prompt: list[int]) -> list[int]:
        import torch

        ids = torch.tensor([prompt])
        made = self._plain().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return made[0, len(prompt) :].tolist()

    def _likeliest(self, prompt: list[int]) -> list[int]:
        import torch

        said: list[int] = []
        end = self._plain().generation_config.eos_token_id
        with torch.no_grad():
            while len(said) < NEW_TOKENS and said[-1:] != [end]:
                ids = torch.tensor([[*prompt, *said]])
                said.append(int(self._plain()(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        return said

    def _logits_apart(self, ids: list[int], one: int, other: int) -> float:
        import torch

        with torch.no_grad():
            logits = self._plain()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        return abs(float(logits[one] - logits[other]))


def _placed(done: dict[int, Any], order: Sequence[int]) -> Callable[[int, Any], None]:
    return lambda place, answer: done.__setitem__(order[place], answer)


def _keep(done: dict[int, Any], number: int) -> Callable[[str, Any], None]:
    def keep(_: str, answer: Any) -> None:
        if answer is not None:
            done[number] = answer

    return keep


# -- one architecture in one process -----------------------------------------------------------------------


def examine(model_type: str, wanted: Sequence[str] = CHECKS, *, debug: bool = False) -> dict[str, str]:
    """What each check says about an architecture: "ok", "pads", "said: …" or "wrong: …".

    An architecture of which no tiny model can be made has `{"made": why not}` alone.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            make_model(model_type, folder / "model")
        except Exception as problem:
            if debug:
                traceback.print_exc()
            reason = NOT_ALONE.get(model_type) or f"{type(problem).__name__}: {problem}"
            return {"made": _one_line(reason)}
        write_data(folder)
        checks = Checks(folder)
        for name in wanted:
            try:
                found[name] = checks.run(name)
            except MedgptError as problem:
                found[name] = _one_line(f"said: {problem.message}")
            except Wrong as problem:
                found[name] = f"wrong: {problem}"
            except Exception as problem:
                found[name] = _one_line(f"wrong: {type(problem).__name__}: {problem}")
                if debug:
                    traceback.print_exc()
        found["notices"] = " | ".join(dict.fromkeys(checks.notices))
        found["generate"] = checks.generate
    return found


def _one_line(text: str) -> str:
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", " ".join(text.split()))[:200]


def apart(model_type: str, wanted: Sequence[str] = CHECKS) -> dict[str, str]:
    """`examine` in a process forked from this one, within a limit of time and memory."""
    return next(all_apart([model_type], wanted))[1]


def all_apart(
    model_types: Sequence[str], wanted: Sequence[str] = CHECKS, *, jobs: int = 1, debug: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """`apart` of several architectures, `jobs` at one time; each comes as it is done."""
    waiting, running = list(model_types), {}
    with tempfile.TemporaryDirectory() as place:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                answer = Path(place) / name
                child = os.fork()
                if child == 0:
                    with contextlib.suppress(BaseException):
                        _examine_into(name, wanted, answer, debug)
                    os._exit(0)
                running[child] = (name, answer, time.monotonic())
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    name, answer, began = running.pop(child)
                    found = _answered(answer, status, wanted)
                    yield name, {**found, "seconds": f"{time.monotonic() - began:.0f}"}
            time.sleep(0.1)


def _answered(answer: Path, status: int, wanted: Sequence[str]) -> dict[str, str]:
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8"))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM):
        return dict.fromkeys(wanted, f"wrong: it took more than {SECONDS} s of a processor")
    return dict.fromkeys(wanted, f"wrong: its process ended with status {status}")


def _examine_into(model_type: str, wanted: Sequence[str], answer: Path, debug: bool) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = SECONDS + int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    signal.alarm(10 * SECONDS)  # what waits without end uses no processor
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    if not debug:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    found = examine(model_type, wanted, debug=debug)
    atomic_write(answer, json.dumps(found))


def architectures() -> list[str]:
    """The model types of every causal architecture that the installed transformers lists; read without importing it."""
    package = Path(importlib.util.find_spec("transformers").origin).parent
    tree = ast.parse((package / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8"))
    listed = next(
        one.value
        for one in tree.body
        if isinstance(one, ast.Assign) and one.targets[0].id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    )
    return [name for name, _ in ast.literal_eval(listed.args[0] if isinstance(listed, ast.Call) else listed)]


def preload() -> None:
    """What each process would import: forked processes have it already."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    import medicalgpt_cli.engine.generation.scheduler
    import medicalgpt_cli.engine.model.merging
    import medicalgpt_cli.engine.planning.plan
    import medicalgpt_cli.engine.training.reward
    import medicalgpt_cli.engine.training.rl
    import medicalgpt_cli.engine.training.sft  # noqa: F401


# -- the table ---------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_BEGIN, _END = "<!-- architectures -->", "<!-- /architectures -->"
_COLUMNS = {
    "loss, end to end": ("packed",),
    "loss, padded": ("padded",),
    "answers": ("alone", "batch", "served"),
    "LoRA": ("lora",),
    "merge": ("merge",),
    "reward": ("reward",),
    "rl": ("rl",),
    "plan": ("plan",),
}


def table(rows: dict[str, dict[str, str]]) -> str:
    """What was found as Markdown: architectures with the same marks share a row; what was said or is wrong, below."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        if "made" not in row:
            groups.setdefault(tuple(_mark(row, checks) for checks in _COLUMNS.values()), []).append(name)
    lines = ["| architectures | " + " | ".join(_COLUMNS) + " |", "|---" * (1 + len(_COLUMNS)) + "|"]
    for marks, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {', '.join(names)} | " + " | ".join(marks) + " |")
    lines += ["", *_words(rows)]
    alone = [name for name, row in rows.items() if row.get("generate")]
    if alone:
        lines += ["", f"Answers held against the likeliest tokens without a cache: {', '.join(alone)}."]
    lines += ["", "No tiny model could be made of:", ""]
    lines += [f"- {name}: {row['made']}" for name, row in rows.items() if "made" in row]
    return "\n".join(lines)


def _words(rows: dict[str, dict[str, str]]) -> list[str]:
    """What was said or is wrong, a line each, with the checks and the architectures; what only follows is left out."""
    said: dict[str, dict[str, list[str]]] = {}
    for name, row in rows.items():
        for check in CHECKS:
            word = row.get(check, "")
            if word.startswith(("said", "wrong")) and not re.search(r"has no model yet|no model named", word):
                said.setdefault(word.removeprefix("said: "), {}).setdefault(name, []).append(check)
    lines: dict[tuple[str, str], list[str]] = {}
    for word, by_name in said.items():
        for name, checks in by_name.items():
            lines.setdefault((word, ", ".join(checks)), []).append(name)
    return [f"- {', '.join(names)} ({checks}): {word}" for (word, checks), names in lines.items()]


def _mark(row: dict[str, str], checks: Sequence[str]) -> str:
    words = {row.get(check, "").partition(":")[0] for check in checks}
    if checks == ("plan",) and "said" in words:
        return "not known"
    for word, mark in (("wrong", "✗"), ("said", "refused"), ("", "–"), ("pads", "padded instead")):
        if word in words:
            return mark
    return "✓"


def write_table(rows: dict[str, dict[str, str]]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    behind = rest.partition(_END)[2]
    PAGE.write_text(f"{before}{_BEGIN}\n{table(rows)}\n{_END}{behind}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument("--checks", default=",".join(CHECKS), help="some of them, with commas between them")
    parser.add_argument(
        "--json", type=Path, help="read what is known from this file, and keep there what is found"
    )
    parser.add_argument(
        "--failing", action="store_true", help="run those again that --json has no full row of"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many processes at one time")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    preload()
    known: dict[str, Any] = {}
    if asked.json and asked.json.exists():
        known = json.loads(asked.json.read_text(encoding="utf-8"))
    names = asked.only.split(",") if asked.only else architectures()
    if asked.failing:
        names = [name for name in names if bad(known.get(name, {})) or not _is_full(known.get(name, {}))]
    for name, found in all_apart(names, asked.checks.split(","), jobs=asked.jobs, debug=asked.debug):
        before = {} if "made" in found else known.get(name, {})
        known[name] = {**{key: value for key, value in before.items() if key != "made"}, **found}
        print(name, json.dumps(known[name], ensure_ascii=False), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
    if asked.write:
        write_table({name: known[name] for name in architectures() if name in known})


def _is_full(row: dict[str, str]) -> bool:
    return "made" in row or set(CHECKS) <= row.keys()


def bad(row: dict[str, str]) -> list[str]:
    """The checks of a row that found something wrong."""
    return [name for name in CHECKS if row.get(name, "").startswith("wrong")]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
