"""The report: a page of its own, whose text can't act, with each number in it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from fibldm import plots
from fibldm.metrics import Score
from fibldm.report import (
    Picture,
    Plot,
    Section,
    Verdict,
    judge,
    png_bytes,
    render,
    worst,
    write_report,
)

NAN = float("nan")
HOSTILE = "<img src=x onerror=alert(1)>\"'&.png"
VOID = {"meta", "img", "br", "link", "hr", "input"}


def score(name="fid", value=12.5, low=10.0, high=15.0, baseline=3.25, warning="few", source="net"):
    return Score(name, value, low, high, baseline, 40, 41, source, warning)


def picture(title="a sample"):
    return Picture(title, png_bytes(np.zeros((32, 32, 3), np.uint8)), f"picture of {title}")


def page(**changes):
    svg = plots.histograms([1.0, 2.0, 3.0], [2.0, 4.0], "HU", "two histograms")
    section = Section(
        "Realism", "First.\n\nSecond.", [score(), score("kid", 0.0123, NAN, NAN, NAN, "")],
        [picture()], ["a note"], [Plot("a plot", svg)], {"fid": "a distance"},
        Verdict("bad", "fid 12.5, baseline 3.25"),
    )  # fmt: skip
    sections = changes.get("sections", [section])
    return render(changes.get("title", "A title"), sections, changes.get("facts", {"N": "41"}))


class Reader(HTMLParser):
    """Elements with their attributes, the text outside of style, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_is_well_formed_and_needs_nothing_else():
    text = page()
    reader = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "link", "iframe", "object", "base", "form"}
    assert re.findall(r"https?://|@import|url\(", text) == []
    for _, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    pictures = [attributes for tag, attributes in reader.elements if tag == "img"]
    assert len(pictures) == 1 and pictures[0]["alt"] == "picture of a sample"
    anchors = [attributes["href"][1:] for tag, attributes in reader.elements if tag == "a"]
    assert anchors and set(anchors) <= {attributes.get("id") for _, attributes in reader.elements}


def test_every_number_word_and_fact_is_there():
    text = Reader(page()).text
    for part in (
        "A title", "bad", "fid 12.5, baseline 3.25", "12.5", "10 to 15", "3.25", "40 / 41", "net",
        "few", "0.0123", "First.", "Second.", "a note", "a plot", "a distance", "a sample", "41",
    ):  # fmt: skip
        assert part in text, part
    assert "nan" not in text.lower().replace("finance", "")


def test_hostile_text_stays_text_wherever_it_enters():
    svg = plots.histograms([1.0, 2.0], [2.0, 4.0], HOSTILE, HOSTILE)
    section = Section(
        HOSTILE, HOSTILE, [score(HOSTILE, warning=HOSTILE, source=HOSTILE), score()],
        [picture(HOSTILE)], [HOSTILE], [Plot(HOSTILE, svg)], {HOSTILE: HOSTILE},
        Verdict("good", HOSTILE),
    )  # fmt: skip
    text = page(title=HOSTILE, sections=[section], facts={HOSTILE: HOSTILE})
    reader = Reader(text)
    assert [a["src"][:22] for tag, a in reader.elements if tag == "img"] == [
        "data:image/png;base64,"
    ]
    assert not [a for _, a in reader.elements if "onerror" in a]
    assert reader.text.count(HOSTILE) >= 12  # shown as it is, in each place


def test_a_warning_of_all_rows_is_said_once():
    section = Section("S", scores=[score("a"), score("b")])
    assert Reader(page(sections=[section])).text.count("few") == 1
    section = Section("S", scores=[score("a"), score("b", warning="other")])
    text = Reader(page(sections=[section])).text
    assert text.count("few") == 1 and "All rows" not in text


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="excellent"):
        page(sections=[Section("S", verdict=Verdict("excellent", ""))])


@pytest.mark.parametrize(
    ("value", "low", "high", "baseline", "options", "word"),
    [
        (5.0, 3.0, 7.0, 3.5, {}, "good"),  # the interval reaches the baseline
        (5.0, 4.0, 7.0, 3.5, {}, "doubtful"),
        (9.0, 8.0, 10.0, 3.5, {}, "bad"),
        (9.0, 8.0, 10.0, 3.5, {"squared": True}, "doubtful"),
        (15.0, 14.0, 16.0, 3.5, {"squared": True}, "bad"),
        (0.90, 0.88, 0.96, 0.95, {"higher_is_better": True}, "good"),
        (0.91, 0.90, 0.92, 0.95, {"higher_is_better": True}, "doubtful"),
        (0.70, 0.68, 0.72, 0.95, {"higher_is_better": True}, "bad"),
        (5.0, NAN, NAN, 3.5, {}, "doubtful"),  # without an interval the value counts
        (3.0, NAN, NAN, 3.5, {}, "good"),
        (0.01, -0.01, 0.02, -0.02, {"squared": True}, "good"),  # KID's baseline below 0 is chance
        (0.01, 0.005, 0.02, -0.02, {"squared": True}, "bad"),
        (5.0, 4.0, 6.0, NAN, {}, "not judged"),
        (5.0, 4.0, 6.0, 0.0, {}, "not judged"),  # how far is twice as far as 0?
        (NAN, NAN, NAN, 1.0, {}, "not judged"),
    ],
)
def test_judge(value, low, high, baseline, options, word):
    verdict = judge(score("m", value, low, high, baseline), **options)
    assert verdict.word == word
    assert verdict.sentence.startswith("m ")


def test_a_group_is_as_good_as_its_worst_number():
    words = [Verdict("good", "a"), Verdict("bad", "b"), Verdict("not judged", "c")]
    assert worst(words) == Verdict("bad", "a; b; c")
    assert worst(words[::2]).word == "good"


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report" / "index.html"
    write_report(path, "old", [], {})
    with pytest.raises(ValueError):
        write_report(path, "new", [Section("S", verdict=Verdict("?", ""))], {})
    assert "old" in path.read_text()
    write_report(path, "new \udcff", [], {})  # a file name that is no text
    assert "new ?" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]


def areas(svg, kind):
    """Heights of a histogram's steps, as shares of the plot's height."""
    points = re.search(rf'class="{kind} \w+" d="M([^"Z]*)', svg).group(1).split("L")
    y = np.array([float(point.split()[1]) for point in points])
    return (y.max() - y) / (plots.HEIGHT - plots.TOP - plots.BOTTOM)


def test_histograms_show_where_each_side_lies():
    svg = plots.histograms([0.0] * 50, [10.0] * 50, "HU", "alt")
    real, fake = areas(svg, "real"), areas(svg, "fake")
    assert real[1] == fake[-2] == 1 and real[-2] == fake[1] == 0
    assert plots.histograms([NAN], [1.0], "HU", "alt") == ""
    assert "<svg" in plots.histograms([1.0], [1.0], "HU", "all values alike")


def test_spectra_leave_out_what_has_no_logarithm():
    x = np.arange(1, 5) / 8
    curves = np.array([[4.0, 3, 2, 1], [NAN, 3, 2, 0]])
    svg = plots.spectra(x, curves, 2 * curves, "f", "HU", "alt")
    assert svg.count("<path") == 5 and "nan" not in svg
    assert plots.spectra(x, np.zeros((0, 4)), curves, "f", "HU", "alt") == ""


def test_a_browser_shows_it_without_a_word_in_the_console(tmp_path):
    """Headless Chromium, at the width of a phone and of a desk."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    path, shot = tmp_path / "index.html", tmp_path / "shot.png"

    def console(text, size):
        path.write_text(text, encoding="utf-8")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}",
            f"--screenshot={shot}", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert shot.stat().st_size > 10_000
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    assert console(page(), "500,2000") == []
    assert console(page(), "1280,2000") == []
    # The page's own policy forbids what would get in; so does this test see the console.
    (refused,) = console(page().replace("</main>", "<script>alert(1)</script></main>"), "500,500")
    assert "Content Security Policy" in refused
