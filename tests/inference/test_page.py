"""Pages that need nothing beside them: texts are escaped, pictures and curves are in the file."""

import math
import re
from html.parser import HTMLParser

import pytest
from conftest import GOLDEN

from model.inference.page import MOST_POINTS, WIDTH, Curve, chart, escaped, page, row_card, section, table, thumbnail
from model.inference.scores import Result

IMAGE = str(GOLDEN / "upstream/images/0.png")
EVIL = "<script>alert(1)</script>&\"'<img src=x onerror=y>"
VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that isn't the last one open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def result(answer, img=IMAGE, **fields):
    return Result(img, EVIL, EVIL, answer, False, False, 0.0, 1.0, 1, **fields)


def test_page_escapes_every_text_and_is_balanced():
    text = page(EVIL, section(EVIL, row_card(result(EVIL), [(EVIL, result(EVIL))]), table([EVIL], [(EVIL, [EVIL])])))
    tags = Balanced(text).seen
    assert "script" not in tags
    assert tags.count("img") == 1


def test_page_asks_for_nothing_from_elsewhere():
    row = Result(IMAGE, "问", "雪地", "雪地", True, True, 1.0, 0.1, 3)
    text = page("a", row_card(row, [("after", row)]), chart([Curve("c", [(1, 2)], 0)], 100, "d"))
    assert re.findall(r"(?:src|href)=.(?!data:)|url\(|@import|<link", text) == []
    assert "://" not in text


def test_half_a_character_is_shown_as_a_question_mark():
    assert escaped("a\ud800b") == "a?b"


def test_names_of_checkpoints_and_what_cells_hold_are_not_translated(monkeypatch):
    monkeypatch.setenv("VISUALGLM_UI_LANG", "zh")
    text = page("a", row_card(result("b"), [("base", result("b"))]), table(["base"], [("time", ["base"])]))
    assert "<dt>base</dt>" in text
    assert "<th>base</th>" in text
    assert "<th>用时</th><td>base</td>" in text
    assert "<dt>问题</dt>" in text


def test_row_without_picture_or_with_one_that_is_gone_is_shown_all_the_same(tmp_path):
    assert "<img" not in row_card(result("b", img=""), [])
    shown = row_card(result("b", img=str(tmp_path / "gone.png")), [])
    assert "gone.png, which can't be opened now" in shown


def test_answer_that_is_cut_ends_in_dots():
    assert "half …</span>" in row_card(result("half"), [("after", result("half", cut=True))])


@pytest.mark.parametrize("name", ["0.png", "1.png"])
def test_thumbnail_is_a_small_jpeg_in_the_text(name):
    assert thumbnail(str(GOLDEN / "upstream/images" / name)).startswith("data:image/jpeg;base64,/9j/")


def test_section_without_content_is_nothing():
    assert section("Heading", "", "") == ""


def test_chart_shows_every_spike_and_cuts_off_what_is_above():
    losses = [3.0] * 500 + [0.1] * 3000
    losses[2000], losses[2002] = 0.35, 0.02
    drawing = chart([Curve("loss", list(enumerate(losses)), 0)], 200, "losses", most=0.4)
    (path,) = re.findall(r'<path class="plain" d="M([^"]+)"', drawing)
    places = [tuple(map(float, point.split())) for point in path.replace(" M", " L").split(" L")]
    assert places[0][1] == 10.0  # where it comes from above: no plateau stands for what is not shown
    assert places[0][0] > 60 + 0.1 * (WIDTH - 72)
    level = sorted(height for _, height in places)[len(places) // 2]
    assert min(height for _, height in places[2:]) < level - 80  # the spike
    assert max(height for _, height in places) > level + 20  # and the dip


def test_chart_leaves_out_what_is_not_finite_and_thins_long_curves():
    curves = [
        Curve("long", [(step, 1 + step % 2) for step in range(100_000)], 0),
        Curve("bad", [(1, math.nan)], 1, dots=True),
    ]
    drawing = chart(curves, 200, "losses")
    Balanced(drawing)
    assert "nan" not in drawing
    assert drawing.count(" L") <= 2 * MOST_POINTS


def test_chart_of_nothing_is_nothing():
    assert chart([Curve("a", [], 0), Curve("b", [(1, math.inf)], 1)], 200, "losses") == ""


def test_chart_cuts_off_what_is_above_most():
    drawing = chart([Curve("a", [(0, 1.0), (1, 100.0), (2, 1.0)], 0)], 200, "losses", most=2.0)
    numbers = [float(number) for number in re.findall(r'<path[^>]* d="M([^"]+)"', drawing)[0].replace("L", "").split()]
    assert min(numbers[1::2]) >= 10  # inside the drawing
    assert max(numbers[::2]) <= WIDTH
