"""The page on which people rank answers: Gradio serves it, our own HTML and JavaScript (label.*) show it.

Gradio's parts have no way to rank by keys, and show text as Markdown. Here prompts and answers reach the
browser as JSON and are put in as text.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.labels.desk import Desk
from tasks.stage.errors import UserError, disk_is_full, say, told

if TYPE_CHECKING:
    from gradio import Blocks

LAYOUT = (
    ".gradio-container { max-width: 1200px !important; margin: 0 auto; padding: 12px 14px !important; }"
    ".gradio-container main { padding: 0 !important; }"
)


def build(desk: Desk, labeler: str) -> "Blocks":
    """The page; `labeler` is who it speaks to first ("": it asks)."""
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
    return blocks


def _judgement(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "labeler": values["labeler"],
        "name": values["item"],
        "verdict": values["verdict"],
        "answers": values["answers"],
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
