"""`pmgaft probe FOLDER`: the rows, the files, the page as a browser reads it, and the exit codes of a gate."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pmgaft.cli import main
from pmgaft.clip.preprocess import read_pixels
from pmgaft.clip.text import label_features
from pmgaft.errors import DataError
from pmgaft.probe import ProbeSettings
from pmgaft.probe.charts import curve, histogram
from pmgaft.probe.folder import Row, picture_files, true_labels
from pmgaft.probe.full import Question
from pmgaft.probe.output import FILES
from pmgaft.probe.page import Drawing, page
from pmgaft.probe.summary import summarise
from pmgaft.probe.survival import pixels_of
from pmgaft.probe.tables import COLUMNS, to_csv, to_junit
from pmgaft.threat import ThreatModel
from tests.conftest import CLASS_NAMES, draw  # type: ignore[import-not-found,unused-ignore]

EPS = 11.5 / 255
HOSTILE = "<img src=x onerror=alert(1)>&'\".png"
QUICK = ["--no-health", "--wording", "none", "--steps", "8", "--gradients", "20"]


def run(folder: Path, model: Path, *options: str, quick: bool = True) -> Result:
    command = ["probe", str(folder), "--labels", ",".join(CLASS_NAMES), "--model", f"local-dir:{model}"]
    return CliRunner().invoke(
        main, [*command, "--device", "cpu", "--eps", "11.5/255", *(QUICK if quick else []), *options]
    )


@dataclass(frozen=True)
class Made:
    """A folder that was probed, and what came of it."""

    pictures: Path
    output: Path
    result: Result
    document: Any
    rows: list[dict[str, str]]


@pytest.fixture(scope="module")
def made(tiny_clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Nine pictures in sub-folders named as the labels, one of them with a hostile name; a file that is none."""
    pictures = tmp_path_factory.mktemp("pictures")
    for index in range(9):
        label = CLASS_NAMES[index % 3].replace("green square", "Green_Square")
        (pictures / label).mkdir(exist_ok=True)
        draw(index).save(pictures / label / (HOSTILE if index == 4 else f"{index}.png"))
    (pictures / "red disc" / "broken.jpg").write_text("no picture")
    (pictures / "red disc" / "notes.txt").write_text("no picture, and not called one")
    output = tmp_path_factory.mktemp("report") / "report"
    result = run(pictures, tiny_clip_dir, "--output", str(output), "--batch-size", "4")
    assert result.exit_code == 0, result.output
    document = json.loads((output / "report.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((output / "images.csv").read_text(encoding="utf-8").splitlines()))
    return Made(pictures, output, result, document, rows)


def test_all_files_are_there_and_no_others(made: Made) -> None:
    assert {path.name for path in made.output.iterdir()} == {name.rstrip("/") for name in FILES}
    assert len(list((made.output / "pictures").iterdir())) == 9


def test_every_picture_is_a_row_in_every_table_and_a_bad_file_is_one_with_its_error(made: Made) -> None:
    names = [path.relative_to(made.pictures).as_posix() for path in picture_files(made.pictures)]
    assert len(names) == 10
    cases = ElementTree.parse(made.output / "junit.xml").getroot().findall("testsuite/testcase")
    assert names == [row["file"] for row in made.rows] == [one["file"] for one in made.document["images"]]
    assert names == [case.get("name") for case in cases]
    (bad,) = [row for row in made.rows if row["verdict"] == "error"]
    assert bad["file"] == "red disc/broken.jpg"
    assert "not an image" in bad["reason"]
    assert made.document["summary"]["verdicts"]["error"] == 1
    assert sum(made.document["summary"]["verdicts"].values()) == made.document["summary"]["files"] == 10
    assert "red disc/broken.jpg: this is not an image" in made.result.stdout


def test_a_row_is_what_the_picture_gets_alone(made: Made, tiny_clip_dir: Path) -> None:
    for one in made.document["images"][:2]:
        result = run(made.pictures / one["file"], tiny_clip_dir, "--json")
        assert result.exit_code == 0, result.output
        alone, report = json.loads(result.stdout), one["report"]
        assert {name: alone[name] for name in ("id", "verdict")} == {name: report[name] for name in ("id", "verdict")}
        assert alone["min_eps"]["eps_value"] == pytest.approx(report["min_eps"]["eps_value"], rel=1e-3)


def test_the_csv_says_what_the_reports_say(made: Made) -> None:
    assert list(made.rows[0]) == list(COLUMNS)
    for row, one in zip(made.rows, made.document["images"], strict=True):
        if report := one["report"]:
            assert row["verdict"] == report["verdict"]
            assert float(row["min_eps_value"]) == pytest.approx(report["min_eps"]["eps_value"])
            assert row["clean_label"] == report["clean"]["label"]
            assert (row["distance"] == "") == (report["verdict"] != "broken")


def test_the_curve_is_the_share_whose_smallest_eps_is_larger(made: Made) -> None:
    reports = [one["report"] for one in made.document["images"] if one["report"]]
    assert {report["verdict"] for report in reports} == {"broken", "not_broken"}
    points = made.document["summary"]["curve"]
    assert points[0]["eps"] == "0"
    for point in points:
        if point["eps_value"] != pytest.approx(EPS):
            stand = sum(report["min_eps"]["eps_value"] > point["eps_value"] for report in reports)
            assert point["standing"] == pytest.approx(stand / 9)
    (own,) = [point for point in points if point["eps"] == "11.5/255"]
    assert own["standing"] == pytest.approx(sum(report["verdict"] != "broken" for report in reports) / 9)


def test_sub_folders_that_name_labels_are_true_labels(made: Made) -> None:
    right = [row["clean_label"] == row["true_label"] for row in made.rows if row["verdict"] != "error"]
    assert {row["true_label"] for row in made.rows} == set(CLASS_NAMES)
    assert made.document["summary"]["true_labels"] is True
    assert made.document["summary"]["curve"][0]["accuracy"] == pytest.approx(sum(right) / 9)


class Elements(HTMLParser):
    """What a browser would see: elements with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


def test_the_page_needs_no_server_no_script_and_nobody_else(made: Made) -> None:
    html = (made.output / "index.html").read_text(encoding="utf-8")
    seen = Elements(html)
    links = [one["href"] for one in seen.named("a")] + [one["src"] for one in seen.named("img")]
    assert len(links) >= 2 * 9
    for link in links:
        assert link is not None
        assert (made.output / unquote(link)).is_file()
    assert not list(seen.named("script")) + list(seen.named("link")) + list(seen.named("iframe"))
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}
    for claim in ("robust", "proven", "safe"):
        assert claim not in seen.words.lower()


def test_names_are_text_and_never_markup(made: Made) -> None:
    seen = Elements((made.output / "index.html").read_text(encoding="utf-8"))
    assert f"Green_Square/{HOSTILE}" in seen.words
    assert not [attributes for _, attributes in seen.elements if any(name.startswith("on") for name in attributes)]
    assert all((attributes["src"] or "").startswith("pictures/") for attributes in seen.named("img"))


def test_the_drawing_shows_the_picture_the_adversarial_and_the_change(made: Made, tiny_clip: Any) -> None:
    texts = label_features(tiny_clip.text.encode, CLASS_NAMES)
    for one in made.document["images"]:
        if not one["report"]:
            continue
        drawing = ElementTree.parse(made.output / one["picture"]).getroot()
        clean, adversarial, change = (
            pixels_of(Image.open(io.BytesIO(base64.b64decode(element.attrib["href"].partition(",")[2]))))
            for element in drawing.iter("{http://www.w3.org/2000/svg}image")
        )
        expected = read_pixels((made.pictures / one["file"]).read_bytes(), tiny_clip.preprocess)
        assert torch.equal(clean, expected)
        reach = EPS if one["verdict"] == "broken" else one["report"]["min_eps"]["eps_value"]
        assert float((adversarial - clean).abs().max()) <= reach + 0.51 / 255
        with torch.no_grad():
            logits = tiny_clip.logits(torch.stack([clean, adversarial]), texts)
        assert float((logits[1] - logits[0]).abs().max()) > 0
        assert float((change - 0.5).abs().max()) == pytest.approx(0.5, abs=0.01)
        words = "".join(drawing.itertext())
        assert all(label["label"] in words for label in one["report"]["clean"]["top"])


def test_charts_are_drawings_by_themselves(made: Made) -> None:
    for name in ("curve.svg", "histogram.svg"):
        root = ElementTree.parse(made.output / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "eps 11.5/255" in "".join(root.itertext())


# the gate


def test_a_folder_can_be_a_gate(made: Made, tiny_clip_dir: Path, tmp_path: Path) -> None:
    """Broken answers come before a file that could not be read; JUnit agrees with the exit code."""
    few = tmp_path / "few"
    few.mkdir()
    draw(0).save(few / "0.png")
    (few / "bad.png").write_text("no picture")
    held = ["--eps", "0", "--no-min-eps"]
    for number, (options, code, failures, errors) in enumerate(
        [
            (["--eps", "64/255", "--fail-on", "broken", "--fail-on", "inconclusive"], 3, 1, 1),
            ([*held, "--fail-on", "broken"], 0, 0, 0),
            ([*held, "--fail-on", "inconclusive"], 4, 0, 1),
        ]
    ):
        output = tmp_path / str(number)
        result = run(few, tiny_clip_dir, "--output", str(output), *options)
        assert result.exit_code == code, result.output
        suite = ElementTree.parse(output / "junit.xml").getroot().find("testsuite")
        assert suite is not None
        assert (suite.get("failures"), suite.get("errors")) == (str(failures), str(errors))
    (few / "0.png").unlink()
    result = run(few, tiny_clip_dir, "--output", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert (tmp_path / "none" / "index.html").is_file()


def test_a_single_picture_can_have_the_page_too(made: Made, tiny_clip_dir: Path, tmp_path: Path) -> None:
    picture, output = made.pictures / "red disc" / "0.png", tmp_path / "one"
    result = run(picture, tiny_clip_dir, "--output", str(output), "--fail-on", "inconclusive", "--seconds", "0")
    assert result.exit_code == 4, result.output
    assert (output / "index.html").is_file()
    assert json.loads((output / "report.json").read_text())["images"][0]["verdict"] == "inconclusive"


def test_what_was_finished_before_ctrl_c_is_written(
    made: Made, tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pmgaft.probe import folder

    examine, calls = folder.examine, iter(range(10))

    def interrupted(*arguments: Any) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return examine(*arguments)

    monkeypatch.setattr(folder, "examine", interrupted)
    result = run(made.pictures, tiny_clip_dir, "--output", str(tmp_path / "half"), "--batch-size", "2")
    assert result.exit_code == 130
    summary = json.loads((tmp_path / "half" / "report.json").read_text())["summary"]
    assert summary["stopped"] is True
    assert sum(summary["verdicts"].values()) == 2
    assert "Stopped after 2 of 10 pictures" in (tmp_path / "half" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--output report/"),
        (["--output", "{full}"], "is not empty"),
        (["--output", "{new}", "--save-adversarial", "a.png"], "for one picture"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    made: Made, tmp_path: Path, options: list[str], words: str
) -> None:
    places = {"full": str(made.pictures), "new": str(tmp_path / "new")}
    result = run(made.pictures, tmp_path / "no-model", *[option.format(**places) for option in options])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    draw(0).save(tmp_path / ".hidden" / "0.png")
    with pytest.raises(DataError, match="holds no pictures"):
        picture_files(tmp_path)


def test_true_labels_are_all_or_none(tmp_path: Path) -> None:
    files = [tmp_path / "sea_lion" / "a.png", tmp_path / "Cat" / "deep" / "b.png"]
    assert true_labels(tmp_path, files, ("sea lion", "cat")) == ["sea lion", "cat"]
    assert true_labels(tmp_path, [*files, tmp_path / "c.png"], ("sea lion", "cat")) is None
    assert true_labels(tmp_path, [*files, tmp_path / "dog" / "c.png"], ("sea lion", "cat")) is None


# rows made up, to know what must come out


QUESTION = Question(
    labels=("cat", "tomcat", "dog"),
    templates=("{}",),
    settings=ProbeSettings(threat=ThreatModel(eps=1 / 255), min_eps=True, groups=((0, 1),)),
)


def row(file: str, verdict: str, least: float | None, clean: str = "cat", truth: str | None = "cat") -> Row:
    """least: in grey levels."""
    eps = None if least is None else least / 255
    return Row(
        file=file,
        truth=truth,
        picture=f"pictures/{file}.svg",
        document={
            "verdict": verdict,
            "reason": None,
            "statement": "it was tried",
            "threat_model": {"eps_value": 1 / 255},
            "min_eps": {"eps_value": eps, "eps": None if least is None else f"{least:g}/255", "label": "dog"},
            "clean": {"label": clean, "probability": 0.9, "margin": 1.0},
            "adversarial": {"label": "dog", "probability": 0.9, "distance_value": 1 / 255}
            if verdict == "broken"
            else None,
            "health": [],
            "wording": None,
            "gradients": 100,
            "image": {"sha256": "0" * 64},
            "id": "0" * 16,
        },
    )


ROWS = [
    row("a", "broken", 0.4),
    row("b", "broken", None, clean="tomcat"),  # the attack broke it at eps; no search found where
    row("c", "not_broken", 1.5, clean="dog"),
    row("d", "not_broken", None),
    row("e", "inconclusive", 3),
    Row(file="f", truth="cat", error="damaged"),
]


def points(rows: list[Row]) -> dict[str, tuple[float, float | None]]:
    found = summarise(rows, QUESTION, "made up", {"name": "m", "hash": "0" * 64}, len(rows))["curve"]
    return {point["eps"]: (point["standing"], point["accuracy"]) for point in found}


def test_standing_and_accuracy_by_hand() -> None:
    """Five pictures could be read; four of their answers are right, a synonym of one group among them."""
    found = points(ROWS)
    assert found["0"] == pytest.approx((5 / 5, 4 / 5))
    assert found["0.5/255"] == pytest.approx((4 / 5, 3 / 5))
    assert found["1/255"] == pytest.approx((3 / 5, 2 / 5))
    assert found["2/255"] == pytest.approx((2 / 5, 2 / 5))
    assert found["4/255"] == pytest.approx((1 / 5, 1 / 5))
    without = points([*ROWS, row("g", "broken", 0.4, truth=None)])
    assert {accuracy for _, accuracy in without.values()} == {None}


def test_nobody_claims_what_was_not_tried() -> None:
    """Without the search for the smallest eps the curve ends at the eps that was tried."""
    settings = ProbeSettings(threat=ThreatModel(eps=1 / 255))
    question = Question(labels=QUESTION.labels, templates=("{}",), settings=settings)
    found = summarise(ROWS, question, "made up", {"name": "m", "hash": "0" * 64}, 6)
    assert found["curve"][-1]["eps"] == "1/255"
    assert found["median_min_eps"] is None


def test_inconclusive_answers_are_a_band_and_not_a_line() -> None:
    assert "inconclusive" in curve(ROWS, QUESTION)
    assert "inconclusive" not in curve([one for one in ROWS if one.verdict != "inconclusive"], QUESTION)


def test_the_histogram_parts_at_eps_and_counts_those_without() -> None:
    found = histogram([row("a", "broken", 1.0), row("b", "not_broken", 1.001), row("c", "not_broken", None)], QUESTION)
    assert found.count('fill="#c8501a"') == 1
    assert found.count('fill="#1f6fb2"') == 1
    assert "1 of 3: none found" in found


@pytest.mark.parametrize("rows", [[], [Row(file="f", error="damaged")], [row("d", "not_broken", None)]])
def test_charts_of_next_to_nothing_are_still_drawings(rows: list[Row]) -> None:
    for drawing in (curve(rows, QUESTION), histogram(rows, QUESTION)):
        ElementTree.fromstring(drawing)


def test_junit_fails_for_what_was_asked_and_skips_what_says_nothing() -> None:
    def outcomes(*fail_on: str) -> list[str]:
        suite = ElementTree.fromstring(to_junit(ROWS, "made up", fail_on)).find("testsuite")
        assert suite is not None
        return [case[0].tag for case in suite]

    quiet = "system-out"
    assert outcomes() == [quiet, quiet, quiet, quiet, "skipped", "skipped"]
    assert outcomes("broken") == ["failure", "failure", quiet, quiet, "skipped", "skipped"]
    assert outcomes("inconclusive") == [quiet, quiet, quiet, quiet, "failure", "error"]


def test_names_that_xml_cannot_hold_do_not_break_the_tables() -> None:
    hostile = [Row(file="a\x00\x1b]]>\n,\"'.png", error="\x07 damaged")]
    assert ElementTree.fromstring(to_junit(hostile, "\x01", [])).find("testsuite/testcase") is not None
    assert next(csv.DictReader(io.StringIO(to_csv(hostile))))["file"] == hostile[0].file


def test_a_page_of_a_thousand_pictures_stays_small_and_loads_them_late() -> None:
    rows = [row(str(n), "broken", n / 1000) if n % 2 else row(str(n), "not_broken", 1 + n) for n in range(1000)]
    drawings = {one.picture: Drawing(height=300, alternative="a picture") for one in rows if one.picture}
    summary = summarise(rows, QUESTION, "many", {"name": "m", "hash": "0" * 64}, 1000)
    html = page(rows, drawings, summary, [curve(rows, QUESTION), histogram(rows, QUESTION)])
    assert len(html) < 1_500_000
    images = list(Elements(html).named("img"))
    assert len(images) == 1000
    assert all(one["loading"] == "lazy" and one["width"] and one["height"] for one in images)
    order = re.findall(r"<h3>(\d+)</h3>", html)
    assert order[:2] == ["1", "3"]  # broken ones first, the weakest before others
    assert order[500:502] == ["0", "2"]
