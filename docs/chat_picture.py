"""Write docs/chat.png: the page of `lifecycle chat` with two answers, in headless Chromium.

python docs/chat_picture.py      # after the pipeline has run; needs Chromium
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "chat.png"
SECONDS = 300
WIDTH, HEIGHT = 1200, 1350
SETTINGS = {"temperature": "1.2", "top_k": "8", "top_p": "0.95"}
COLOURS = 64
TYPE = """
(field => {{
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, '{value}');
  for (const event of ['input', 'change', 'blur']) field.dispatchEvent(new Event(event, {{bubbles: true}}));
}})(document.querySelector('#{name} input[type=number]'))
"""

sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

from flows import server  # noqa: E402


def main() -> None:
    """Start the page, ask, look at the token the model is least sure of, write the picture."""
    port = server.free_port()
    url = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen([sys.executable, "-m", "flows.cli", "chat", "--port", str(port)], cwd=ROOT)
    try:
        end = time.monotonic() + SECONDS
        while server.is_free(port):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit("the page did not start")
            time.sleep(0.2)
        with (
            tempfile.TemporaryDirectory() as folder,
            browser.started(browser.found() or "chromium", Path(folder)) as tab,
        ):
            _ask(tab.open(url, WIDTH, HEIGHT, "light"))
            tab.picture(PICTURE)
        Image.open(PICTURE).quantize(COLOURS).save(PICTURE, optimize=True)
    finally:
        process.terminate()
        process.wait()


def _ask(tab: browser.Browser) -> None:
    tab.until("document.querySelector('#answer') !== null")
    tab.ask("[...document.querySelectorAll('#strategy label')][1].click()")
    tab.ask("document.querySelector('#answer').click()")
    tab.until("document.querySelectorAll('#answers dl').length === 2")
    tab.until("document.querySelector('#strip button') !== null")
    for name, value in SETTINGS.items():
        tab.until(f"document.querySelector('#{name} input[type=number]') !== null")
        tab.ask(TYPE.format(name=name, value=value))
        shown = f"{name.replace('_', '-')} {value}"
        tab.until(f"document.querySelector('#chart').innerText.includes('{shown}')")
    tab.ask(
        "[...document.querySelectorAll('#strip button')]"
        ".sort((a, b) => parseFloat(a.title) - parseFloat(b.title))[0].click()"
    )
    tab.until("document.querySelector('#chart .cut') !== null")
    time.sleep(1)  # bars grow


if __name__ == "__main__":
    main()
