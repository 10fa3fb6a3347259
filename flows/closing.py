"""What follows the last stage of a run, by hand or on a schedule: the page, the records, the messages."""

from pathlib import Path

from flows import notify, pipeline
from flows.run import INTERRUPTED, Run
from tasks.stage.errors import one_line, say


def close(run: Run) -> Path | None:
    """End the records of a run and tell the webhook; gives the page of `lifecycle report`, if it is written."""
    page = None if run.code == INTERRUPTED else _page(run)
    run.close(page)
    notify.tell_of(run)
    return page


def _page(run: Run) -> Path | None:
    """The page, written anew unless nothing has happened since; whatever goes wrong, the run is what it was."""
    try:
        from flows import page

        there, lock = run.root / page.PAGE, run.root / pipeline.LOCK_FILE
        if not run.due and there.is_file() and there.stat().st_mtime >= lock.stat().st_mtime:
            return there
        return page.write(run.root)
    except Exception as error:
        say(f"warning: the page reports/lifecycle.html was not written: {one_line(error)[:160]}")
        return None
