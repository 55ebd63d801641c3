"""The page of `qwen-dist inspect --html`, in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.inspect.page import page_text
from tests.launch.conftest import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
HOSTILE = "<script>alert(1)</script></script><!-- <img src=x onerror=alert(2)> \u202egnp.exe\u202c \x1b[31m & \u2028"


class Browser:
    """A Chromium that is told what to do over a pipe, by the DevTools protocol: zero-terminated JSON messages."""

    def __init__(self, profile: Path) -> None:
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]  # the browser's end must become 3 and 4
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def take_ends() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"], preexec_fn=take_ends, pass_fds=(3, 4),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for descriptor in (theirs_in, theirs_out, *held):
            os.close(descriptor)
        self._rest, self._number, self.told = b"", 0, []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        return self._call(method, self._session, **params)

    def open(self, url: str) -> None:
        self.told: list[dict[str, Any]] = []
        self.do("Page.navigate", url="about:blank")
        self.do("Page.navigate", url=url)
        assert self.wait("document.body && document.body.dataset.ready === '1'"), self.told

    def value(self, expression: str) -> Any:
        done = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, condition: str) -> bool:
        """Whether the condition comes true within ten seconds."""
        end = time.monotonic() + 10
        while not self.value(f"Boolean({condition})"):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def faults(self) -> list[dict[str, Any]]:
        """Exceptions, messages of the console, and requests for anything but the page itself."""
        names = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [one["params"]["request"]["url"] for one in self.told if one["method"] == "Network.requestWillBeSent"]
        outside = [{"url": url} for url in asked if not url.startswith(("file:", "about:"))]
        return [one for one in self.told if one["method"] in names] + outside

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.told.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._in, 1 << 16)
            assert data, "the browser has gone"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the page is not looked at in a browser")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(project: Path, cli: Callable[..., Any]) -> Path:
    """The page of 40 plain rows, one hostile row and two that are dropped."""
    with (project / "rows.jsonl").open("a", encoding="utf-8") as file:
        for messages in (
            [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"Seen: {HOSTILE}"}],
            [{"role": "user", "content": "Only asked </script> here."}],
            [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "Far too long."}],
        ):
            file.write(json.dumps({"messages": messages}) + "\n")
    write_run(project, data={"train": [{"path": "rows.jsonl"}], "max_tokens": 256})
    result = cli("inspect", "run.yaml", "--html", "out.html")
    assert result.code == 0, result.err
    return project / "out.html"


def test_search_and_filters_change_what_is_seen(page: Path, browser: Browser) -> None:
    browser.open(page.as_uri())
    shown = "[...document.querySelectorAll('#samples article')].filter(one => one.offsetHeight > 0).length"
    assert browser.value(shown) == 43
    assert browser.value("document.getElementById('count').textContent") == "43 of 43 shown"
    browser.value("document.getElementById('q').focus()")
    browser.do("Input.insertText", text="What is 17 +")
    assert browser.wait(f"{shown} === 1")
    assert browser.value("document.getElementById('count').textContent") == "1 of 43 shown"
    assert browser.wait("document.querySelectorAll('.tokens .hit').length > 0")
    found = "document.querySelector('#samples article:not([hidden]) .tokens').textContent"
    assert "What is 17 + 17?" in browser.value(found)

    browser.open(page.as_uri() + "#state=dropped")
    assert browser.value(shown) == 2
    assert browser.wait("document.querySelectorAll('#samples article:not([hidden]) .row').length === 2")
    told = browser.value("[...document.querySelectorAll('.reason')].map(one => one.textContent).join(' ')")
    assert "no assistant turn" in told and "longer than data.max_tokens" in told
    browser.open(page.as_uri() + "#q=nothing+like+this")
    assert browser.value(shown) == 0 and browser.value("!document.getElementById('none').hidden")
    assert browser.faults() == []


def test_a_token_tells_its_id_and_weight(page: Path, browser: Browser) -> None:
    browser.open(page.as_uri() + "#q=What+is+17")
    assert browser.wait("document.querySelectorAll('.tokens .trained').length > 0")
    trained = browser.value("[...document.querySelectorAll('.tokens .trained')].map(one => one.textContent).join('')")
    assert trained == "34.<|im_end|>"
    browser.value("document.querySelector('.tokens .trained').scrollIntoView({block: 'center'})")
    browser.value("new Promise(tell => requestAnimationFrame(() => requestAnimationFrame(tell)))")
    middle = "(box => [box.x + box.width / 2, box.y + box.height / 2])"
    box = browser.value(f"{middle}(document.querySelector('.tokens .trained').getBoundingClientRect())")
    browser.do("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert browser.wait("!document.getElementById('tip').hidden")
    assert re.fullmatch(r"id \d+, weight 1", browser.value("document.getElementById('tip').textContent"))
    assert browser.faults() == []


def test_user_text_stays_text(page: Path, browser: Browser) -> None:
    browser.open(page.as_uri() + "#q=onerror")
    assert browser.wait("document.querySelectorAll('.tokens .trained').length > 0")
    seen = browser.value("document.querySelector('#samples article:not([hidden]) .tokens').textContent")
    assert "<script>alert(1)</script></script><!-- <img src=x onerror=alert(2)>" in seen.replace("↵", "")
    assert "⟨U+202E⟩gnp.exe" in seen and "\u202e" not in seen and "␛[31m" in seen
    assert browser.value("document.querySelectorAll('img, script[src], iframe').length") == 0
    assert browser.faults() == []


def test_narrow_page_does_not_scroll_sideways(page: Path, browser: Browser) -> None:
    browser.do("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    browser.open(page.as_uri() + "#beside=1")
    assert browser.value("document.documentElement.scrollWidth") <= 400
    browser.do("Emulation.clearDeviceMetricsOverride")


def test_a_thousand_samples_are_built_as_they_come_into_view(browser: Browser, tmp_path: Path) -> None:
    """Tokens are built where they come into view, so the page is there before 400,000 of them could be."""
    tokens = [[" word", 3409]] * 400
    sample = {
        "source": 0, "place": "rows.jsonl:1", "mode": "plain", "reason": "", "of_row": "", "num_tokens": 400,
        "num_trained": 200, "tokens": tokens, "weights": [0] * 200 + [1] * 200, "prompt": 200, "served": [],
    }  # fmt: skip
    source = {"name": "rows.jsonl", "kind": "messages", "lengths": None, "facts": []}
    data = {
        "name": "big", "num_samples": 1000, "num_dropped": 0, "overview": [["source", "rows"]], "mixture": [],
        "packing": [], "sources": [source], "samples": [sample] * 1000,
    }  # fmt: skip
    path = tmp_path / "big.html"
    path.write_text(page_text(data), encoding="utf-8")
    browser.open(path.as_uri())
    deadline = time.monotonic() + 30
    while not (built := browser.value("document.querySelectorAll('.tokens .t').length")):
        assert time.monotonic() < deadline, "no token was built"
        time.sleep(0.1)
    assert built < 40_000  # 400,000 in all
    assert browser.value("document.querySelectorAll('#samples article').length") == 1000


def test_nothing_outside_is_named(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|src=(?!x )", text)
    assert text.count("</script>") == 2 and text.count("<script") == 2
    assert "\u202e" not in text and "\x1b" not in text
