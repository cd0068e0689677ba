"""A plan's and a search's page in a real browser: all is shown, nothing sticks out at 1280 px."""

import pytest

from megatron_mone.reporting.plan.report import write_plan_files
from tests.unit.reporting.plan_example import as_plan, as_search, example_plan, example_search
from tests.unit.reporting.test_profile_page_in_browser import BROWSER, browser, open_page

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser on PATH: .ci/browser.sh installs one"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    plan = example_plan(("mone", "moe", "moe-active"), gpus=1024, pp=8, vpp=4, micro_batches=16)
    plan["models"][1]["name"] = "a-baseline-with-a-very-long-name"
    for point in plan["scaling"]:
        point["models"]["a-baseline-with-a-very-long-name"] = point["models"].pop("moe")
    for stage in plan["models"][0]["stages"]:
        stage["layers"] = " | ".join(["mone*6, norm"] * 16)
    plan["models"][0]["layout"]["recompute"] = "+".join(["layernorm", "moe_act", "mla_up_proj"] * 9)
    search = example_search()
    search["refused"][0]["reason"] = "x" * 900
    return {
        name: write_plan_files(document, folder / name)
        for name, document in (("plan", as_plan(plan)), ("search", as_search(search)))
    }


@pytest.fixture(scope="module", params=["plan", "search"])
def tab(request, pages, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        open_page(tab, pages[request.param])
        yield tab


def test_nothing_is_logged_and_nothing_is_fetched(tab):
    faults = [e for e in tab.events
              if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown",
                                 "Network.loadingFailed")]  # fmt: skip
    assert not faults
    asked = [e["params"]["request"]["url"] for e in tab.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert asked
    assert [url[:40] for url in asked if not url.startswith(("file:", "data:image/"))] == []


def test_every_picture_is_shown(tab):
    sizes = tab.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight])"
    )
    assert len(sizes) >= 2
    assert all(complete and natural > 0 and wide > 900 for complete, natural, wide, _ in sizes)
    assert max(height for *_, height in sizes) < 1045  # of a printed sheet


def test_nothing_sticks_out_at_1280_pixels(tab):
    opened = "[...document.querySelectorAll('details')].map(d => { d.open = true; return 1; })"
    tab.evaluate(f"{opened}.length")
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
        "Math.min(...[...document.querySelectorAll('p, td, th, li, figcaption, summary')].map(e => "
        "parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
