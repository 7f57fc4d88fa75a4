"""The shipped few-shot data is what its command makes, and true."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT
from PIL import Image

from scripts.dev.make_fewshot_data import QUESTION, label, main
from scripts.dev.scenes import BACKGROUNDS

ROOT = PROJECT
SHIPPED = ROOT / "fewshot-data"
FILES = [("dataset.json", 20), ("heldout.json", 50)]


def rows(name: str) -> list[dict[str, str]]:
    return json.loads((SHIPPED / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made")
    main(["--out", str(out)])
    return out


@pytest.mark.slow
def test_main_run_twice_writes_the_same_bytes(made, tmp_path):
    main(["--out", str(tmp_path)])

    first = {file.relative_to(made): file.read_bytes() for file in made.rglob("*") if file.is_file()}
    second = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert first == second


@pytest.mark.parametrize(("name", "_"), FILES)
def test_shipped_rows_are_those_that_the_command_makes(made, name, _):
    assert (SHIPPED / name).read_bytes() == (made / name).read_bytes()


def test_shipped_pictures_are_those_that_the_command_draws(made):
    shipped, drawn = sorted((SHIPPED / "images").iterdir()), sorted((made / "images").iterdir())

    assert [file.name for file in shipped] == [file.name for file in drawn]
    for ours, theirs in zip(shipped, drawn, strict=True):  # pixels: the PNG bytes depend on Pillow's zlib
        assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()


@pytest.mark.parametrize(("name", "count"), FILES)
def test_shipped_rows_all_ask_the_same_question_and_find_their_picture_from_the_root(name, count):
    assert len(rows(name)) == count
    for row in rows(name):
        assert set(row) == {"img", "prompt", "label"}
        assert row["prompt"] == QUESTION == "这张图片的背景里有什么内容？"
        assert (ROOT / row["img"]).is_file()


@pytest.mark.parametrize(("name", "count"), FILES)
def test_shipped_labels_name_every_background_equally_often(name, count):
    counts = Counter(row["label"] for row in rows(name))

    assert counts == {label(background): count // len(BACKGROUNDS) for background in BACKGROUNDS}


def test_label_of_the_meadow_is_the_released_example():
    assert label(BACKGROUNDS[1]) == "这张图片的背景是绿色的草地。"


def test_label_is_that_of_the_background_drawn(monkeypatch, tmp_path):
    drawn = []

    def drawn_blank(scene):
        drawn.append(scene)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("scripts.dev.make_fewshot_data.draw", drawn_blank)
    main(["--out", str(tmp_path)])

    made_rows = [row for name, _ in FILES for row in json.loads((tmp_path / name).read_text(encoding="utf-8"))]
    assert [row["label"] for row in made_rows] == [label(scene.background) for scene in drawn]


def test_shipped_pictures_are_all_different():
    pictures = [Image.open(ROOT / row["img"]).tobytes() for name, _ in FILES for row in rows(name)]

    assert len(set(pictures)) == 70


def test_shipped_pictures_take_less_than_2_mb():
    assert sum(file.stat().st_size for file in (SHIPPED / "images").iterdir()) < 2_000_000
