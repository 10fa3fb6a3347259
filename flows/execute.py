"""Carry out a run through Prefect, whatever becomes of Prefect: the record may be lost, the work is not."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType

from flows import server
from flows.display import Display
from flows.run import Run
from tasks.stage.errors import one_line, say

SECONDS_BETWEEN_LOOKS = 0.2
PREFECT = {
    "PREFECT_CLIENT_MAX_RETRIES": "1",  # a server that is gone is given up after seconds, not minutes
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the display speaks
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
}


def execute(run: Run, display: Display) -> bool:
    """Bring every stage of `run` up to date; whether Prefect has the record of it.

    The flow runs in a thread of its own, so that Ctrl-C reaches us here: the first stops the stages, which save
    their checkpoints, a second one kills them.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="flow")
    recorded = thread.submit(_work, run)
    with display:
        while not recorded.done():
            try:
                wait([recorded], SECONDS_BETWEEN_LOOKS)
                display.refresh()
            except KeyboardInterrupt:
                if run.stop.is_set():
                    raise
                run.stop.set()
                say("stopping: the running stages save their checkpoints (Ctrl-C again kills them)")
    return recorded.result()


def _work(run: Run) -> bool:
    recorded = True
    try:
        _with_server(run)
    except Exception as error:  # Prefect's own trouble: a stage's failure is in its result
        recorded = False
        if not run.stop.is_set():
            say(f"warning: Prefect lost the record of this run ({one_line(error)[:120]}); the work goes on")
    run.settle_rest()
    return recorded


def _with_server(run: Run) -> None:
    url = server.configured(run.root)
    if url is not None and not server.answers(url):
        say(f"warning: the Prefect server {url} does not answer; a temporary one records this run")
        url = None
    if url is not None:
        _import_flow(url).start(run)
        return
    with server.temporary(run.root) as (url, process):
        flow = _import_flow(url)  # takes as long as a server takes to start
        server.await_start(url, process, run.stop)
        flow.start(run)
        run.flow_run_url = ""  # gone with the server


def _import_flow(url: str) -> ModuleType:
    os.environ.update({**PREFECT, **os.environ, "PREFECT_API_URL": url})
    logging.raiseExceptions = False  # log lines that a dead server does not take are no news
    from flows import lifecycle

    return lifecycle
