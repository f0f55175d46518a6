"""The web page, made with gradio. Everything it does goes through `turns.py` and the guard."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from medicalgpt_cli.engine.data.normalised import turn_of
from medicalgpt_cli.serving import emergency, page_texts
from medicalgpt_cli.serving.feedback import FeedbackFile
from medicalgpt_cli.serving.turns import Turn, chosen_sampling, drawn, exact, place_of, plain, with_system
from medicalgpt_cli.settings.stages import ServeSettings

_STATIC = Path(__file__).with_name("static")
_LONGEST_QUESTION = 100_000  # characters


def add_page(app: FastAPI, settings: ServeSettings, served: Any) -> None:
    """Mount the page at `/`.

    Raises:
        UsageError: `--feedback-file` cannot be written.
    """
    import gradio as gr

    _silence(gr)
    app.mount("/medgpt", StaticFiles(directory=_STATIC))
    page = _Page(gr, settings, served)
    gr.mount_gradio_app(
        app,
        page.blocks(),
        path="/",
        i18n=page.words,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=(_STATIC / "page.css").read_text(encoding="utf-8"),
        head='<script src="medgpt/page.js" defer></script>',
        show_error=False,
        ssr_mode=False,
        run_history=False,  # it would keep what was typed in the browser's storage
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        max_file_size=0,
    )


class _Silent:
    """Stands in for `traceback` in gradio: the text of an exception can quote what was typed."""

    @staticmethod
    def print_exc(*_: Any, **__: Any) -> None:
        logging.getLogger("medgpt.serving").error("a request of the page failed")


def _silence(gr: Any) -> None:
    import gradio.queueing
    import gradio.route_utils
    import gradio.routes

    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = _Silent
        module.print = lambda *_, **__: None


class _Page:
    def __init__(self, gr: Any, settings: ServeSettings, served: Any):
        self.gr, self.settings, self.served = gr, settings, served
        self.answers = served.answers
        self.words = gr.I18n(**page_texts.translations())
        self.feedback = FeedbackFile(settings.feedback_file) if settings.feedback_file else None
        self.models = list(self.answers.models)

    # -- what there is on the page -------------------------------------------------------------------------------

    def blocks(self) -> Any:
        gr, words = self.gr, self.words
        with gr.Blocks(title="medgpt", analytics_enabled=False, fill_height=True) as blocks:
            gr.Markdown(self._head(), elem_id="medgpt-head")
            gr.Markdown(page_texts.DISCLAIMER)
            self.controls = self._drawer()
            self.alert = gr.Markdown("", elem_id="medgpt-alert")
            with gr.Row(equal_height=True, elem_id="medgpt-chats"):
                self.chat = self._chatbot(words("answer"), "medgpt-chat", examples=True)
                self.other = self._chatbot(words("base"), "medgpt-base", visible=False)
            with gr.Row(visible=False, elem_id="medgpt-votes") as self.votes:
                left = gr.Button(words("left"), elem_id="medgpt-left", size="sm")
                right = gr.Button(words("right"), elem_id="medgpt-right", size="sm")
            self.status = gr.Markdown("", elem_id="medgpt-status")
            self.box = gr.Textbox(
                placeholder=words("ask"),
                show_label=False,
                autofocus=True,
                submit_btn=True,
                stop_btn=False,
                max_lines=8,
                max_length=_LONGEST_QUESTION,
                elem_id="medgpt-question",
            )
            with gr.Row(elem_id="medgpt-tools"):
                clear = gr.Button(words("clear"), size="sm", elem_id="medgpt-clear")
                gr.Button(words("download"), size="sm", elem_id="medgpt-download")
                gr.Button(words("theme"), size="sm", elem_id="medgpt-theme")
                compare = gr.Checkbox(
                    label=words("compare"), visible=len(self.models) > 1, elem_id="medgpt-compare"
                )
            # what the browser offers as a download; made there, never sent back
            self.kept = gr.Textbox("", visible="hidden", elem_id="medgpt-conversation", interactive=True)
            self.tries = gr.State(0)
            self.compare = compare
            self._wire(clear, left, right)
        blocks.queue(default_concurrency_limit=None, api_open=False, max_size=512)
        return blocks

    def _head(self) -> str:
        title, about = html.escape(self.served.title), html.escape(self.served.about)
        starter = f"<p>{page_texts.STARTER}</p>" if self.served.starter else ""
        return f"<h1>medgpt</h1> <span><b>{title}</b> · {about}</span>{starter}"

    def _chatbot(self, label: Any, name: str, *, visible: bool = True, examples: bool = False) -> Any:
        return self.gr.Chatbot(
            label=label,
            elem_id=name,
            visible=visible,
            height="55vh",
            min_width=280,
            editable="user" if examples else None,
            buttons=["copy"],
            feedback_options=("Like", "Dislike"),
            allow_file_downloads=False,
            examples=[{"text": one} for one in page_texts.EXAMPLES] if examples else None,
        )

    def _drawer(self) -> list[Any]:
        gr, words, given = self.gr, self.words, self.settings
        with gr.Sidebar(open=False, position="right", elem_id="medgpt-settings"):
            gr.Markdown("### " + "Settings · 设置")
            return [
                gr.Textbox(given.system_prompt or "", label=words("system"), lines=3, max_length=20_000),
                gr.Slider(0, 2, min(given.temperature, 2), step=0.05, label=words("temperature")),
                gr.Slider(0.05, 1, given.top_p, step=0.05, label=words("top_p")),
                gr.Slider(0, 200, min(given.top_k, 200), step=1, label=words("top_k")),
                gr.Slider(
                    1,
                    2,
                    min(max(given.repetition_penalty, 1), 2),
                    step=0.05,
                    label=words("penalty"),
                    visible=not self.served.remote,
                ),
                gr.Slider(1, given.max_new_tokens, given.max_new_tokens, step=1, label=words("longest")),
                gr.Number(given.seed, precision=0, minimum=0, maximum=2**53 - 1, label=words("seed")),
            ]

    # -- what happens --------------------------------------------------------------------------------------------

    def _wire(self, clear: Any, left: Any, right: Any) -> None:
        gr = self.gr
        inputs = [self.chat, self.kept, self.other, self.tries, self.compare, *self.controls]
        outputs = [
            self.box,
            self.chat,
            self.other,
            self.alert,
            self.status,
            self.kept,
            self.tries,
            self.votes,
        ]
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

        async def ask(request: Any, question: str, *values: Any) -> AsyncIterator[tuple]:
            async for update in self._turn(request, question, exact(*values[:2]), 0, values):
                yield update

        async def example(picked: Any, request: Any, *values: Any) -> AsyncIterator[tuple]:
            async for update in self._turn(request, picked.value["text"], [], 0, values):
                yield update

        async def retry(picked: Any, request: Any, *values: Any) -> AsyncIterator[tuple]:
            history, place = exact(*values[:2]), place_of(values[0], picked.index)
            question = history[place]["content"]
            async for update in self._turn(request, question, history[:place], values[3] + 1, values):
                yield update

        async def edit(picked: Any, request: Any, *values: Any) -> AsyncIterator[tuple]:
            history = exact(*values[:2])[: place_of(values[0], picked.index)]
            async for update in self._turn(request, str(picked.value), history, 0, values):
                yield update

        # gradio knows by the annotation which arguments are the event and the request
        for function, picked in ((example, gr.SelectData), (retry, gr.RetryData), (edit, gr.EditData)):
            function.__annotations__ = {"picked": picked, "request": gr.Request}
        ask.__annotations__ = {"request": gr.Request}
        running = [
            self.box.submit(ask, [self.box, *inputs], outputs, **quiet),
            self.chat.example_select(example, inputs, outputs, **quiet),
            self.chat.retry(retry, inputs, outputs, **quiet),
            self.chat.edit(edit, inputs, outputs, **quiet),
        ]
        stopped = [self.box, self.kept, self.status]
        halt = self.box.stop(None, None, None, cancels=running, api_visibility="private")
        halt.then(self._stopped, [self.chat, self.controls[0]], stopped, **quiet)
        for event in (clear.click, self.chat.clear):
            halt = event(None, None, None, cancels=running, api_visibility="private")
            halt.then(self._cleared, None, outputs, **quiet)
        self.compare.change(
            lambda on: (gr.update(visible=on), gr.update(visible=False)),
            self.compare,
            [self.other, self.votes],
            **quiet,
        )
        if self.feedback:
            self._wire_feedback(left, right, quiet)

    async def _turn(
        self, request: Any, question: str, history: list[Any], tries: int, values: tuple
    ) -> AsyncIterator[tuple]:
        """One question: yields what every part of the page becomes."""
        gr = self.gr
        _, _, other, _, compare, system, *sampling = values
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")
        both = bool(compare) and len(self.models) > 1
        if not isinstance(question, str) or not question.strip():
            yield (gr.update(),) * 8
            return
        while history and history[-1]["role"] == "user":  # a question that got no answer
            history = history[:-1]
        asked = [*history, {"role": "user", "content": question}]
        aside = [*plain(other)[: len(history)], asked[-1]] if both else []
        chosen = chosen_sampling(self.answers.sampling, **dict(zip(names, sampling, strict=True)))
        turn = Turn(self.answers, self.models[: 2 if both else 1])
        alert = emergency.banner(question)

        def page(running: bool) -> tuple:
            said = [*asked, *turn.answer(0)]
            shown = drawn(said, running=running)
            beside = drawn([*aside, *turn.answer(-1)], running=running) if both else []
            box = gr.update(submit_btn=not running, stop_btn=running, **({"value": ""} if running else {}))
            kept = gr.update() if running else _kept(with_system(said, system))
            votes = gr.update(visible=both and not running and self.feedback is not None)
            return box, shown, beside, alert, turn.status, kept, tries, votes

        yield page(True)
        progress = turn.progress(
            with_system(asked, system), chosen, request.state.client, request.session_hash, tries
        )
        try:
            async for _ in progress:
                yield page(True)
        finally:
            await progress.aclose()
        yield page(False)

    def _stopped(self, history: list[Any], system: str) -> tuple:
        box = self.gr.update(submit_btn=True, stop_btn=False)
        return box, _kept(with_system(plain(history), system)), "stopped 已停止"

    def _cleared(self) -> tuple:
        box = self.gr.update(value="", submit_btn=True, stop_btn=False)
        return box, [], [], "", "", "", 0, self.gr.update(visible=False)

    # -- preferences ---------------------------------------------------------------------------------------------

    def _wire_feedback(self, left: Any, right: Any, quiet: dict[str, Any]) -> None:
        gr = self.gr

        def thumb(picked: Any, request: Any, history: list[Any], kept: str, system: str) -> str:
            said = exact(history, kept)
            place = place_of(history, picked.index if isinstance(picked.index, int) else picked.index[0])
            if not 0 < place < len(said) or picked.liked not in (True, False):
                return ""
            prompt = with_system(said[:place], system)
            return self._saved(
                lambda: self.feedback.rate(
                    request.state.client, prompt, said[place]["content"], bool(picked.liked)
                ),
                page_texts.NOTED,
            )

        def vote(tuned_is_better: bool) -> Any:
            def judge(history: list[Any], kept: str, other: list[Any], system: str) -> tuple:
                said, beside = exact(history, kept), plain(other)
                if len(said) < 2 or len(beside) < 2:
                    return "", gr.update(visible=False)
                tuned, base = said[-1]["content"], beside[-1]["content"]
                better, worse = (tuned, base) if tuned_is_better else (base, tuned)
                prompt = with_system(said[:-1], system)
                saved = self._saved(lambda: self.feedback.prefer(prompt, better, worse), page_texts.NOT_SAVED)
                return saved, gr.update(visible=False)

            return judge

        thumb.__annotations__ = {"picked": gr.LikeData, "request": gr.Request}
        self.chat.like(thumb, [self.chat, self.kept, self.controls[0]], self.status, **quiet)
        for button, tuned_is_better in ((left, True), (right, False)):
            button.click(
                vote(tuned_is_better),
                [self.chat, self.kept, self.other, self.controls[0]],
                [self.status, self.votes],
                **quiet,
            )

    def _saved(self, save: Any, otherwise: str) -> str:
        try:
            return page_texts.THANKS if save() else otherwise
        except OSError:
            return page_texts.NOT_SAVED


def _kept(messages: list[Any]) -> str:
    """The conversation as `medgpt chat --load` and `medgpt sft` read it."""
    return json.dumps({"messages": [turn_of(one) for one in messages]}, ensure_ascii=False)
