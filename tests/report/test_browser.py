"""The page in a headless Chromium: no errors, nothing loaded, the slider, narrow screens, light and dark."""

import pytest
from browser import opened
from runs import logs, proposal, write_run

from hf_dis.report.command import make_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page of two runs with long names and values."""
    folder = tmp_path_factory.mktemp("pages")
    wide = [*logs(), {"eval_" + "long_name_" * 12: "value_" * 40, "step": 4}]
    runs = [write_run(folder / f"a_run_with_a_long_name_{'x' * 60}_{name}", logs=wide) for name in "ab"]
    return make_report(runs, folder / "page.html")


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    shots = [proposal(step) for step in (1, 50, 99)]
    return make_report([write_run(folder / "a", proposals=shots)])


@pytest.mark.parametrize("width", [390, 1200])
def test_no_errors_and_no_horizontal_scroll(page_file, width):
    with opened(page_file, viewport={"width": width, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator("details").first.click()  # the settings
        assert page.evaluate("document.documentElement.scrollWidth") == width
        curves = page.locator("#curves svg")
        assert curves.count() >= 6
        for box in (curves.nth(number).bounding_box() for number in range(curves.count())):
            assert box["width"] > 250 and box["height"] > 120


def test_the_slider_shows_one_snapshot_at_a_time(single_file):
    with opened(single_file) as page:
        slider, step = page.locator(".proposal input"), page.locator(".proposal output")
        visible = """() => [0, 1, 2].filter(i => ["", "-fit"].every(end =>
            getComputedStyle(document.getElementById(`proposal0-${i}${end}`)).display != "none"))"""
        assert step.text_content() == "99" and page.evaluate(visible) == [2]
        slider.focus()
        page.keyboard.press("ArrowLeft")
        assert step.text_content() == "50" and page.evaluate(visible) == [1]
        page.keyboard.press("Home")
        assert step.text_content() == "1" and page.evaluate(visible) == [0]


def test_text_and_curves_follow_light_and_dark(single_file):
    colours = {}
    for scheme in ("light", "dark"):
        with opened(single_file, color_scheme=scheme) as page:
            colours[scheme] = page.evaluate(
                """() => {
                    const svg = document.querySelector("#curves svg");
                    const line = svg.querySelector("path[style*='--series-0']");
                    return [getComputedStyle(document.body).backgroundColor,
                        getComputedStyle(svg.querySelector("text")).fill, getComputedStyle(line).stroke];
                }"""
            )
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True)), colours


def test_the_snapshots_are_hidden_without_scripts(single_file):
    with opened(single_file, java_script_enabled=False) as page:
        assert [page.locator(f"#proposal0-{number}").is_visible() for number in range(3)] == [False, False, True]
