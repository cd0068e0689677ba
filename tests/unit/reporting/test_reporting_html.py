"""The page needs no network, and no text can become markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from megatron_mone.reporting.demo.report import Scores, write_report
from megatron_mone.reporting.page import plots
from megatron_mone.reporting.page.html import Page
from tests.unit.reporting.conftest import make_evaluation, make_result

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror='x'>\"&"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def tags_of(text: str) -> list[tuple[str, dict]]:
    parser = Tags()
    parser.feed(text)
    return parser.tags


def assert_self_contained(text: str) -> None:
    for tag, attributes in tags_of(text):
        assert tag not in {"script", "link", "iframe", "object", "embed"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in {"src", "href", "srcset", "data"}:
                assert value.startswith("data:image/png;base64,"), value
    assert "url(" not in text
    assert "@import" not in text


def test_every_kind_of_text_is_escaped():
    page = Page(HOSTILE)
    page.heading(HOSTILE)
    page.paragraph(HOSTILE)
    page.bullets([HOSTILE])
    page.table([HOSTILE], [[HOSTILE]])
    page.figure(b"png", HOSTILE)
    page.code(HOSTILE)
    text = page.render()
    assert "<script" not in text
    assert_self_contained(text)
    # title twice, heading, paragraph, item, two cells, alternative text, caption, code
    assert text.count("&lt;script&gt;") == 10


def test_the_report_is_self_contained_even_with_hostile_names(tmp_path, three_runs):
    command = ("python", "--out", HOSTILE)
    runs = [replace(run, command=command) for run in three_runs]
    without = make_result(HOSTILE, command=command)
    scores = Scores({HOSTILE: make_evaluation(1, {HOSTILE: 0.5})}, ((HOSTILE,),))
    text = write_report(tmp_path, 5.0, runs, without, ("python", HOSTILE), scores).read_text()
    assert_self_contained(text)
    assert "logged no common step" in text
    assert not re.search(r"https?://", text.replace("http://evil.example", ""))
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def test_plots_do_not_tell_when_or_where(tmp_path, three_runs):
    plots.save(plots.validation_loss(three_runs, 5.0), tmp_path / "demo")
    svg = (tmp_path / "demo.svg").read_text()
    assert "<dc:date>" not in svg
    assert "matplotlib.org" not in svg
