"""A Gradio page as a service: on this machine alone, or behind a password, until Ctrl-C."""

import hmac
import ipaddress
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

from flows import server
from tasks.stage.errors import UserError, say

if TYPE_CHECKING:
    from gradio import Blocks

PASSWORD = "LIFECYCLE_PASSWORD"  # noqa: S105 - the name of the variable
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "DejaVu Sans Mono", "monospace")
SECONDS_TO_END = 1  # an open page holds a connection for as long as it is open
ASKED = "The password is that of LIFECYCLE_PASSWORD; the name does not matter."


def check_host(host: str, port: int) -> None:
    """Raise UserError for an open door (another host than loopback without a password), or a port in use."""
    if not is_loopback(host) and not os.environ.get(PASSWORD):
        raise UserError(
            f"--host {host} would let others on the network in: set a password in {PASSWORD} first, "
            "or leave --host out"
        )
    if not server.is_free(port):
        raise UserError(f"port {port} is in use: choose another with --port")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def launch(page: "Blocks", host: str, port: int, css: str) -> None:
    """Serve the page until KeyboardInterrupt. Where LIFECYCLE_PASSWORD is set, it is asked for.

    No share link, no telemetry, no file of this machine. Raises UserError as `check_host` does.
    """
    import uvicorn
    from fastapi import FastAPI
    from gradio import mount_gradio_app
    from gradio.themes import Base, Font

    check_host(host, port)
    # not Blocks.launch, which gives up when the server is not up within 5 s and says that the port is taken
    app = mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="",
        server_name=host,
        server_port=port,
        auth=_knows if os.environ.get(PASSWORD) else None,
        auth_message=ASKED,
        theme=Base(font=[Font(name) for name in FONTS], font_mono=[Font(name) for name in MONO]),
        css=css,
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                sys.stdout.write(f"{address}\n")
                sys.stdout.flush()
                say("Ctrl-C ends it")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            logging.getLogger("uvicorn.error").disabled = True  # an open page's connection is cut: no error
            await super().shutdown(sockets)

    try:
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_END
        )
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        Server(config).run()
    except KeyboardInterrupt:
        say("ending it")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether an error is more than that a page was closed: what it waited for is then answered by a 404 that
    comes too late.
    """
    from fastapi import HTTPException

    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error and error.__cause__, HTTPException)


def _knows(_name: str, password: str) -> bool:
    return hmac.compare_digest(password.encode(), os.environ[PASSWORD].encode())
