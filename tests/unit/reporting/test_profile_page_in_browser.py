"""report.html in a real browser: nothing fails to load, nothing sticks out, it can be printed.

The page holds no scripts and forbids them, so the browser is asked from outside, by the DevTools
protocol over a pipe (JSON messages that end in NUL, on the browser's descriptors 3 and 4).
"""

import base64
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest

from megatron_mone.reporting.profile.report import write_report
from tests.unit.reporting.profile_example import as_profile, example_profile

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 60  # seconds for one answer, on a busy machine

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser on PATH ({', '.join(NAMES)}): .ci/browser.sh installs one"
)


class DevTools:
    """One tab of a headless browser."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._buffer, self._last, self._session = b"", 0, None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **parameters) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
            "value"
        ]

    def _read(self) -> dict:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], left)
            chunk = os.read(self._answers, 1 << 16) if ready else b""
            assert chunk, "the browser ended or does not answer"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(folder):
    """A DevTools tab, 1280 x 900; its profile lies under `folder`."""
    for_browser, requests = os.pipe()
    answers, from_browser = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--remote-debugging-pipe", "--window-size=1280,900",
             f"--user-data-dir={folder}"]  # fmt: skip
    # The descriptors must be 3 and 4, where Python itself may have something open.
    shell = f'exec "$0" "$@" 3<&{for_browser} 4>&{from_browser}'
    process = subprocess.Popen(
        ["bash", "-c", shell, BROWSER, *flags], pass_fds=(for_browser, from_browser),
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(for_browser)
    os.close(from_browser)
    try:
        yield DevTools(requests, answers)
    finally:
        os.close(requests)
        os.close(answers)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def open_page(tab: DevTools, path) -> None:
    for domain in ("Page", "Runtime", "Log", "Network"):
        tab.call(f"{domain}.enable")
    tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1,
             mobile=False)  # fmt: skip
    tab.call("Page.navigate", url=path.as_uri())
    tab.wait_for("Page.loadEventFired")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    names = ("mone", "moe")
    profile = example_profile(8, names, missing=(5,), slow_rank=2, recompute=True)
    # what people call their machines, and what a file from elsewhere may hold
    profile["runs"][0]["stragglers"][0]["host"] = "node-" + "x" * 400
    profile["runs"][1]["name"] = "a-baseline-with-a-very-long-name"
    profile["config"]["argv"].append("--path=" + "y" * 400)
    return write_report(as_profile(profile), folder, [as_profile(example_profile(16, names))])


@pytest.fixture(scope="module")
def tab(report, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        open_page(tab, report)
        yield tab


def test_nothing_is_logged_and_nothing_but_the_page_is_asked_for(tab, report):
    faults = [e for e in tab.events
              if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown",
                                 "Runtime.consoleAPICalled", "Network.loadingFailed")]  # fmt: skip
    assert not faults
    asked = [e["params"]["request"]["url"] for e in tab.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert report.as_uri() in asked
    assert [url[:40] for url in asked if not url.startswith(("file:", "data:image/png"))] == []


def test_every_picture_is_shown(tab, report):
    sizes = tab.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    drawn = [path.stem for path in (report.parent / "plots").glob("*.png")]
    assert len(sizes) == len(drawn)
    assert {"phases", "memory_timeline", "ranks-0", "scaling", "roofline", "skew"} <= {*drawn}
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in sizes)


def test_nothing_sticks_out_at_1280_pixels(tab):
    assert tab.evaluate("innerWidth") == 1280
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    column = tab.evaluate(
        "document.body.getBoundingClientRect().right - "
        "parseFloat(getComputedStyle(document.body).paddingRight)"
    )
    widest = tab.evaluate(
        "Math.max(...[...document.querySelectorAll('body *')].map(e => "
        "e.getBoundingClientRect().right))"
    )
    assert widest <= column + 0.5


def test_text_is_not_smaller_than_12_pixels(tab):
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, th, li, figcaption, pre')].map(e => "
        "parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12


def test_the_page_prints_with_every_figure_on_one_sheet(tab):
    sheet = {"paperWidth": 8.27, "paperHeight": 11.69, "marginTop": 0.4, "marginBottom": 0.4}
    pdf = base64.b64decode(tab.call("Page.printToPDF", **sheet)["data"])
    assert pdf.startswith(b"%PDF")
    sheets = len(re.findall(rb"/Type\s*/Page\b", pdf))
    figures = tab.evaluate("document.querySelectorAll('figure').length")
    assert 2 <= sheets <= 2 * figures
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.evaluate(
            "[...document.querySelectorAll('figure')].every(f => "
            "getComputedStyle(f).breakInside === 'avoid')"
        )
        printable = 96 * (sheet["paperHeight"] - 0.8)
        # 8.27 inches of paper less the default margins of 0.4 on either side
        tab.call("Emulation.setDeviceMetricsOverride", width=int(96 * 7.47), height=900,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        tallest = tab.evaluate(
            "Math.max(...[...document.querySelectorAll('figure')].map(f => f.clientHeight))"
        )
        assert tallest < printable
    finally:
        tab.call("Emulation.setEmulatedMedia", media="screen")
        tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=900,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
