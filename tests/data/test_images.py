"""Pictures by URL: fetched whole or refused in a sentence."""

import http.server
import threading

import pytest
from conftest import GOLDEN

from model.data import images as pictures
from model.data.images import downloaded, image_file, is_url
from model.errors import InputError

PICTURE = GOLDEN / "upstream/images/0.png"


@pytest.fixture
def server():
    """The address of a server with the golden pictures, an endless file /long, and /slow, which says nothing."""
    stopped = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                stopped.wait(5)
                return
            self.send_response(200 if self.path in ("/0.png", "/long") else 404)
            self.end_headers()
            if self.path == "/0.png":
                self.wfile.write(PICTURE.read_bytes())
            while self.path == "/long" and not stopped.is_set():
                try:
                    self.wfile.write(bytes(2**16))
                except OSError:
                    return

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        stopped.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "expected"),
    [("http://a/b.png", True), ("HTTPS://a/b", True), ("a/b.png", False), ("file:///a", False), (PICTURE, False)],
)
def test_is_url_holds_for_http_and_https(source, expected):
    assert is_url(source) is expected


def test_downloaded_picture_is_the_servers_byte_by_byte(server):
    assert downloaded(f"{server}/0.png").read() == PICTURE.read_bytes()


def test_picture_file_leaves_paths_alone():
    assert image_file(PICTURE) is PICTURE


def test_missing_page_is_told_with_the_servers_answer(server):
    with pytest.raises(InputError, match=r"/none.png: the server answered 404 Not Found"):
        downloaded(f"{server}/none.png")


def test_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(pictures, "TIMEOUT", 0.2)
    with pytest.raises(InputError, match="/slow: no answer in 0 seconds"):
        downloaded(f"{server}/slow")


def test_endless_file_is_given_up(server, monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_DOWNLOAD", 2**20)
    with pytest.raises(InputError, match="/long: more than 1 MiB"):
        downloaded(f"{server}/long")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "http://", "http://[bad/a.png"])
def test_address_that_leads_nowhere_is_told_in_one_line(url):
    with pytest.raises(InputError) as error:
        downloaded(url)
    assert str(error.value).startswith(f"{url}: can't be fetched (")
    assert "\n" not in str(error.value)
