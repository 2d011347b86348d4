"""Fixtures for tests of the chat page in a headless Chromium, and answers that a test streams by hand."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from server_process import serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FOREIGN = "chat.example"  # a name that is not loopback: on http, browsers call such a page insecure
# Replaces the answers of the server: `stage.push(text)` streams a piece, `stage.end()` ends the answer, `stage.die()`
# breaks the connection, and `stage.asked` holds the messages of every request.
STAGE = """(() => {
  const real = window.fetch, encoder = new TextEncoder(), stage = window.stage = {asked: [], down: false};
  const send = (value) => stage.controller.enqueue(encoder.encode(`data: ${value}\\n\\n`));
  stage.push = (text) => send(JSON.stringify({choices: [{index: 0, delta: {content: text}, finish_reason: null}]}));
  stage.end = (tokens = 7) => {
    send(JSON.stringify({choices: [], usage: {completion_tokens: tokens}}));
    send("[DONE]");
    stage.controller.close();
  };
  stage.die = () => stage.controller.error(new TypeError("network error"));
  window.fetch = async (address, options) => {
    if (!String(address).endsWith("completions")) return real(address, options);
    stage.asked.push(JSON.parse(options.body));
    if (stage.down) throw new TypeError("Failed to fetch");
    const body = new ReadableStream({start(controller) { stage.controller = controller; }});
    options.signal.addEventListener("abort", () => stage.controller.error(options.signal.reason));
    return new Response(body, {headers: {"Content-Type": "text/event-stream"}});
  };
})()"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of the demo model."""
    with serving("examples/belle_tiny/bloom", tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    """A browser of Playwright; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"])


@pytest.fixture
def page(browser, server):
    """The chat page, with answers that the test streams."""
    with chat_page(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


@contextmanager
def chat_page(browser: Any, url: str, *, staged: bool = True, **options: Any) -> Iterator[Any]:
    """The chat page in a fresh profile; fails if its scripts raise, or if the policy of the page blocks something."""
    context = browser.new_context(**{"locale": "zh-CN", "viewport": {"width": 1000, "height": 700}} | options)
    if staged:
        context.add_init_script(STAGE)
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#status:text-matches('GB')")
    yield page
    assert page.problems == []
    context.close()


def ask(page: Any, text: str) -> None:
    """Type a question and press Enter."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def stream(page: Any, *pieces: str, end: bool = True) -> None:
    """Stream an answer to the question that was asked last."""
    page.wait_for_selector("#stop:not([hidden])")
    for piece in pieces:
        page.evaluate("text => stage.push(text)", piece)
    if end:
        page.evaluate("stage.end()")
        done(page)
    elif pieces:
        page.wait_for_function("text => document.querySelector('#log').lastElementChild.innerText.includes(text)",
                               arg=pieces[-1].strip())


def done(page: Any) -> str:
    """Wait until no answer is generated, and return the text of the last message."""
    page.wait_for_selector("#send:not([hidden])")
    return page.inner_text(".message:last-child")


def sent(page: Any) -> list[tuple[str, str]]:
    """Roles and texts of the last request."""
    return [(message["role"], message["content"]) for message in page.evaluate("stage.asked.at(-1).messages")]
