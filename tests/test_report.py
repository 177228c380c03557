"""The report: a page of its own, whose text can't act, with each number in it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from fibldm import disease
from fibldm.evaluation import Evaluation, Group, Picture, SampleResult
from fibldm.measurement import Measurement
from fibldm.metrics import PAIR_METRICS, SET_METRICS
from fibldm.report import (
    Section,
    as_dict,
    histograms,
    render,
    sections_of,
    spectra,
    write_report,
)
from fibldm.verdicts import Estimate, Score, Verdict

NAN = float("nan")
HOSTILE = "<img src=x onerror=alert(1)>\"'&.png"
VOID = {"meta", "img", "br", "link", "hr", "input"}


def score(name="fid", value=12.5, low=10.0, high=15.0, baseline=3.25, warning="few", source="net"):
    return Score(name, value, low, high, baseline, 40, 41, source, warning)


def picture(title="a sample"):
    return Picture(title, np.zeros((32, 32, 3), np.uint8), f"picture of {title}")


def page(**changes):
    plot = replace(histograms([1.0, 2.0, 3.0], [2.0, 4.0], "HU", "two histograms"), title="a plot")
    section = Section(
        "Realism", "First.\n\nSecond.", [score(), score("kid", 0.0123, NAN, NAN, NAN, "")],
        [picture()], ["a note"], [plot], {"fid": "a distance"},
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


def test_difference_and_margin_are_there_where_a_number_is_judged():
    judged = replace(score(), difference=Estimate(9.25, 2.0, 30.0), margin=(-3.5, 3.5))
    text = Reader(page(sections=[Section("S", scores=[judged, score("other")])])).text
    for part in ("difference", "margin", "9.25 (5.165 to 13.33)", "-3.5 to 3.5"):
        assert part in text, part
    assert "margin" not in Reader(page()).text.partition("metric")[2].partition("source")[0]


def test_hostile_text_stays_text_wherever_it_enters():
    plot = replace(histograms([1.0, 2.0], [2.0, 4.0], HOSTILE, HOSTILE), title=HOSTILE)
    section = Section(
        HOSTILE, HOSTILE, [score(HOSTILE, warning=HOSTILE, source=HOSTILE), score()],
        [picture(HOSTILE)], [HOSTILE], [plot], {HOSTILE: HOSTILE},
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


def an_evaluation(word="good", name="sample.png"):
    measures = dict.fromkeys([*disease.QUANTITIES, *disease.NOISE], 1.0) | {"skewness": NAN}
    results = [SampleResult(name, "", Measurement(measures, 2))]
    groups = {
        "Realism": Group([score()], Verdict(word, "a sentence")),
        "Disease": Group(verdict=Verdict("not judged", "nothing"), notes=["one line"]),
    }
    return Evaluation(
        groups, results, [measures], [""], {"Date": "today"}, ["a note"], (-1000.0, 400.0),
        [picture(name)],
    )  # fmt: skip


def test_both_files_are_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "report"
    write_report(an_evaluation(), folder)
    page, numbers = folder / "index.html", json.loads((folder / "metrics.json").read_text())
    assert "a sentence" in page.read_text()
    with pytest.raises(ValueError, match="excellent"):
        write_report(an_evaluation("excellent"), folder)
    assert "excellent" not in page.read_text()
    assert json.loads((folder / "metrics.json").read_text()) == numbers
    write_report(an_evaluation(name="new \udcff"), folder)  # a file name that is no text
    assert "new ?" in page.read_text(encoding="utf-8")
    assert sorted(p.name for p in folder.iterdir()) == ["index.html", "metrics.json"]


def test_numbers_are_those_of_the_groups_and_of_each_sample():
    found = as_dict(an_evaluation())
    assert found["groups"]["Realism"]["scores"] == [score().as_dict()]
    assert found["groups"]["Realism"]["verdict"] == "good"
    assert found["groups"]["Notes"]["notes"] == ["a note"]
    (sample,) = found["samples"]
    assert sample["file"] == "sample.png" and sample["measures"]["mean"] == 1
    assert "skewness" not in sample["measures"] and "nearest" not in sample
    json.dumps(found, allow_nan=False)


def test_another_page_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"another index\.html"):
        write_report(an_evaluation(), tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"


def test_every_metric_that_is_shown_says_what_it_means():
    names = [*SET_METRICS, *PAIR_METRICS, "dice", "hd95_px", "hd95_mm"]
    groups = {"Realism": Group([score(name) for name in names])}
    (section,) = [s for s in sections_of(replace(an_evaluation(), groups=groups)) if s.scores]
    assert list(section.meanings) == names


def heights(plot, kind):
    """Of a histogram's steps, as shares of the plot's height."""
    (path,) = [path for found, path in plot.shapes if found.split()[0] == kind]
    y = np.array([float(point.split()[1]) for point in path.strip("MZ").split("L")])
    return (y.max() - y) / (plot.height - plot.top - plot.bottom)


def test_histograms_show_where_each_side_lies():
    plot = histograms([0.0] * 50, [10.0] * 50, "HU", "alt")
    real, fake = heights(plot, "real"), heights(plot, "fake")
    assert real[1] == fake[-2] == 1 and real[-2] == fake[1] == 0
    assert [value for _, value, _ in plot.x_ticks] == ["0", "5", "10"]
    assert [value for _, value in plot.y_ticks] == ["0", "0.5", "1"]
    assert histograms([NAN], [1.0], "HU", "alt") is None
    assert histograms([1.0], [1.0], "HU", "all values alike").shapes


def test_spectra_leave_out_what_has_no_logarithm():
    x = np.arange(1, 5) / 8
    curves = np.array([[4.0, 3, 2, 1], [NAN, 3, 2, 0]])
    plot = spectra(x, curves, 2 * curves, "f", "HU", "alt")
    assert len(plot.shapes) == 4 and "nan" not in str(plot)
    assert spectra(x, np.zeros((0, 4)), curves, "f", "HU", "alt") is None


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
