"""The page of benchmark.diagnose --report: what is in the file, and what headless Chromium makes of it."""

import asyncio
import html
import io
import re
from pathlib import Path

import forked
import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, Browser
from test_alarms import collapsing, healthy
from test_diagnose import NONE, ROOT, made

from benchmark.diagnose import Args, diagnose, main, read_evidence
from benchmark.logs import DIAGNOSED, RETURN, read_each
from benchmark.report import DARK, LIGHT, LIMIT, PANELS, draw, labels_of, page, thin, write_report

PLASTICITY = "plasticity/actor/last_minibatch_loss"


@pytest.fixture(scope="module")
def committed():
    """Diagnoses of the five runs without intervention at 20 epochs, and their rows of the file."""
    runs, _, _ = read_each([NONE])
    runs = [run for run in runs if run.epochs == 20]
    table = pd.read_csv(NONE, dtype={"run": str})
    return [diagnose(run, read_evidence(ROOT / "benchmark" / "results")) for run in runs], table


def test_a_page_is_complete_small_and_asks_no_network(tmp_path):
    """By the command, from the committed curves."""
    path = tmp_path / "report.html"
    done = forked.program("benchmark.diagnose", NONE, "--only", "20 epochs", "--report", path)
    assert done.stdout.splitlines()[-1] == str(path), done.stderr
    text = path.read_text(encoding="utf-8")
    assert 1_000_000 < path.stat().st_size < LIMIT and list(tmp_path.iterdir()) == [path]
    assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "collapsed since step 1,433,600" in text and "PFO last (--pfo-coef 10)" in text
    for panel in PANELS.values():
        assert html.escape(panel.title) in text


def test_the_curves_are_those_of_the_file(committed):
    diagnoses, table = committed
    figures, notes = draw(diagnoses)
    assert list(figures) == list(PANELS)
    assert len(notes) == 1 and "2. seed 27: 1 of 41 values of plasticity/actor" in notes[0]
    for i, (diagnosis, label) in enumerate(zip(diagnoses, labels_of([x.run for x in diagnoses]), strict=True)):
        for name, tag in (("return", RETURN), ("rank", DIAGNOSED), ("plasticity", PLASTICITY)):
            rows = table[(table["run"] == diagnosis.run.name) & (table["tag"] == tag)].set_index("step")["value"]
            lines = [x for x in figures[name].renderers if x.name == label and "values" in x.glyph.tags]
            (data,) = (x.data_source.data for x in lines)
            assert len(data["x"]) >= min(len(rows), 20) and data["x"][-1] == rows.index[-1]
            assert (rows.loc[data["x"]].to_numpy() == data["y"]).all()
            assert lines[0].glyph.line_color == LIGHT[i]
        # Each event has its sign in the panel of its measure.
        signs = [
            x for plot in figures.values() for x in plot.renderers if x.name == label and "words" in x.data_source.data
        ]
        assert sum(len(x.data_source.data["x"]) for x in signs) == len(diagnosis.events)


def test_what_is_infinite_is_named_and_not_drawn(committed):
    run = made(lambda i: healthy(i) | ({"trust_region/excess_ratio": np.inf} if i == 500 else {}))
    figures, notes = draw([diagnose(run)])
    assert any("1 of 1000 values of trust_region/excess_ratio are infinite" in note for note in notes)
    assert all(np.isfinite(x.data_source.data["y"]).all() for plot in figures.values() for x in plot.renderers)


def test_thinning_keeps_the_ends():
    series = pd.Series(np.arange(1000.0), index=np.arange(1000))
    assert thin(series, 7).index.tolist() == [0, 166, 333, 500, 666, 832, 999]
    assert thin(series, 1000).equals(series) and len(thin(series[:3], 7)) == 3


def test_a_name_is_no_markup():
    """Names of runs are those of folders, which may have any letter."""
    diagnosis = diagnose(made(collapsing, name="</script><b onclick=1>", env_id="<i>Hopper"))
    text = page([diagnosis])
    assert "<b onclick" not in text and "&lt;b onclick=1&gt;" in text and "<i>Hopper" not in text


@pytest.mark.parametrize(
    "path, words",
    [
        ("report.pdf", "--report report.pdf: must end in .html"),
        ("none/report.html", "--report none/report.html: must be in a folder that exists"),
    ],
)
def test_a_file_that_can_not_be_is_refused_before_any_work(path, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(Args((NONE,), report=Path(path)))
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_more_runs_than_a_page_holds_are_refused(committed, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.report.LIMIT", 1_600_000)
    (tmp_path / "report.html").write_text("the one of before")
    with pytest.raises(SystemExit) as stopped:
        write_report(committed[0], tmp_path / "report.html")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r": 5 runs would make 1\.[6-9] MB, and a page is to have less than 1\.6; name fewer", said)
    assert (tmp_path / "report.html").read_text() == "the one of before"


# In a browser

browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
READY = "document.documentElement?.dataset.ready === 'yes'"
VALUES = "[...document.querySelectorAll('#values tr')].map(row => [...row.cells].map(cell => cell.textContent))"


async def opened(browser, path, scheme="light"):
    await browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await browser("Emulation.setDeviceMetricsOverride", width=1400, height=1200, deviceScaleFactor=1, mobile=False)
    await browser("Page.navigate", url=path.as_uri())
    await browser.until(READY)
    await browser.until("Bokeh.documents.every(doc => doc.is_idle)")


async def press(browser, key, times=1):
    code = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}[key]
    for _ in range(times):
        for kind in ("keyDown", "keyUp"):
            more = {"text": key} if key == " " and kind == "keyDown" else {}
            await browser("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)


async def colours_in(browser):
    """For each panel the colours (N, 3) of what is on the screen there."""
    boxes = "[...document.querySelectorAll('figure')].map(x => x.getBoundingClientRect())"
    boxes = await browser.run(f"{boxes}.map(x => ({{x: x.x, y: x.y + scrollY, width: x.width, height: x.height}}))")
    found = []
    for box in boxes:
        picture = imageio.imread(io.BytesIO(await browser.screenshot(**box)))[..., :3]
        found.append(picture.reshape(-1, 3).astype(int))
    return found


def near(pixels, colour, count=30):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (abs(pixels - wanted).max(1) < 12).sum() >= count


@browser
@pytest.mark.parametrize("scheme, palette, other", [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_all_panels_are_drawn_in_either_theme_without_a_complaint(scheme, palette, other, committed, tmp_path):
    path = tmp_path / "report.html"
    write_report(committed[0], path)

    async def look():
        async with Browser() as browser:
            await opened(browser, path, scheme)
            paper = await browser.run("getComputedStyle(document.body).backgroundColor")
            panels = await colours_in(browser)
            await browser.run("document.getElementById('theme').click()")
            await browser.until("Bokeh.documents.every(doc => doc.is_idle)")
            return paper, panels, await colours_in(browser), browser.problems

    paper, panels, switched, problems = asyncio.run(look())
    assert not problems
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert len(panels) == len(PANELS)
    for seen, then in zip(panels, switched, strict=True):
        for i in range(5):
            assert near(seen, palette[i]) and near(then, other[i])


@browser
def test_the_values_shown_are_the_files_by_mouse_and_by_keyboard(committed, tmp_path):
    diagnoses, table = committed
    path, run = tmp_path / "report.html", diagnoses[0].run
    write_report(diagnoses[:1], path)

    def logged(tag, step):
        rows = table[(table["run"] == run.name) & (table["tag"] == tag)].set_index("step")["value"]
        return rows[rows.index <= step].iloc[-1]

    async def look():
        async with Browser() as browser:
            await opened(browser, path)
            at_the_end = await browser.run(VALUES)
            # By the keyboard: the first two stops are the run's box and the slider.
            await press(browser, "Tab", 2)
            on = await browser.run("document.activeElement.id")
            await press(browser, "ArrowLeft", 400)
            step, moved = await browser.run("document.getElementById('step').textContent"), await browser.run(VALUES)
            # By the mouse, over the middle of the panel of the rank
            await browser.run("document.querySelectorAll('figure')[4].scrollIntoView({block: 'center'})")
            box = await browser.run("(x => [x.x + x.width / 2, x.y + x.height / 2])"
                                    "(document.querySelectorAll('figure')[4].getBoundingClientRect())")  # fmt: skip
            await browser("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] - 5, y=box[1])
            await browser("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
            texts = """(() => { const texts = [], walk = node => {
                if (node.shadowRoot) walk(node.shadowRoot);
                if (node.classList?.contains('bk-Tooltip')) texts.push((node.shadowRoot ?? node).textContent);
                node.childNodes.forEach(walk); }; walk(document.body); return texts.join(' '); })()"""
            await browser.until(f"{texts}.includes('step')")
            return at_the_end, on, step, moved, await browser.run(texts), browser.problems

    at_the_end, on, step, moved, tip, problems = asyncio.run(look())
    assert not problems and on == "cursor"
    step = int(step.replace(",", ""))
    assert 0.55 * run.last_step < step < 0.65 * run.last_step
    for rows, at in ((at_the_end, run.last_step), (moved, step)):
        shown = dict(zip(rows[0], rows[1], strict=True))
        for name, tag in (("return", RETURN), ("rank", DIAGNOSED), ("plasticity", PLASTICITY)):
            assert float(shown[PANELS[name].title]) == pytest.approx(logged(tag, at), rel=1e-4)
    found = re.search(r"step:?\s*([\d,]+)\D*?([\d.e+-]+)", tip)
    assert float(found[2]) == logged(DIAGNOSED, int(found[1].replace(",", ""))), tip


@browser
def test_a_run_can_be_hidden_by_the_keyboard_and_the_page_printed(committed, tmp_path):
    path = tmp_path / "report.html"
    write_report(committed[0][:2], path)

    async def look():
        async with Browser() as browser:
            await opened(browser, path, "dark")
            await press(browser, "Tab", 2)
            await press(browser, " ")
            await browser.until("Bokeh.documents.every(doc => doc.is_idle)")
            await asyncio.sleep(0.5)
            panels = await colours_in(browser)
            return panels, await browser("Page.printToPDF", printBackground=True), browser.problems

    panels, printed, problems = asyncio.run(look())
    assert not problems and len(printed["data"]) > 100_000
    assert all(near(panel, DARK[0]) and not near(panel, DARK[1]) for panel in panels)
