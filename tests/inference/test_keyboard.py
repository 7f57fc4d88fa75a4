"""What a path may look like when it is typed or dropped into a terminal. The terminal itself: test_cli_demo."""

import io
import os
import sys

import pytest

from model.inference.keyboard import history_file, line_editing, typed_path


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """A picture `a b.png` in the home folder, and that folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(b"")
    return tmp_path / "a b.png"


@pytest.mark.parametrize(
    "text", ["{}", "'{}'", '"{}"', "{escaped}", "file://{url}", "'file://{url}'", "~/a b.png", "~/a\\ b.png", "{} "]
)
def test_path_is_found_however_it_is_written(picture, text):
    written = text.format(picture, escaped=str(picture).replace(" ", "\\ "), url=str(picture).replace(" ", "%20"))
    assert typed_path(written.strip()) == str(picture)


def test_name_that_looks_quoted_but_is_a_files_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("'a'", "a\\ b.png", "it's.png"):
        (tmp_path / name).write_bytes(b"")
        assert typed_path(name) == name


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("'gone.png'", "gone.png"), ("it's gone.png", "it's gone.png"), ("gone a.png", "gone a.png"), ("", ""),
        ("C:\\Users\\me\\cat.png", "C:\\Users\\me\\cat.png"), ('"C:\\Users\\me\\a cat.png"', "C:\\Users\\me\\a cat.png"),
        ("file:///gone%20a.png", "/gone a.png"),
    ],
)  # fmt: skip
def test_path_of_no_file_is_told_without_its_quotes(text, path):
    assert typed_path(text) == path


@pytest.mark.parametrize("url", ["https://example.org/a%20b.png", "HTTP://example.org/'a'"])
def test_url_stays_as_it_is(url):
    assert typed_path(url) == url


def test_history_lies_in_the_users_state_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert history_file() == tmp_path / ".local/state/visualglm/history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_file() == tmp_path / "state/visualglm/history"


@pytest.mark.parametrize("stdin", [None, io.StringIO("line\n")])
def test_input_that_is_no_terminal_has_no_history(tmp_path, monkeypatch, stdin):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", stdin)
    with line_editing():
        pass
    assert os.listdir(tmp_path) == []
