"""What follows the last stage of a run, by hand or on a schedule: the page, the records, the messages."""

from pathlib import Path

from flows import notify
from flows.run import INTERRUPTED, Run
from tasks.stage.errors import one_line, say


def close(run: Run) -> Path | None:
    """End the records of a run and tell the webhook; gives the page of `lifecycle report`, if it is written."""
    page = None if run.code == INTERRUPTED else _write_page(run.root)
    run.close(page)
    notify.tell_of(run)
    return page


def _write_page(root: Path) -> Path | None:
    """The page: whatever goes wrong with it, the run is what it was."""
    try:
        from flows import page

        return page.write(root)
    except Exception as error:
        say(f"warning: the page reports/lifecycle.html was not written: {one_line(error)[:160]}")
        return None
