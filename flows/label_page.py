"""The page on which people rank answers: Gradio serves it, our own HTML and JavaScript (label.*) show it.

Gradio's parts have no way to rank by keys, and show text as Markdown. Here prompts and answers reach the
browser as JSON and are put in as text.
"""

import hmac
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.labels.desk import Desk
from tasks.stage.errors import UserError, disk_is_full, say, told

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif"]
LAYOUT = ".gradio-container { max-width: 1200px !important; margin: 0 auto; padding: 12px 14px !important; }"


@contextmanager
def served(desk: Desk, labeler: str, host: str, port: int, password: str | None) -> Iterator[str]:
    """Serve the page while the block runs; gives its address.

    `labeler` is who it speaks to first ("": it asks). With a `password` nobody gets in without it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    page = Path(__file__)

    def view(values: Mapping[str, Any]) -> dict[str, Any]:
        return _answer(lambda: desk.view(values["labeler"]))

    def judge(values: Mapping[str, Any]) -> dict[str, Any]:
        return _answer(lambda: desk.judge(**_judgement(values)))

    def undo(values: Mapping[str, Any]) -> dict[str, Any]:
        return _answer(lambda: desk.undo(values["labeler"]))

    with gr.Blocks(title="Rank answers", analytics_enabled=False) as blocks:
        gr.HTML(
            html_template=page.with_name("label.html").read_text(encoding="utf-8"),
            css_template=page.with_name("label.css").read_text(encoding="utf-8"),
            js_on_load=page.with_name("label.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            server_functions=[view, judge, undo],
            labeler=labeler,
        )
    blocks.launch(
        server_name=host,
        server_port=port,
        auth=None
        if password is None
        else lambda _, given: hmac.compare_digest(given.encode(), password.encode()),
        auth_message="Any name, and the password that you were told." if password is not None else None,
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css=LAYOUT,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        share=False,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        blocks.close(verbose=False)


def _judgement(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "labeler": values["labeler"],
        "name": values["item"],
        "verdict": values["verdict"],
        "ranks": values["ranks"],
        "seconds": float(values["seconds"]),
    }


def _answer(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `act` returns; what is wrong, so that the labeler is told on the page."""
    try:
        return act()
    except UserError as error:
        return {"error": told(error)}
    except OSError as error:
        say(f"an answer was not saved: {told(error)}")
        return {"error": "Not saved: the disk is full." if disk_is_full(error) else f"Not saved: {told(error)}"}
