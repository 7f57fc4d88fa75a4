"""Files of another kind than their name says, by their first bytes."""

import pytest

from model.data.file_kinds import is_lfs_pointer, is_web_page, text_of


@pytest.mark.parametrize(
    "head", [b"<!DOCTYPE html><title>Sign in</title>", b"\r\n <HTML>", b"\xef\xbb\xbf<?xml version='1.0'?>", b"<head>"]
)
def test_web_page_is_known_by_its_first_tag_whatever_stands_before_it(head: bytes) -> None:
    assert is_web_page(head)


@pytest.mark.parametrize("head", [b"", b"\x89PNG\r\n\x1a\n<html", b"a text about <html>", b"{}"])
def test_what_begins_otherwise_is_no_web_page(head: bytes) -> None:
    assert not is_web_page(head)


def test_pointer_of_git_lfs_is_known_by_its_first_line() -> None:
    assert is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    assert not is_lfs_pointer(b" version https://git-lfs.github.com/spec/v1\n")


def test_text_of_markup_is_in_lower_case_and_without_what_stands_before_it() -> None:
    assert text_of(b"\xef\xbb\xbf\n\t <SVG/>") == b"<svg/>"
