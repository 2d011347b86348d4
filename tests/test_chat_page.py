"""The chat page in a browser; slow, skipped without Chromium (Debian: apt install chromium)."""

import json
import shutil

import httpx
import pytest
from server_process import serving

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = ('<script>document.title = "taken"</script> <img src="x" onerror="document.title = \'taken\'">\n\n'
           '[click](javascript:document.title="taken") **bold** `<b>code</b>`\n\n'
           '| a | b |\n|---|---|\n| 1 | <i>2</i> |')


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving("examples/belle_tiny/bloom", tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, server):
    context = browser.new_context(locale="zh-CN", permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#model:text-is('bloom')")
    yield page
    assert page.problems == []
    context.close()


def ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page):
    page.wait_for_selector("#send:not([hidden])")
    return page.inner_text(".message.assistant:last-child .body")


def answer_with(page, content):
    """Answer the next question with `content` instead of the server's answer."""
    pieces = [content[i : i + 7] for i in range(0, len(content), 7)]
    lines = [json.dumps({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
             for piece in pieces]
    body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=body, headers={
        "Content-Type": "text/event-stream; charset=utf-8"}))


def test_send_stream_regenerate_reload(page):
    ask(page, "写一首关于春天的诗")
    first = done(page)
    assert first.strip()
    assert "Human:" not in first
    assert page.inner_text("#figures")
    page.reload()
    assert page.inner_text(".message.user .body") == "写一首关于春天的诗"
    assert page.inner_text(".message.assistant .body") == first
    page.click("text=重新生成")
    assert done(page).strip()
    assert page.locator(".message").count() == 2


def test_stop_keeps_the_text_and_frees_the_slot(page, server):
    page.evaluate("""() => { const real = window.fetch; window.fetch = (url, options) => {
        if (options?.body) options.body = JSON.stringify({...JSON.parse(options.body), max_tokens: 450,
            ignore_eos: true, temperature: 2, top_p: 1, top_k: 0, repetition_penalty: 2});
        return real(url, options);
    };
    new MutationObserver((_, observer) => {  // a hand is too slow for 450 tokens of a model as small as this
        if (document.querySelector(".message.assistant .body:not(:empty)")) {
            observer.disconnect(); document.querySelector("#stop").click(); } })
        .observe(document.body, {childList: true, subtree: true, characterData: true}); }""")
    ask(page, "写一首很长的诗")
    assert done(page).endswith("已停止")
    page.wait_for_timeout(300)
    assert httpx.get(f"{server.url}/health").json()["running"] == 0


def test_language_theme_and_a_new_chat(page):
    page.click("#language")
    assert page.inner_text("#send") == "Send"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.inner_text("#send") == "Send"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "你好")
    done(page)
    page.click("#fresh")
    assert page.locator(".message").count() == 0


def test_model_output_is_escaped(page):
    answer_with(page, HOSTILE)
    ask(page, "你好")
    text = done(page)
    assert "<script>" in text
    assert "onerror" in text
    assert page.title() == "bloom"
    body = page.locator(".message.assistant .body")
    assert body.locator("script, img, i, b, [onerror]").count() == 0
    assert body.locator("a").count() == 0
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("td").count() == 2


def test_markdown_of_every_kind(page):
    answer_with(page, "# 标题\n\n一段*斜体*与 https://example.com/a?b=c。\n第二行\n\n- 一\n- 二\n\n3. 三\n4. 四\n\n"
                       "```python\nprint('<b>')\n```\n\n> 引用\n\n---\n")
    ask(page, "你好")
    done(page)
    body = page.locator(".message.assistant .body")
    tags = ("h3", "em", "a", "br", "ul li", "ol li", "pre code", "blockquote", "hr")
    assert [body.locator(tag).count() for tag in tags] == [1, 1, 1, 1, 2, 2, 1, 1, 1]
    assert body.locator("a").get_attribute("href") == "https://example.com/a?b=c"
    assert body.locator("ol").get_attribute("start") == "3"
    assert body.locator("pre code").inner_text().strip() == "print('<b>')"


def test_error_is_shown_and_not_sent_with_the_next_question(page):
    page.click("#open-settings")
    page.fill("#max_tokens", "90000")
    page.click("#settings button")
    ask(page, "你好")
    assert "exceeds the context" in done(page)
    page.problems.clear()  # the browser reports the status 400 too
    page.click("#open-settings")
    page.fill("#max_tokens", "20")
    page.click("#settings button")
    ask(page, "你好")
    assert "exceeds" not in done(page)
    assert page.locator(".message").count() == 2
