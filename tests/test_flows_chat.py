"""`lifecycle chat`: who is let in, and the page in a real browser."""

import json
import logging
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import browser
import command_host
import pytest
from playground_toys import HOSTILE, ROOT, lay_out
from toy import until

from flows import pages, server
from tasks.stage import UserError

PASSWORD = "open sesame"
TOOLS = """
function type(id, text) {
  const field = document.querySelector(`#${id} input[type=number], #${id} textarea`);
  const kind = field.tagName === 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(field, text);
  for (const name of ['input', 'change', 'blur']) field.dispatchEvent(new Event(name, {bubbles: true}));
}
function pick(id, label) {
  [...document.querySelectorAll(`#${id} label`)].find(each => each.textContent.trim() === label).click();
}
function text(id) { return document.querySelector(`#${id}`).textContent; }
function press(id) { document.querySelector(`#${id}`).click(); }
"""


# --- who is let in


def test_only_with_a_password_is_anything_but_this_machine_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pages.PASSWORD, raising=False)
    free = server.free_port()
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(UserError, match="set a password in LIFECYCLE_PASSWORD"):
            pages.check_host(host, free)
    for host in ("127.0.0.1", "localhost", "::1"):
        pages.check_host(host, free)
    monkeypatch.setenv(pages.PASSWORD, "secret")
    pages.check_host("0.0.0.0", free)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            pages.check_host("127.0.0.1", port)


class Service(NamedTuple):
    """The command, running with a password."""

    url: str
    process: command_host.Command
    log: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = lay_out(tmp_path_factory.mktemp("chat"))
    port, log = server.free_port(), root / "chat.log"
    command = [sys.executable, "-m", "flows.cli", "chat", "--port", str(port)]
    process = command_host.start(command, root, {**os.environ, pages.PASSWORD: PASSWORD}, log)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or url in log.read_text(), "the page", seconds=120)
        assert process.poll() is None, log.read_text()
        yield Service(f"{url}/", process, log)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def tab(service: Service, tab: browser.Browser) -> browser.Browser:
    """A browser that has given the password."""
    tab.open(service.url, 400, 900, "light")
    for password, status in (("guess", 400), (PASSWORD, 200)):
        tab.ask(
            f"fetch('login', {{method: 'POST', body: new URLSearchParams({{username: 'me', password: "
            f"'{password}'}})}}).then(answer => window.status_ = answer.status); 0"
        )
        assert tab.until("window.status_") == status
        tab.ask("window.status_ = 0")
    return tab


def opened(tab: browser.Browser, service: Service, width: int = 1600, scheme: str = "light") -> browser.Browser:
    tab.open(service.url, width, 1000, scheme)
    tab.until("document.querySelector('#answer') !== null")
    tab.ask(TOOLS)
    return tab


def answered(tab: browser.Browser) -> None:
    """Ask the variants that are ticked for another test example, and wait until both have answered."""
    prompt = "document.querySelector('#prompt textarea').value"
    before = tab.ask(prompt)
    tab.ask("press('example')")
    tab.until(f"{prompt} !== {json.dumps(before)}")
    tab.ask("press('answer')")
    tab.until("document.querySelectorAll('#answers dl').length === 2 && text('chart') !== ''")


def test_without_the_password_nothing_is_told(service: Service) -> None:
    for path in ("config", "gradio_api/info", "gradio_api/queue/join"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(service.url + path)
        refused.value.close()
        assert refused.value.code in (401, 405)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_two_answers_side_by_side(
    tab: browser.Browser, service: Service, width: int, scheme: str
) -> None:
    answered(opened(tab, service, width, scheme))
    assert tab.ask("[...document.querySelectorAll('#answers h3')].map(name => name.textContent)") == [
        "finetune", "ppo",
    ]  # fmt: skip
    assert tab.ask("document.querySelector('#reference textarea').value") != ""
    tab.until("document.querySelector('#chart table').getBoundingClientRect().width")  # that it has a place
    seen = tab.ask()
    assert seen["overflow"] <= 0
    paper = sum(int(part) for part in seen["paper"].strip("rgb()").split(","))
    assert (paper > 600) if scheme == "light" else (paper < 150)
    assert tab.complaints((service.url, "data:")) == []


def test_a_setting_changes_the_picture_and_a_token_chooses_it(tab: browser.Browser, service: Service) -> None:
    answered(opened(tab, service))
    assert "temperature" not in tab.ask("text('chart')")
    tab.ask("pick('strategy', 'Sampling')")
    tab.until("document.querySelector('#temperature input[type=number]') !== null")
    tab.ask("type('temperature', '2.5')")
    tab.until("text('chart').includes('temperature 2.5')")
    warm = tab.ask("document.querySelector('#chart').innerHTML")
    tab.ask("type('temperature', '0.3')")
    tab.until("text('chart').includes('temperature 0.3')")
    assert tab.ask("document.querySelector('#chart').innerHTML") != warm
    tab.ask("type('top_k', '2')")
    tab.until("text('chart').includes('top-k 2')")
    assert tab.ask("document.querySelectorAll('#chart .cut').length") > 0
    first = tab.ask("text('chart')")
    tab.ask("document.querySelectorAll('#strip button')[2].click()")
    tab.until("document.querySelectorAll('#strip button')[2].getAttribute('aria-current') === 'true'")
    assert tab.ask("text('chart')") != first
    tab.ask("press('after')")
    tab.until("document.querySelectorAll('#strip button')[3].getAttribute('aria-current') === 'true'")
    assert tab.complaints((service.url, "data:")) == []


def test_what_is_wrong_is_said_on_the_page(tab: browser.Browser, service: Service) -> None:
    opened(tab, service).ask("type('prompt', '')")
    tab.ask("press('answer')")
    tab.until("text('trouble').includes('the prompt is empty')")
    answered(tab)
    assert tab.ask("text('trouble')").strip() == ""
    tab.ask("type('max_new_tokens', '0')")
    tab.ask("press('answer')")
    tab.until("text('trouble').includes('max_new_tokens is 0; it must be a whole number from 1 to 2,048')")
    assert tab.ask("document.querySelectorAll('#answers dl').length") == 2
    assert "Traceback" not in service.log.read_text()


def test_a_prompt_is_shown_as_text(tab: browser.Browser, service: Service) -> None:
    opened(tab, service).ask(f"type('prompt', {json.dumps(HOSTILE)})")
    tab.ask("press('answer')")
    tab.until("document.querySelectorAll('#answers dl').length === 2")
    assert tab.ask("document.querySelector('#answers pre').textContent") == HOSTILE
    assert tab.ask("document.querySelectorAll('#answers img, #answers b').length") == 0
    assert tab.ask("document.title") != "taken"


def test_no_file_of_this_machine_is_served(tab: browser.Browser, service: Service) -> None:
    opened(tab, service)
    for path in ("params.yaml", str(ROOT / "params.yaml")):
        tab.ask(f"fetch('gradio_api/file={path}').then(answer => window.status_ = answer.status); 0")
        assert tab.until("window.status_") in (403, 404)
        tab.ask("window.status_ = 0")


def test_that_a_page_was_closed_is_no_news_and_other_errors_are() -> None:
    from fastapi import HTTPException

    def told(cause: Exception) -> bool:
        try:
            raise RuntimeError("response already started") from cause
        except RuntimeError:
            record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "", (), sys.exc_info())
            return pages._is_news(record)

    assert not told(HTTPException(404))
    assert told(ValueError("of ours"))
    assert pages._is_news(logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "in words", (), None))


def test_interrupted_it_ends_and_leaves_the_port(service: Service) -> None:
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    assert "Traceback" not in service.log.read_text()
    assert server.is_free(int(service.url.rsplit(":", 1)[1].strip("/")))
