"""The page in a real browser, with a real server behind it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.cli.demo import python_documentation
from lminf_edge.server import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOT = os.environ.get("LMINF_SCREENSHOT")  # the folder for the pictures of the docs
SMOL = Path(__file__).parents[2] / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

N_LOCAL = 128

CONVERSATIONS = {  # in the picture
    "The keeper of the light": ["The keeper of the lighthouse climbed the stairs."],
    "A letter from Lisbon": ["A letter came from Lisbon, and she read it aloud.", "Who had written it?"],
    "A voyage without an end": [
        python_documentation()[:8000],
        "What did the captain see?",
        "And what did the sailors say to him in the evening?",
    ],
}


@pytest.fixture(scope="module")
def server(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, Settings(model_name="nano"), lminf=LMInfConfig(n_global=4, n_local=N_LOCAL)) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "there is no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Page]:
    """A fresh browser profile with short answers; nothing may go wrong in its console, or be asked of anyone else."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    made.on("request", lambda request: problems.append(request.url) if not request.url.startswith(server.url) else None)
    made.goto(server.url)
    choose(made, max_tokens=24, temperature=0)
    yield made
    context.close()
    assert problems == []


def choose(page: Page, **settings: float) -> None:
    """Settings of the page, as it keeps them itself."""
    page.evaluate("settings => localStorage.setItem('lminf-edge.settings', JSON.stringify(settings))", settings)
    page.reload()


def say(page: Page, text: str, wait: bool = True) -> None:
    n_answers = page.locator("[data-testid=message][data-role=assistant]").count()
    page.get_by_test_id("message-text").fill(text)
    page.get_by_test_id("send").click()
    if wait:
        answers = page.locator("[data-testid=message][data-role=assistant]:not([data-writing])")
        expect(answers).to_have_count(n_answers + 1, timeout=60_000)


def begin(page: Page) -> None:
    """A new conversation; until it is shown, the messages of the one before are."""
    page.get_by_test_id("new").click()
    expect(page.get_by_test_id("message")).to_have_count(0)


def rename(page: Page, title: str) -> None:
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Title").fill(title)
    page.get_by_role("dialog").get_by_role("button", name="Rename").click()
    expect(page.get_by_test_id("title")).to_have_text(title)


def answers(page: Page) -> list[str]:
    return page.locator("[data-testid=message][data-role=assistant]").all_inner_texts()


def position(page: Page) -> int:
    return int(re.sub(r"\D", "", page.get_by_test_id("position").inner_text()))


def test_a_conversation_many_times_longer_than_the_window(page: Page, server: Served) -> None:
    kv_memory = None
    for i in range(10):
        say(page, f"{i}. " + "The sea was calm and the lamp was lit, and nobody on board had slept. " * 6)
        memory = page.get_by_test_id("kv-memory").inner_text()
        assert kv_memory in (None, memory)
        kv_memory = memory
    assert position(page) > 8 * N_LOCAL
    assert re.search(r"\d", page.get_by_test_id("speed").inner_text())
    assert str(N_LOCAL) in page.get_by_test_id("window").inner_text()
    assert len(answers(page)) == 10


def test_a_conversation_has_a_name_of_its_own(page: Page) -> None:
    """A random one, which an edit keeps and another conversation does not have."""
    names: list[str] = []
    page.on("request", lambda each: names.append(each.post_data_json["prompt_cache_key"]) if each.post_data else None)
    say(page, "The ferry left at six.")
    say(page, "And then?")
    page.get_by_test_id("regenerate").last.click()
    expect(page.locator("[data-testid=message][data-role=assistant]:not([data-writing])")).to_have_count(2)
    begin(page)
    say(page, "The ferry left at six.")
    assert len(names) == 4
    assert names[0] == names[1] == names[2] != names[3]
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)


def test_skipped_tokens_are_shown(browser: Browser, nano_path: str) -> None:
    """Of a history that the server does not know; there are none where it knows it."""
    window = LMInfConfig(n_global=4, n_local=64, prefill="tail")
    with serve(nano_path, Settings(model_name="nano"), lminf=window) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        choose(page, max_tokens=4)
        say(page, "The ferry left at six.")
        expect(page.get_by_test_id("skipped")).to_be_hidden()
        say(page, "The sea was calm and the lamp was lit. " * 100)
        expect(page.get_by_test_id("skipped")).to_be_visible()
        assert int(page.get_by_test_id("skipped").inner_text().replace(",", "")) > 500
        say(page, "And then?")
        expect(page.get_by_test_id("skipped")).to_be_hidden()
        context.close()


TOOLS = """[{"type": "function", "function": {"name": "get_tide", "parameters": {
  "type": "object", "properties": {"port": {"enum": ["Lisbon", "Bergen"]}}, "required": ["port"]}}}]"""


def make_it_call(route: Route) -> None:
    """Makes the model call a tool when the user has written."""
    body = route.request.post_data_json
    if body["messages"][-1]["role"] == "user" and body.get("tools"):
        body = {**body, "tool_choice": "required"}
    route.continue_(post_data=json.dumps(body))


def test_a_file_is_read(page: Page, tmp_path: Path) -> None:
    """All of it: what is chosen or dropped, and nothing that is no text. It stays with the message."""
    novel, picture = tmp_path / "novel.txt", tmp_path / "picture.png"
    novel.write_text("The sea was calm and the lamp was lit. " * 100)
    picture.write_bytes(b"\x89PNG\0\xff")
    page.get_by_test_id("choose-files").set_input_files([novel, picture])
    expect(page.get_by_test_id("file")).to_contain_text("novel.txt · 3,900 characters")
    expect(page.get_by_test_id("files-problem")).to_have_text("picture.png cannot be read: it is no text in UTF-8.")
    drop = """text => {
      const data = new DataTransfer();
      data.items.add(new File([text], "letter.md"));
      for (const type of ["dragover", "drop"])
        document.getElementById("main").dispatchEvent(new DragEvent(type, {dataTransfer: data, bubbles: true}));
    }"""
    page.evaluate(drop, "A letter came from Lisbon.")
    expect(page.get_by_test_id("file")).to_have_count(2)
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda each: bodies.append(each.post_data_json) if each.post_data else None)
    say(page, "What happened?")
    [body] = bodies
    assert body["messages"][0]["content"].startswith("novel.txt:\n\nThe sea was calm")
    assert body["messages"][0]["content"].endswith("letter.md:\n\nA letter came from Lisbon.\n\nWhat happened?")
    expect(page.get_by_test_id("file")).to_have_count(0)
    expect(page.get_by_test_id("skipped")).to_be_hidden()
    assert position(page) > 3900 // 8
    page.reload()
    sent = page.get_by_test_id("file-sent")
    expect(sent).to_have_count(2)
    sent.last.locator("summary").click()
    expect(sent.last).to_contain_text("A letter came from Lisbon.")


def test_tool_calls_and_their_results(page: Page) -> None:
    """Folded, and answered by the user; the model is made to call."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda each: bodies.append(each.post_data_json) if each.post_data else None)
    page.route("**/v1/chat/completions", make_it_call)
    page.locator("#tools-prompt summary").click()
    page.get_by_test_id("tools").fill("get_tide")
    page.get_by_test_id("message-text").click()
    expect(page.locator("#tools-problem")).to_contain_text("The tools are no JSON")
    page.get_by_test_id("tools").fill(TOOLS)
    say(page, "When is high water?")
    call = page.get_by_test_id("call")
    expect(call.locator("summary")).to_have_text("Called get_tide")
    call.locator("summary").click()
    assert json.loads(call.locator("pre").inner_text())["port"] in ("Lisbon", "Bergen")
    page.get_by_test_id("result").fill('{"high": "14:20"}')
    page.get_by_test_id("send-results").click()
    answered = page.locator("[data-testid=message][data-role=assistant]:not([data-writing])")
    expect(answered).to_have_count(2, timeout=60_000)
    expect(page.get_by_test_id("tool-result")).to_contain_text("Result of get_tide")
    called, result = bodies[1]["messages"][-2:]
    assert called["tool_calls"][0]["id"] == result["tool_call_id"]
    assert (result["role"], result["content"]) == ("tool", '{"high": "14:20"}')
    assert bodies[1]["tools"] == json.loads(TOOLS)


def test_thoughts_are_folded(page: Page) -> None:
    events = [{"reasoning_content": "The tide "}, {"reasoning_content": "turns."}, {"content": "At two."}]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in events]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    answer = {"content_type": "text/event-stream", "body": stream}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
    say(page, "When is high water?")
    thoughts = page.get_by_test_id("reasoning")
    expect(thoughts.locator("summary")).to_have_text("Thoughts")
    expect(thoughts.locator("p")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator("p")).to_have_text("The tide turns.")
    page.reload()
    expect(page.get_by_test_id("reasoning").locator("p")).to_have_text("The tide turns.")
    expect(page.locator("[data-testid=message][data-role=assistant] .body")).to_have_text("At two.")


def test_what_can_be_recalled_is_shown(browser: Browser, nano_path: str) -> None:
    window = LMInfConfig(n_global=4, n_local=64, n_recall=8)
    with serve(nano_path, Settings(model_name="nano"), lminf=window) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        choose(page, max_tokens=4)
        say(page, "The sea was calm and the lamp was lit. " * 50)
        assert int(page.get_by_test_id("archived").inner_text().replace(",", "")) > 300
        expect(page.get_by_test_id("reading")).to_be_hidden()
        context.close()


@pytest.fixture
def slow(browser: Browser, nano_path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """A page of a server that takes its time, above all to read in the background."""
    window = LMInfConfig(n_global=4, n_local=64, n_recall=8, prefill="tail")
    with serve(nano_path, Settings(model_name="nano"), lminf=window) as served:
        scheduler = served.engine.scheduler
        process = scheduler._process

        def process_slowly(parts: Any) -> None:
            time.sleep(0.05 if scheduler._reading is None else 0.2)
            process(parts)

        monkeypatch.setattr(scheduler, "_process", process_slowly)
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        page.goto(served.url)
        choose(page, max_tokens=2)
        yield page
        context.close()


LONG = "The sea was calm and the lamp was lit. " * 200


def is_reading(page: Page) -> None:
    """How much has been read grows."""
    before = percent(page)
    expect(page.get_by_test_id("reading")).not_to_have_text(f"{before} %")
    assert percent(page) > before


def percent(page: Page) -> int:
    expect(page.get_by_test_id("reading")).to_have_text(re.compile(r"^\d+ %$"))
    return int(page.get_by_test_id("reading").inner_text().removesuffix(" %"))


def n_asked(page: Page, seconds: float = 1.5) -> int:
    """How often the page asks how far the server is."""
    asked: list[str] = []
    listen = lambda each: asked.append(each.url) if each.url.endswith("/props") else None  # noqa: E731
    page.on("request", listen)
    page.wait_for_timeout(1000 * seconds)
    page.remove_listener("request", listen)
    return len(asked)


def test_what_is_read_in_the_background_is_shown(slow: Page) -> None:
    """After an answer, when the page or the conversation is opened again, until all has been read."""
    say(slow, LONG)
    is_reading(slow)
    recallable = int(slow.get_by_test_id("archived").inner_text().replace(",", ""))
    assert recallable < 200
    slow.reload()
    is_reading(slow)
    begin(slow)
    expect(slow.get_by_test_id("reading")).to_be_hidden()
    assert n_asked(slow) == 0
    slow.go_back()
    is_reading(slow)
    assert 1 <= n_asked(slow) <= 2
    expect(slow.get_by_test_id("reading")).to_be_hidden(timeout=30_000)
    assert int(slow.get_by_test_id("archived").inner_text().replace(",", "")) == position(slow) > 1500
    assert n_asked(slow) == 0
    say(slow, "And then?")
    expect(slow.get_by_test_id("skipped")).to_be_hidden()
    assert int(slow.get_by_test_id("archived").inner_text().replace(",", "")) > 1500


def test_reading_is_shown_before_the_first_answer(slow: Page) -> None:
    say(slow, LONG, wait=False)
    expect(slow.get_by_test_id("position")).to_have_text(re.compile(r"^≈ \d,\d{3}$"))  # most of it was skipped
    slow.get_by_test_id("stop").click()
    expect(slow.get_by_test_id("notice")).to_contain_text("This message has no answer yet.")
    is_reading(slow)
    slow.reload()
    is_reading(slow)
    assert position(slow) > 1000
    slow.get_by_test_id("retry").click()
    expect(slow.get_by_test_id("reading")).to_be_hidden()


def test_a_hidden_page_does_not_ask(slow: Page) -> None:
    say(slow, LONG)
    is_reading(slow)
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    slow.evaluate(hide, True)
    slow.wait_for_timeout(1000)
    assert n_asked(slow) == 0
    slow.evaluate(hide, False)
    is_reading(slow)


@pytest.mark.skipif(not SMOL.exists(), reason="make real-models downloads it")
def test_the_pictures_in_the_docs(browser: Browser, tmp_path: Path) -> None:
    """With a real model: conversations, and a book with a tool. LMINF_SCREENSHOT=FOLDER keeps them."""
    folder = Path(SCREENSHOT or tmp_path)
    window = LMInfConfig(n_global=10, n_local=502, n_recall=32)
    with serve(str(SMOL), Settings(model_name="SmolLM2-135M"), lminf=window) as served:
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        page.goto(served.url)
        choose(page, max_tokens=60, temperature=0)
        for title, messages in CONVERSATIONS.items():
            begin(page)
            for message in messages:
                say(page, message)
            rename(page, title)
        page.screenshot(path=folder / "server-page.png")
        begin(page)
        page.route("**/v1/chat/completions", make_it_call)
        page.locator("#tools-prompt summary").click()
        page.get_by_test_id("tools").fill(TOOLS)
        (tmp_path / "manual.txt").write_text(python_documentation()[:6000])
        page.get_by_test_id("choose-files").set_input_files([tmp_path / "manual.txt"])
        say(page, "When is high water in Lisbon?")
        page.get_by_test_id("call").locator("summary").click()
        page.get_by_test_id("send-results").scroll_into_view_if_needed()
        page.screenshot(path=folder / "server-page-tools.png")
        assert position(page) > 2 * 502
        context.close()
    assert all((folder / f"{name}.png").stat().st_size > 20_000 for name in ("server-page", "server-page-tools"))


def test_stop_and_go_on(page: Page, server: Served) -> None:
    choose(page, max_tokens=100000)
    say(page, "Tell me a very long story.", wait=False)
    writing = page.locator("[data-testid=message][data-writing]")
    expect(writing).to_have_count(1, timeout=30_000)
    expect(writing).to_have_text(re.compile(r"[\s\S]{150}"), timeout=30_000)
    page.keyboard.press("Escape")
    expect(writing).to_have_count(0)
    for _ in range(200):
        if not server.engine.n_busy:
            break
        page.wait_for_timeout(20)
    assert server.engine.n_busy == 0
    [kept] = answers(page)
    choose(page, max_tokens=10)
    expect(page.locator("[data-testid=message][data-role=assistant]")).to_have_count(1)
    assert kept[:80] in answers(page)[0]
    say(page, "And then?")
    assert len(answers(page)) == 2


def test_regenerate_and_edit(page: Page) -> None:
    say(page, "The ferry left at six.")
    say(page, "Anna counted the lamps.")
    before = answers(page)
    page.get_by_test_id("regenerate").last.click()
    expect(page.locator("[data-testid=message][data-role=assistant]:not([data-writing])")).to_have_count(
        2, timeout=60_000
    )
    assert answers(page) == before  # at temperature 0
    first = page.locator("[data-testid=message][data-role=user]").first
    first.hover()
    first.get_by_test_id("edit").click()
    page.get_by_test_id("edit-text").fill("The train left at seven.")
    page.get_by_test_id("edit-save").click()
    expect(page.locator("[data-testid=message][data-role=assistant]:not([data-writing])")).to_have_count(
        1, timeout=60_000
    )
    assert page.locator("[data-testid=message][data-role=user]").count() == 1
    assert "The train left at seven." in page.get_by_test_id("messages").inner_text()


def test_reload_and_continue(page: Page, server: Served) -> None:
    say(page, "The ferry left at six. " * 20)
    shown, url = answers(page), page.url
    page.reload()
    expect(page.locator("[data-testid=message]")).to_have_count(2)
    assert (answers(page), page.url) == (shown, url)
    cached = server.engine.counters.cached_tokens
    say(page, "And then?")
    assert server.engine.counters.cached_tokens - cached > 100


def test_rename_delete_and_the_list(page: Page) -> None:
    say(page, "The first one")
    begin(page)
    say(page, "The second one")
    listed = page.get_by_test_id("conversations")
    expect(listed.get_by_role("listitem")).to_have_count(2)
    rename(page, "Lighthouses")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(listed.get_by_role("listitem")).to_have_count(1)
    expect(listed).not_to_contain_text("Lighthouses")


def test_what_is_said_is_never_markup(page: Page) -> None:
    say(page, "<img src=x onerror=alert(1)> <script>alert(2)</script> [x](javascript:alert(3)) **bold**")
    message = page.locator("[data-testid=message][data-role=user]").first
    assert "<img src=x onerror=alert(1)>" in message.inner_text()
    assert page.locator("[data-testid=messages] img, [data-testid=messages] script").count() == 0
    assert page.locator('[data-testid=messages] a[href^="javascript"]').count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Browser, server: Served, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.url)
    choose(page, max_tokens=8)
    say(page, "The ferry left at six, an hour before the sun came over the hills.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_test_id("new")).to_be_visible()
    context.close()


def test_accessibility(page: Page) -> None:
    axe = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
    say(page, "The ferry left at six.")
    page.evaluate(axe.read_text(encoding="utf-8"))  # the page's policy lets no script in, the debugger does
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        violations = page.evaluate("axe.run().then(result => result.violations)")
        assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == [], json.dumps(violations)[:2000]


def test_a_key_is_asked_for(browser: Browser, nano_path: str) -> None:
    with serve(
        nano_path, Settings(model_name="nano", api_keys=("secret",)), lminf=LMInfConfig(n_global=4, n_local=64)
    ) as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        dialog.get_by_role("textbox").or_(dialog.locator("input[type=password]")).first.fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("model")).to_have_text(re.compile("nano"))
        context.close()
