"""The demo in Chromium: a sketch and an example are answered, and the budget moves the error."""

import os
import subprocess
from pathlib import Path

import pytest
from browser import browsed
from demo_models import write_glyphs, write_texts
from demo_server import interpreter, served

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder, texts = write_glyphs(tmp_path_factory.mktemp("glyphs")), write_texts(tmp_path_factory.mktemp("texts"))
    with served("--folder", str(folder), "--text_folder", str(texts)) as found:
        yield found


def error_of(page):
    return page.locator("#error:visible").inner_text()


def set_budget(page, number):
    field = page.locator("#budget:visible input[type=number]")
    field.fill(str(number))
    field.press("Enter")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_an_example_is_answered_and_the_budget_moves_the_error(address, width):
    with browsed(address, viewport={"width": width, "height": 900}) as page:
        page.locator("#examples button img").first.click()
        page.get_by_role("heading", name="Student").wait_for()
        assert page.get_by_role("heading", name="Teacher").is_visible()
        before, lit = error_of(page), page.locator("svg[aria-label='Sampled classes'] rect").count()
        set_budget(page, 8)
        page.wait_for_function("before => document.querySelector('#error').innerText != before", arg=before)
        assert float(error_of(page).rstrip("%")) > float(before.rstrip("%"))
        assert page.locator("svg[aria-label='Sampled classes'] rect").count() == 8 + 1 < lit
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_drawing_is_answered(address):
    with browsed(address, viewport={"width": 1200, "height": 900}) as page:
        button = page.get_by_role("button", name="Ask teacher and student").first
        button.click()
        page.get_by_text("the sketch is empty").wait_for()
        page.get_by_role("button", name="Brush").click()
        box = page.locator("canvas:visible").first.bounding_box()
        across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(across - 30, down - 40)
        page.mouse.down()
        page.mouse.move(across - 30, down + 40, steps=8)
        page.mouse.move(across + 30, down + 40, steps=8)
        page.mouse.up()
        button.click()
        page.get_by_role("heading", name="Student").wait_for()


@pytest.mark.slow
def test_a_text_is_answered(address):
    with browsed(address, viewport={"width": 390, "height": 900}) as page:
        page.get_by_role("tab", name="Type a text").click()
        page.get_by_role("button", name="Ask teacher and student").and_(page.locator(":visible")).click()
        page.get_by_role("heading", name="Student").and_(page.locator(":visible")).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_without_a_student_the_demo_says_how_to_make_one(tmp_path):
    command = [interpreter(), str(ROOT / "demo" / "app.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode != 0 and "Run `make demo` first" in done.stderr and "Traceback" not in done.stderr


def test_the_space_is_described():
    text = (ROOT / "demo" / "README.md").read_text()
    header = dict(line.split(": ", 1) for line in text.split("---")[1].strip().splitlines())
    assert header["sdk"] == "gradio" and (ROOT / "demo" / header["app_file"]).is_file()
    assert header["license"] == "apache-2.0" and header["sdk_version"].count(".") == 2
    assert {"hf_dis", "torch", "transformers"} <= set((ROOT / "demo" / "requirements.txt").read_text().split())
