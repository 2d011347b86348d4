"""How the chat page shows messages and settings; slow, skipped without Chromium."""

import pytest
from page_browser import ask, chat_page, stream

pytestmark = pytest.mark.slow
HOSTILE = ('<script>document.title = "taken"</script> <img src="x" onerror="document.title = \'taken\'">\n\n'
           '[click](javascript:document.title="taken") **bold** `<b>code</b>` ![a](https://example.com/a.png)\n\n'
           '| a | b |\n|---|---|\n| 1 | <i>2</i> |\n\n$\\href{javascript:alert(1)}{x}$\n\n' + "> " * 3000 + "deep")
MARKDOWN = ("# 标题\n\n一段*斜体*与 https://example.com/a?b=c。\n第二行\n\n- 一\n- 二\n\n3. 三\n4. 四\n\n"
            "```python\nprint('<b>')\n```\n\n> 引用\n\n---\n")
FORMULAS = ("行内 $E=mc^2$ 与 \\(a_1\\)，价格 $5 and $10，错误 $\\frac{$。\n\n"
            "$$\\sum_{i=1}^n \\sqrt{x_i}$$\n\n\\[\ny\n\\]\n")
pytest_plugins = ["page_browser"]


def answer(page, content):
    """Stream an answer in pieces of 7 characters, and return its element."""
    ask(page, "你好")
    stream(page, *(content[start : start + 7] for start in range(0, len(content), 7)))
    return page.locator(".message.assistant .body")


def test_model_output_is_escaped(page):
    body = answer(page, HOSTILE)
    text = body.inner_text()
    assert "<script>" in text
    assert "onerror" in text
    assert "deep" in text
    assert page.title() == "bloom"
    assert body.locator("script, img, i, b, [onerror], a[href^=javascript]").count() == 0
    assert body.locator("a").get_attribute("href") == "https://example.com/a.png"
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("td").count() == 2


def test_markdown_of_every_kind(page):
    body = answer(page, MARKDOWN)
    tags = ("h2", "em", "a", "br", "ul li", "ol li", "pre code", "blockquote", "hr")
    assert [body.locator(tag).count() for tag in tags] == [1, 1, 1, 1, 2, 2, 1, 1, 1]
    assert body.locator("a").get_attribute("href") == "https://example.com/a?b=c"
    assert body.locator("ol").get_attribute("start") == "3"
    assert body.locator("pre .hljs-string").inner_text() == "'<b>'"
    body.locator(".code .copy").click()
    page.wait_for_selector(".code .copy:text('已复制')")
    assert page.evaluate("navigator.clipboard.readText()") == "print('<b>')"


def test_formulas(page):
    body = answer(page, FORMULAS)
    assert body.locator(".katex").count() == 4
    assert body.locator(".katex-display").count() == 2
    assert "$5 and $10" in body.inner_text()
    assert "$\\frac{$" in body.inner_text()
    assert page.evaluate("document.fonts.check('16px KaTeX_Main')")


def test_finished_blocks_keep_their_nodes_while_the_answer_grows(page):
    ask(page, "你好")
    stream(page, "第一段\n\n第二", end=False)
    page.evaluate("window.first = document.querySelector('.block')")
    stream(page, "段", end=False)
    page.wait_for_selector(".block p:text-is('第二段')")
    assert page.evaluate("window.first === document.querySelector('.block')")
    assert "词元/秒" in page.inner_text("#figures")
    stream(page)


def test_settings_reach_the_server_and_default_to_the_servers(page):
    answer(page, "一")
    assert set(page.evaluate("stage.asked.at(-1)")) == {"messages", "stream", "stream_options"}
    page.click("#open-settings")
    assert page.get_attribute("#temperature", "placeholder") == "0.35"
    page.select_option("#preset", "greedy")
    assert page.input_value("#temperature") == "0"
    page.fill("#top_k", "-1")  # not allowed: it is not sent
    page.fill("#seed", "5")
    page.fill("#system", "用英文回答")
    page.press("#system", "Tab")
    page.keyboard.press("Escape")
    ask(page, "再见")
    stream(page, "二")
    request = page.evaluate("stage.asked.at(-1)")
    assert request["temperature"] == 0
    assert request["seed"] == 5
    assert "top_k" not in request
    assert request["messages"][0] == {"role": "system", "content": "用英文回答"}


def test_system_prompt_is_offered_only_if_the_prompt_format_has_one(browser, server):
    context = browser.new_context()
    context.route("**/apply-template", lambda route: route.fulfill(status=400, json={"error": {"message": "no"}}))
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#status:text-matches('GB')")
    page.click("#open-settings")
    assert not page.is_visible("#system")
    context.close()


def test_language_and_theme_are_kept(page):
    page.click("#language")
    assert page.inner_text("#send") == "Send"
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.inner_text("#send") == "Send"
    assert page.evaluate("[document.documentElement.dataset.theme, document.documentElement.lang]") == ["dark", "en"]


@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
def test_narrow_screens_scroll_in_one_direction_only(browser, server, language):
    with chat_page(browser, server.url, locale=language, viewport={"width": 320, "height": 640}) as page:
        answer(page, MARKDOWN + FORMULAS + "`" + "很长" * 200 + "`")
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        assert page.evaluate("document.querySelector('#log').scrollWidth <= document.querySelector('#log').clientWidth")
        page.click("#toggle-sidebar")
        assert page.is_visible("#export")
        page.keyboard.press("Escape")
        assert not page.is_visible("#export")
        assert page.evaluate("document.activeElement.id") == "toggle-sidebar"


def test_every_control_has_a_name_and_answers_are_announced(page):
    answer(page, "完整的回答")
    page.click("#open-settings")
    names = page.evaluate("""[...document.querySelectorAll("button, textarea, input:not([hidden]), select")].map(
        (node) => node.ariaLabel || node.innerText || node.labels?.[0]?.innerText || "")""")
    assert all(names)
    assert page.inner_text("#announcer") == "完整的回答"
