"""The page, the figures and the tables on the terminal, of comparisons made by hand."""

import base64
import html.parser
import io
import json
import math
import os
import shutil
import subprocess

import PIL.Image
import pytest

from tests.finished import DENSE, finished
from tsp.compare.figures import draw
from tsp.compare.groups import compare
from tsp.compare.outputs import as_document, log_comparison
from tsp.compare.page import write_report
from tsp.compare.plots import Point, pareto
from tsp.compare.sheets import cost_sheet
from tsp.errors import ConfigError
from tsp.report_compare import print_comparison

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br"}


def png(width=8):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, 4)).save(buffer, format="png")
    return buffer.getvalue()


def jobs(ratios=((2, 5), (1, 2, 3, 4)), **changes):
    """Two selections, two transfers, two seeds, two ratios, and the floor."""
    slices = {"wiki": {"code": {"ppl": {"dense": 10.0, "bare_drop": 40.0, "pruned": 18.0}}}}
    made = [
        finished(
            method,
            transfer,
            seed=seed,
            dropped=dropped,
            ppl=ppl + len(dropped) + 0.2 * seed,
            slices=slices,
            tasks={"piqa": {"pruned": {"acc": 0.6}}},
            trajectories=png() if method == "tsp" else None,
            **changes,
        )
        for method, transfer, ppl in (
            ("tsp", "stage2", 11.0),
            ("tsp", "finetune", 11.5),
            ("sleb", "finetune", 12.0),
            ("sleb", "none", 15.0),
        )
        for dropped in ratios
        for seed in (0, 1)
    ]
    return [*made, finished("dense", "finetune", ppl=9.8, dropped=(), **changes)]


class Page(html.parser.HTMLParser):
    """What a page holds; fails where tags are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(comparison, path, **options):
    write_report(comparison, path, **options)
    return Page(path.read_text())


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    comparison = compare(jobs())
    page = page_of(comparison, tmp_path / "page.html", command="tsp compare by-hand")
    assert "script" not in page.tags
    assert "link" not in page.tags
    pictures = [address for address in page.addresses if address.startswith("data:image/png;base64,")]
    assert set(page.addresses) - set(pictures) == {"http://127.0.0.1:5000/#/experiments/1/runs/1"}, "runs, to click on"
    for picture in pictures:
        with PIL.Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            image.load()
    text = "".join(page.text)
    for sentence in comparison.verdict:
        assert sentence.text in text
    for words in (
        "Perplexity against the number of layers dropped",
        "Quality against prompt speed",
        "Which layers each method dropped",
        "Loss by slice of the text",
        "Gates of tsp + stage2, 2 layers dropped",
        "Cost",
        "floor: the dense model",
        "fingerprint",
        "c" * 16,
        "tsp prune",
        "tsp compare by-hand",
        "tsp-stage2-1-0",
        "piqa",
    ):
        assert words in text, words
    assert len(pictures) == 6


def test_what_users_wrote_is_text_and_no_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    page = page_of(compare(jobs(model=evil)), tmp_path / "page.html")
    assert "script" not in page.tags
    assert evil in "".join(page.text)


def test_groups_and_budgets_stand_apart_on_the_page(tmp_path):
    comparison = compare([*jobs(), *jobs(model="other"), *jobs(settings={"budget_s": 60.0})])
    text = "".join(page_of(comparison, tmp_path / "page.html").text)
    assert "2 groups" in text
    assert text.count("Compared at equal tokens") == 2
    assert text.count("Compared at equal seconds: 60 s") == 1
    assert text.count("Quality against prompt speed") == 3


def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("the one before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        write_report(compare(jobs()), path)
    assert path.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_costs_in_money():
    comparison = compare(jobs(ratios=((2, 5),)))
    [table] = comparison.groups[0].tables
    plain, priced = (cost_sheet(table, comparison.by, price) for price in (None, 3.0))
    assert priced.headings[:-2] == plain.headings
    job, served = (cell.text for cell in priced.rows[0][-2:])
    # 2 ranks; 90 s for the job, a million tokens at 125 per second.
    assert float(job) == pytest.approx(3.0 * 2 * 90 / 3600, rel=1e-3)
    assert float(served) == pytest.approx(3.0 * 2 * 1e6 / 125 / 3600, rel=1e-3)


def test_pictures_are_made_where_there_is_something_to_see(tmp_path):
    names = [figure.path.name for figure in draw(compare(jobs()), tmp_path)]
    assert names == [
        "perplexity.png", "quality-speed.png", "slices.png", "layers.png", "gates-tsp-2.png", "gates-tsp-4.png",
    ]  # fmt: skip
    bare = [finished("sleb", speed={}), finished("tail", ppl=20.0, speed={})]
    assert [figure.path.name for figure in draw(compare(bare), tmp_path)] == ["perplexity.png", "layers.png"]


def test_the_need_for_text_is_drawn_where_it_varies(tmp_path):
    made = [
        finished(method, ppl=ppl - size / 8, calibration={"fingerprint": str(size), "num_blocks": size})
        for method, ppl in (("sleb", 14.0), ("tail", 20.0))
        for size in (4, 8, 16)
    ]
    figures = {figure.path.name: figure for figure in draw(compare(made), tmp_path)}
    assert "calibration.png" in figures
    assert "calibration sequences" in figures["calibration.png"].title


def test_a_table_of_models_that_diverged_is_still_told(tmp_path):
    ppl = {"wiki": {"dense": DENSE, "bare_drop": 20.0, "pruned": math.nan}}
    comparison = compare([finished("sleb", perplexity=ppl)])
    assert [figure.path.name for figure in draw(comparison, tmp_path)] == ["layers.png"]
    page_of(comparison, tmp_path / "page.html")
    document = json.dumps(as_document(comparison), allow_nan=False)
    assert json.loads(document)["groups"][0]["tables"][0]["rows"][0]["measured"]["ppl/wiki"]["mean"] is None


def test_the_front_is_what_nothing_beats_in_both():
    def point(x, y):
        return Point(head="a", tail="", panel="", x=x, y=y)

    slow_good, middle, fast_bad = point(1.0, 1.0), point(1.2, 1.5), point(1.5, 3.0)
    beaten = [point(1.1, 1.6), point(1.2, 1.9), point(1.5, 3.5), point(0.9, 1.0)]
    assert pareto([beaten[0], fast_bad, middle, *beaten[1:], slow_good]) == [slow_good, middle, fast_bad]


def test_the_terminal_shows_marks_without_bold_type():
    printed = io.StringIO()
    made = [finished("sleb", ppl=12.0, noise=0.3), finished("tail", ppl=12.1, noise=0.3), finished("ppl", ppl=40.0)]
    print_comparison(compare(made), printed)
    lines = printed.getvalue().splitlines()
    [best] = [line for line in lines if "│ sleb" in line]
    [tied] = [line for line in lines if "│ tail" in line]
    [lost] = [line for line in lines if "│ ppl" in line]
    assert "12.00*" in best
    assert "12.10~" in tied
    assert " 40.00 " in lost
    assert any(line.startswith("- 2 of 8 layers dropped") for line in lines)


def test_a_sweep_logs_table_page_and_figures(tmp_path):
    class Told:
        def __init__(self):
            self.artifacts = []

        def artifact(self, path, folder=""):
            assert path.stat().st_size > 0
            self.artifacts.append(f"{folder}/{path.name}")

    told = Told()
    log_comparison(compare(jobs()), told, tmp_path / "comparison")
    assert {"comparison/table.json", "comparison/report.html", "comparison/perplexity.png"} <= set(told.artifacts)
    assert len(told.artifacts) == 6 + 2
    assert json.loads((tmp_path / "comparison/table.json").read_text())["verdict"][0]["text"]


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page(tmp_path):
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    write_report(compare(jobs()), path)
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    subprocess.run(
        [
            BROWSER,
            *quiet,
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1200,1600",
            f"--screenshot={picture}",
            path.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with PIL.Image.open(picture) as image:
        grey = image.convert("L")
        assert grey.size == (1200, 1600)
        # Table and verdict stand on the first screen, on white.
        dark = sum(grey.histogram()[:128]) / (1200 * 1600)
        assert 0.005 < dark < 0.2
        assert grey.getpixel((2, 2)) == 255
