"""The page in a real browser (Debian's chromium): nothing is simulated, and nothing leaves the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from medicalgpt_cli.engine.data import messages
from medicalgpt_cli.engine.data.counts import Counts
from medicalgpt_cli.engine.data.preferences import load_pairs
from medicalgpt_cli.engine.generation.conversation import Conversation
from medicalgpt_cli.engine.observer import Observer
from medicalgpt_cli.settings.stages import ChatSettings
from tests.serving.running import running
from tests.serving.test_api import until
from tests.talker import PLAIN, THOUGHT, talker
from tests.tiny import text, tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
SCREENSHOTS = os.environ.get("MEDGPT_TEST_SCREENSHOTS")
SYSTEM = "You are a careful doctor."
TOKENS = 24


def adapter(folder: Path) -> Path:
    """An adapter over a tiny model that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model(folder / "tiny", seed=3)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder / "tuned")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "tuned")
    return folder / "tuned"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(place):
    chosen = {"max_new_tokens": 2000, "system_prompt": SYSTEM, "feedback_file": place / "pairs.jsonl"}
    with running(None, page=True, base_model=None, lora_model=str(adapter(place)), **chosen) as one:
        yield one


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright (pip install playwright)"
    )
    with playwright.sync_playwright() as one:
        opened = one.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def shoot(page, name: str) -> None:
    """A picture for people, where MEDGPT_TEST_SCREENSHOTS names a folder."""
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


class Page:
    """What a person does on the page."""

    def __init__(self, browser, server, **options):
        self.context = browser.new_context(**{"locale": "en-GB", **options})
        self.page, self.server = self.context.new_page(), server
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda one: self.asked.append(one.url))
        self.fetched: list[str] = []  # with an answer
        self.page.on("response", lambda one: self.fetched.append(one.url))
        self.page.on(
            "response",
            lambda one: self.wrong.append(f"{one.status} {one.url}") if one.status >= 400 else None,
        )
        self.page.on("console", lambda one: self.wrong.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda one: self.wrong.append(str(one)))
        self.page.goto(server.url)
        self.page.wait_for_selector("#medgpt-question textarea")

    def ask(self, question: str, *, wait: bool = True) -> None:
        self.page.fill("#medgpt-question textarea", question)
        self.page.keyboard.press("Enter")
        if wait:
            self.wait_for(question)

    def wait_for(self, question: str) -> None:
        """Until the answer to a question is whole: only then it is kept for the download."""

        def answered() -> bool:
            self.page.wait_for_timeout(50)
            last = [one["content"] for one in self.kept[-2:-1]]
            return last == [question]

        until(answered)
        self.page.wait_for_selector("#medgpt-question .submit-button")

    @property
    def kept(self) -> list[dict[str, str]]:
        value = self.page.eval_on_selector("#medgpt-conversation textarea", "e => e.value")
        return json.loads(value)["messages"] if value else []

    def answers(self) -> list[str]:
        return [one["content"] for one in self.kept if one["role"] == "assistant"]

    def shorten(self, tokens: int = TOKENS) -> None:
        self.page.click("#medgpt-settings .toggle-button")
        field = self.page.locator("#medgpt-settings input[type=number]").nth(4)
        field.fill(str(tokens))
        field.press("Tab")
        self.page.click("#medgpt-settings .toggle-button")

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def page(browser, server):
    one = Page(browser, server)
    yield one
    foreign = [url for url in one.asked if not url.startswith((server.url, "data:", "blob:"))]
    one.close()
    assert foreign == [] and one.wrong == []


def talk(server) -> Conversation:
    settings = server.settings
    return Conversation.open(
        ChatSettings(
            lora_model=settings.lora_model,
            system_prompt=SYSTEM,
            max_new_tokens=TOKENS,
            use_cpu=True,
            dtype="fp32",
        ),
        Observer(),
    )


def test_it_answers_as_the_command_line_and_remembers(page, server, tmp_path):
    conversation = talk(server)
    page.shorten()
    for question in ("What is fever?", "Why?"):
        page.ask(question)
        assert page.answers()[-1] == text(conversation.ask(question))
    assert page.kept == conversation.messages
    assert "24 tokens" in page.page.inner_text("#medgpt-status")
    with page.page.expect_download() as download:
        page.page.click("#medgpt-download")
    download.value.save_as(tmp_path / "kept.json")
    conversation.load(tmp_path / "kept.json")  # `medgpt chat --load` takes it up
    assert conversation.messages == page.kept

    before = server.scheduler.counters.finished
    page.page.locator("#medgpt-chat button[aria-label=Retry]").last.click()  # greedy: the same again
    until(lambda: server.scheduler.counters.finished == before + 1)
    page.page.wait_for_timeout(1000)
    assert page.kept == conversation.messages

    page.page.locator("#medgpt-chat button[aria-label=Edit]").first.click()
    page.page.locator("#medgpt-chat textarea").first.fill("What is anaemia?")
    page.page.locator("#medgpt-chat button[aria-label=Submit]").first.click()
    page.wait_for("What is anaemia?")
    conversation.reset()
    text(conversation.ask("What is anaemia?"))
    assert page.kept == conversation.messages

    page.page.click("#medgpt-clear")
    page.page.wait_for_selector("#medgpt-chat .examples, #medgpt-chat .example", timeout=10_000)
    assert page.kept == []


def test_stop_keeps_what_was_said_and_frees_the_place(page, server):
    page.ask("Tell me everything", wait=False)
    stop = page.page.wait_for_selector("#medgpt-question .stop-button")
    page.page.locator("#medgpt-chat .bot", has_text=re.compile(".{20}", re.DOTALL)).wait_for()
    before = server.scheduler.counters.cancelled
    stop.click()
    page.page.wait_for_selector("#medgpt-question .submit-button")
    until(lambda: server.scheduler.load == {"waiting": 0, "running": 0})
    assert server.scheduler.counters.cancelled == before + 1
    page.page.locator("#medgpt-status", has_text="stopped").wait_for()
    assert len(page.answers()[-1]) > 0
    assert len(page.answers()[-1]) < 5 * 2000


def test_a_closed_browser_frees_its_place(browser, server):
    one = Page(browser, server)
    one.ask("Tell me everything", wait=False)
    until(lambda: server.scheduler.load["running"] == 1)
    before = server.scheduler.counters.cancelled
    one.close()
    until(lambda: server.scheduler.load == {"waiting": 0, "running": 0})
    assert server.scheduler.counters.cancelled == before + 1


def test_both_models_side_by_side_and_which_is_better(page, server, place):
    page.shorten()
    page.page.click("#medgpt-compare input")
    page.page.wait_for_selector("#medgpt-base")
    page.ask("What is fever?")
    shoot(page.page, "side-by-side")
    tuned = page.page.locator("#medgpt-chat .bot").last.inner_text()
    base = page.page.locator("#medgpt-base .bot").last.inner_text()
    assert tuned.strip() != base.strip()
    page.page.click("#medgpt-right")
    page.page.locator("#medgpt-status", has_text="Thank you").wait_for()
    [pair] = load_pairs([str(place / "pairs.jsonl")], Counts(), Observer())
    assert pair.rejected == page.answers()[-1] and pair.chosen != pair.rejected
    assert [one["content"] for one in pair.messages] == [SYSTEM, "What is fever?"]
    with server.client() as client:  # the API speaks as either, too
        base_name = list(server.served.answers.models)[1]
        body = {"model": base_name, "messages": list(pair.messages), "max_tokens": TOKENS}
        reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == pair.chosen
    assert (place / "pairs.jsonl").stat().st_mode & 0o077 == 0


def test_banner_dark_chinese_and_phone(browser, server, tmp_path):
    phone = Page(browser, server, viewport={"width": 375, "height": 740}, locale="zh-CN", color_scheme="dark")
    assert phone.page.get_attribute("#medgpt-question textarea", "placeholder") == "请输入问题"
    assert phone.page.evaluate("document.body.classList.contains('dark')")
    phone.shorten()
    phone.ask("我胸痛，呼吸困难")
    alert = phone.page.wait_for_selector(".medgpt-alert")
    assert "120" in alert.inner_text()
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 375  # nothing sticks out
    shoot(phone.page, "phone-dark")
    phone.page.click("#medgpt-theme")
    assert not phone.page.evaluate("document.body.classList.contains('dark')")
    phone.ask("高血压")
    assert phone.page.query_selector(".medgpt-alert") is None
    shoot(phone.page, "phone-light")
    assert phone.wrong == []
    phone.close()


def test_what_a_model_says_cannot_run_or_fetch_anything(browser, server):
    """The page shows model text as Markdown: markup in it stays without effect."""
    one = Page(browser, server)
    one.page.evaluate("window.reached = false")
    bad = '<img src=x onerror="window.reached=true"> ![x](http://192.0.2.1/leak.png)'
    bad += "<script>window.reached=true</script>"
    one.shorten(4)
    one.ask(bad)
    one.page.wait_for_timeout(500)
    assert one.page.evaluate("window.reached") is False
    assert not [url for url in one.fetched if "192.0.2.1" in url]
    one.close()


def test_thoughts_are_folded_kept_and_no_message_of_their_own(browser, tmp_path):
    learnt = messages.Conversation((*THOUGHT, *PLAIN), "a:1")
    with running(talker(tmp_path / "tiny", "qwen3", [learnt]), page=True, max_new_tokens=120) as server:
        one = Page(browser, server)
        said = [*THOUGHT, *PLAIN]
        one.ask(THOUGHT[0]["content"])
        turn = {"role": "assistant", "content": THOUGHT[1]["content"]}
        first = [THOUGHT[0], {**turn, "reasoning_content": THOUGHT[1]["reasoning"]}]
        assert one.kept == first
        one.page.locator("#medgpt-chat", has_text="Thoughts 思考过程").wait_for()
        assert not one.page.get_by_text(THOUGHT[1]["reasoning"]).is_visible()  # folded
        one.page.get_by_text("Thoughts 思考过程").click()
        one.page.get_by_text(THOUGHT[1]["reasoning"]).wait_for(state="visible")
        shoot(one.page, "thoughts")
        one.ask(PLAIN[0]["content"])
        whole = one.kept
        assert whole[:3] == [*first, PLAIN[0]] and len(whole) == len(said)

        before = server.scheduler.counters.finished
        one.page.locator("#medgpt-chat button[aria-label=Retry]").last.click()
        until(lambda: server.scheduler.counters.finished == before + 1)
        one.page.wait_for_timeout(1000)
        assert one.kept == whole  # the same question with the same history

        one.page.locator("#medgpt-chat button[aria-label=Edit]").last.click()  # the second question
        one.page.locator("#medgpt-chat textarea").last.fill(THOUGHT[0]["content"])
        one.page.locator("#medgpt-chat button[aria-label=Submit]").first.click()
        one.wait_for(THOUGHT[0]["content"])
        assert one.kept[:3] == [*first, THOUGHT[0]]
        assert one.wrong == []
        one.close()
