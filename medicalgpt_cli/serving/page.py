"""The web page."""

from __future__ import annotations

from typing import Any


def add_page(app: Any, settings: Any, served: Any) -> None:
    import gradio as gr

    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Markdown("hello")
        gr.ChatInterface(lambda m, h: m)
    gr.mount_gradio_app(app, blocks, path="/", ssr_mode=False, show_error=False)
