"""The chat page in a browser: nothing that was typed or received is lost; slow, skipped without Chromium."""

import json

import httpx
import pytest
from page_browser import FOREIGN, ask, chat_page, done, sent, stream
from server_process import serving

pytestmark = pytest.mark.slow
KEY = "secret"  # with a key, the server also answers hosts that are not loopback
pytest_plugins = ["page_browser"]


def test_a_real_answer_is_streamed_regenerated_and_kept(browser, server):
    with chat_page(browser, server.url, staged=False) as page:
        ask(page, "写一首关于春天的诗")
        done(page)
        first = page.inner_text(".message.assistant .body")
        assert first.strip()
        assert "Human:" not in first
        assert page.inner_text("#figures")
        page.reload()
        assert page.inner_text(".message.user .body") == "写一首关于春天的诗"
        assert page.inner_text(".message.assistant .body") == first
        page.click("[data-action=regenerate]")
        done(page)
        page.click("[data-action=previous]")
        assert page.inner_text(".message.assistant .body") == first


def test_stop_frees_the_slot(browser, server):
    with chat_page(browser, server.url, staged=False) as page:
        page.evaluate("""() => { const real = window.fetch; window.fetch = (url, options) => {
            if (String(url).endsWith("completions")) options.body = JSON.stringify({...JSON.parse(options.body),
                max_tokens: 450, ignore_eos: true, temperature: 2, top_p: 1, top_k: 0, repetition_penalty: 2});
            return real(url, options);
        };
        new MutationObserver((_, observer) => {  // a hand is too slow for 450 tokens of a model as small as this
            if (document.querySelector(".message.assistant .block")) {
                observer.disconnect(); document.querySelector("#stop").click(); } })
            .observe(document.body, {childList: true, subtree: true, characterData: true}); }""")
        ask(page, "写一首很长的诗")
        assert "已停止" in done(page)
        page.wait_for_timeout(300)
        assert httpx.get(f"{server.url}/health").json()["running"] == 0


def test_enter_while_an_answer_is_generated_keeps_the_text(page):
    ask(page, "一")
    stream(page, "第一段", end=False)
    ask(page, "二")
    assert page.input_value("#prompt") == "二"
    assert page.inner_text("#hint")
    stream(page, "，完")
    assert page.input_value("#prompt") == "二"
    assert page.locator(".message").count() == 2


def test_enter_of_an_input_method_does_not_send(page):
    page.fill("#prompt", "ni hao")
    for options in ({"keyCode": 229}, {"isComposing": True}):
        page.dispatch_event("#prompt", "keydown", {"key": "Enter", **options})
    assert page.locator(".message").count() == 0
    assert page.input_value("#prompt") == "ni hao"


@pytest.mark.parametrize(("language", "note", "offline"), [
    ("zh-CN", "连接中断", "无法连接服务器"), ("en-US", "connection to the server broke", "cannot reach the server")])
def test_a_server_that_dies_loses_nothing(browser, server, language, note, offline):
    with chat_page(browser, server.url, locale=language) as page:
        ask(page, "一")
        stream(page, "第一段", end=False)
        page.evaluate("stage.die(); stage.down = true")
        text = done(page)
        assert "第一段" in text
        assert note in text
        page.click("[data-action=regenerate]")  # fails before the first token: the partial answer is still shown
        page.wait_for_selector(f".message.user .note.error:text('{offline}')")
        assert "第一段" in done(page)
        ask(page, "二")
        text = done(page)
        assert "二" in text
        assert offline in text
        page.evaluate("stage.down = false")
        page.click("[data-action=retry]")
        stream(page, "第二段")
        assert sent(page) == [("user", "一"), ("assistant", "第一段"), ("user", "二")]
        assert page.locator(".note.error:text('server'), .note.error:text('服务器')").count() == 2  # those of the first


def test_killed_server_and_its_successor_on_the_same_port(browser, tmp_path):
    with serving("examples/belle_tiny/bloom", tmp_path / "log") as first, \
            chat_page(browser, first.url, staged=False) as page:
        ask(page, "你好")
        done(page)
        first.process.kill()
        first.process.wait()
        ask(page, "再见")
        assert "无法连接服务器" in done(page)
        page.wait_for_selector("#status:text('无法连接服务器')", timeout=15_000)
        page.problems.clear()  # the browser reports refused connections too
        with serving("examples/belle_tiny/bloom", tmp_path / "log2", "--port", first.url.rpartition(":")[2]):
            page.wait_for_selector("#status:text-matches('GB')", timeout=60_000)
            page.click("[data-action=retry]")
            done(page)
            assert page.locator(".message.assistant .body").count() == 2
            page.problems.clear()


def test_reload_during_an_answer_keeps_the_part_that_arrived(page):
    ask(page, "一")
    stream(page, "第一段", "第二段", end=False)
    page.reload()
    text = page.inner_text(".message.assistant")
    assert "第一段第二段" in text
    assert "尚未完成" in text
    page.click("[data-action=regenerate]")
    stream(page, "全文")
    assert sent(page) == [("user", "一")]


def test_stop_and_reload_before_the_first_token_leave_no_empty_turn(page):
    ask(page, "一")
    page.wait_for_selector("#stop:not([hidden])")
    page.click("#stop")
    done(page)
    ask(page, "二")
    page.reload()
    assert page.locator(".message").all_inner_texts()[1].startswith("二")
    assert page.locator("[data-action=retry]").count() == 1
    ask(page, "三")
    stream(page, "答")
    assert sent(page) == [("user", "三")]
    assert page.locator(".message").count() == 4


def test_full_storage_is_survived(page):
    page.evaluate("""() => {
        Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); }; }""")
    ask(page, "一")
    stream(page, "第一段")
    ask(page, "二")
    stream(page, "第二段")
    assert page.locator(".message").count() == 4
    assert "存储空间已满" in page.inner_text("#hint")


def test_copy_on_plain_http(browser, tmp_path):
    with serving("examples/belle_tiny/bloom", tmp_path / "log", "--api-key", KEY) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{FOREIGN}:{server.url.rpartition(':')[2]}/")
        assert page.evaluate("isSecureContext") is False
        copied = page.evaluate("""async () => {
            let copied = null;
            document.addEventListener("copy", () => (copied = getSelection().toString()));
            const { copy } = await import("/static/dom.js");
            return [await copy("两行\\n文字"), copied];
        }""")
        assert copied == [True, "两行\n文字"]
        context.close()


def test_draft_survives_a_reload(page):
    page.fill("#prompt", "没有写完的问题")
    page.reload()
    assert page.input_value("#prompt") == "没有写完的问题"


def test_edited_question_keeps_the_old_one_as_an_alternative(page):
    ask(page, "旧")
    stream(page, "旧答")
    page.click(".message.user [data-action=edit]")
    page.fill(".message.user textarea", "新")
    page.click("#theme")  # draws the messages again
    page.reload()
    page.press(".message.user textarea", "Enter")
    stream(page, "新答")
    assert sent(page) == [("user", "新")]
    assert [text.partition("\n")[0] for text in page.locator(".message").all_inner_texts()] == ["新", "新答"]
    page.click(".message.user [data-action=previous]")
    assert [text.partition("\n")[0] for text in page.locator(".message").all_inner_texts()] == ["旧", "旧答"]


def test_conversations_in_the_list_are_exported_and_imported(browser, server, page, tmp_path):
    ask(page, "第一个对话")
    stream(page, "答一")
    page.click("#fresh")
    ask(page, "第二个对话")
    stream(page, "开头", end=False)
    page.click("#chats .entry:text('第一个对话')")  # the other answer continues
    assert "答一" in page.inner_text("#log")
    stream(page, "结尾")
    page.click("#chats .entry:text('第二个对话')")
    assert "开头结尾" in page.inner_text("#log")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    assert len(json.loads(file.read_text("utf-8"))["conversations"]) == 2
    with chat_page(browser, server.url) as other:
        for _ in range(2):  # the second import adds nothing
            other.set_input_files("#file", file)
            other.wait_for_function("document.querySelectorAll('#chats li').length === 2")
        other.click("#chats .entry:text('第一个对话')")
        assert "答一" in other.inner_text("#log")
        other.on("dialog", lambda dialog: dialog.accept())
        file.write_text('{"conversations": [{}]}', "utf-8")
        other.set_input_files("#file", file)
        other.click("#chats li:first-child button[title=删除]")
        other.wait_for_function("document.querySelectorAll('#chats li').length === 1")
