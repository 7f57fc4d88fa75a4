"""Pictures from elsewhere: by address, as data URI, base64 and upload; strangers reach no private network."""

import base64
import http.server
import io
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest
from conftest import PICTURE
from PIL import Image

from model.data import remote_images
from model.data.images import open_image
from model.data.remote_images import (
    PERSON,
    STRANGERS,
    WEB_IMAGE_NEEDED,
    Limits,
    downloaded,
    image_file,
    is_public,
    is_url,
    opened,
)
from model.errors import InputError

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


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
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        stopped.set()
        server.shutdown()


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_is_told_for_what_it_is_to_strangers(order):
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "TIFF", big_tiff=order == ">")
    with pytest.raises(InputError) as problem:
        opened(content.getvalue())
    told = f"the picture file isn't a picture; {WEB_IMAGE_NEEDED}: it is a TIFF; the same one as PNG or JPEG will do."
    assert str(problem.value) == told


def test_damaged_tiff_is_not_told_that_it_is_one_where_tiff_is_taken():
    with pytest.raises(InputError) as problem:
        open_image(io.BytesIO(b"II*\0"))
    assert "it is a TIFF" not in str(problem.value)


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
    monkeypatch.setattr(remote_images, "TIMEOUT", 0.2)
    with pytest.raises(InputError, match="/slow: no answer in 0 seconds"):
        downloaded(f"{server}/slow")


def test_endless_file_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote_images, "LARGEST_DOWNLOAD", 2**20)
    with pytest.raises(InputError, match="/long: more than 1 MiB"):
        downloaded(f"{server}/long")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "http://", "http://[bad/a.png"])
def test_address_that_leads_nowhere_is_told_in_one_line(url):
    with pytest.raises(InputError) as error:
        downloaded(url)
    assert str(error.value).startswith(f"{url}: can't be fetched (")
    assert "\n" not in str(error.value)


# For strangers


@pytest.fixture
def hostile():
    """A server at 127.0.0.2, which the tests call public, that answers each path in its own bad way."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            port = self.server.server_port
            targets = {
                "/inwards": f"http://127.0.0.1:{port}/0.png",
                "/file": f"file://{PICTURE}",
                "/loop": "/loop",
                "/moved": "/0.png",
            }
            self.server.asked.append((self.headers["Host"], self.path))
            if self.path in targets:
                self.send_response(302)
                self.send_header("Location", targets[self.path])
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            if self.path == "/drip":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            elif self.path in self.server.pictures:
                self.wfile.write(PICTURE.read_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("", 0), Handler) as server:
        server.asked, server.pictures = [], ["/0.png"]
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def public(hostile, monkeypatch):
    """The address of that server."""
    monkeypatch.setattr(remote_images, "is_public", lambda address: address == "127.0.0.2" or is_public(address))
    return f"http://127.0.0.2:{hostile.server_port}"


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_address_of_the_internet_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1",
    "64:ff9b::7f00:1", "2002:7f00:1::", "198.18.0.1", "fec0::1", "fec0:0:0:ffff::1",
])  # fmt: skip
def test_address_of_this_machine_or_of_a_private_network_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "a@127.0.0.1"]
)
def test_strangers_are_not_led_to_this_machine_however_it_is_written(hostile, host):
    with pytest.raises(InputError, match="this machine or into a private network; a public address is needed"):
        downloaded(f"http://{host}:{hostile.server_port}/0.png", STRANGERS)
    assert hostile.asked == []


def test_strangers_get_a_public_picture_also_after_a_redirect(public, hostile):
    assert opened(f"{public}/moved").size == Image.open(PICTURE).size
    assert [host for host, _ in hostile.asked] == [public.removeprefix("http://")] * 2


@pytest.mark.parametrize("limits", [STRANGERS, PERSON])
def test_redirect_from_a_public_address_into_a_private_network_is_not_followed(public, hostile, limits):
    with pytest.raises(InputError, match=f"{re.escape(public)}/inwards: leads to this machine"):
        downloaded(f"{public}/inwards", limits)
    assert [path for _, path in hostile.asked] == ["/inwards"]


def test_person_may_be_led_from_one_private_address_to_another(hostile):
    url = f"http://127.0.0.1:{hostile.server_port}/inwards"
    assert downloaded(url).read() == PICTURE.read_bytes()


def test_redirect_to_a_file_is_not_followed(public):
    with pytest.raises(InputError, match="leads to file:; http or https is needed"):
        downloaded(f"{public}/file", STRANGERS)


def test_endless_redirects_are_given_up(public):
    with pytest.raises(InputError, match="/loop: more than 5 redirects"):
        downloaded(f"{public}/loop", STRANGERS)


def test_server_that_sends_a_byte_now_and_then_is_given_up(public):
    with pytest.raises(InputError, match="/drip: not whole after 0 seconds"):
        downloaded(f"{public}/drip", Limits(seconds=0.3))


def test_headers_that_never_end_are_given_up():
    def drip(listening):
        connection, _ = listening.accept()
        with connection:
            try:
                for _ in range(100):
                    connection.sendall(b"H")
                    time.sleep(0.05)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=[listening], daemon=True).start()
        with pytest.raises(InputError, match="not whole after 0 seconds"):
            downloaded(f"http://127.0.0.1:{listening.getsockname()[1]}/", Limits(private_networks=True, seconds=0.3))


def test_name_whose_lookup_takes_long_is_given_up(monkeypatch):
    stopped = threading.Event()

    def slow(*_, **__):
        stopped.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    with pytest.raises(InputError, match="not whole after 0 seconds"):
        downloaded("http://slow.example/a.png", Limits(seconds=0.2))
    assert time.monotonic() - start < 5
    stopped.set()


@pytest.fixture
def certified(hostile, tmp_path, monkeypatch):
    """The port of that server behind TLS, with a certificate for localhost that is believed."""
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    subprocess.run(["openssl", "req", "-x509", *kind, *name, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    hostile.socket = context.wrap_socket(hostile.socket, server_side=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "certificate.pem"))
    return hostile.server_port


@needs_openssl
def test_https_address_is_fetched_from_the_address_that_its_name_has(certified):
    assert downloaded(f"https://localhost:{certified}/0.png").read() == PICTURE.read_bytes()


@needs_openssl
def test_https_server_with_a_certificate_for_another_name_is_not_believed(certified, hostile):
    with pytest.raises(InputError, match="can't be fetched"):
        downloaded(f"https://127.0.0.1:{certified}/0.png")
    assert hostile.asked == []


def test_person_is_served_by_the_environments_proxy_and_a_stranger_is_not(hostile, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{hostile.server_port}")
    monkeypatch.setenv("no_proxy", "")
    hostile.pictures = ["http://no.such.host.invalid/a.png"]
    assert downloaded("http://no.such.host.invalid/a.png").read() == PICTURE.read_bytes()
    with pytest.raises(InputError, match="can't be fetched"):
        downloaded("http://no.such.host.invalid/a.png", STRANGERS)
    assert len(hostile.asked) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_is_told_the_name_and_password_of_its_address(scheme, monkeypatch):
    told = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            told.append(self.headers["Proxy-Authorization"])
            self.send_error(502)

        do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.02], daemon=True).start()
        monkeypatch.setenv(f"{scheme}_proxy", f"http://us%40er:se%3Acret@127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(InputError, match="502"):
            downloaded(f"{scheme}://no.such.host.invalid/a.png")
        proxy.shutdown()
    assert told == ["Basic " + base64.b64encode(b"us@er:se:cret").decode()]


# Not by address


@pytest.mark.parametrize("form", [
    lambda text: text, lambda text: f"data:image/png;base64,{text}", lambda text: "\n".join((text[:76], text[76:])),
])  # fmt: skip
def test_picture_in_base64_is_opened(form):
    source = form(base64.b64encode(PICTURE.read_bytes()).decode())
    assert opened(source).tobytes() == Image.open(PICTURE).convert("RGB").tobytes()


def test_uploaded_file_is_opened():
    assert opened(PICTURE.read_bytes()).size == Image.open(PICTURE).size


@pytest.mark.parametrize(("source", "problem"), [
    (str(PICTURE), "neither base64 nor an address"),
    ("../../etc/passwd", "neither base64 nor an address"),
    ("file:///etc/passwd", "neither base64 nor an address"),
    ("/etc/passwd0", "isn't a picture"),  # base64 by chance: decoded, never opened
    ("data:image/png;base64", "has no comma"),
    ("data:,hello", "isn't a picture"),
    ("", "isn't a picture"),
])  # fmt: skip
def test_what_is_no_picture_is_told(source, problem):
    with pytest.raises(InputError, match=problem):
        opened(source)


@pytest.mark.parametrize(("limits", "problem"), [
    (Limits(most_bytes=100), r"more than 9\.54e-05 MiB"), (Limits(most_pixels=100), r"more than 0\.0001 million pixels"),
])  # fmt: skip
def test_picture_beyond_a_limit_is_told(limits, problem):
    with pytest.raises(InputError, match=problem):
        opened(PICTURE.read_bytes(), limits=limits)


def test_few_bytes_of_many_pixels_are_refused_before_they_take_memory():
    bomb = io.BytesIO()
    Image.new("L", (1500, 1500)).save(bomb, "PNG")
    with pytest.raises(InputError, match="more than 2 million pixels"):
        opened(bomb.getvalue(), limits=Limits(most_pixels=2_000_000))


def test_icon_that_holds_more_pixels_than_it_says_is_not_opened_for_strangers():
    inside, icon = io.BytesIO(), io.BytesIO()
    Image.new("L", (1500, 1500)).save(inside, "PNG")
    Image.new("L", (16, 16)).save(icon, "ICO", sizes=[(16, 16)])
    header = icon.getvalue()[:22]  # of one picture: its length at 14, its place at 18
    bomb = header[:14] + struct.pack("<II", len(inside.getvalue()), 22) + inside.getvalue()
    assert open_image(io.BytesIO(bomb)).size == (1500, 1500)
    with pytest.raises(
        InputError, match="isn't a picture; a picture \\(JPEG, PNG, WebP, GIF, BMP or AVIF\\) is needed"
    ):
        opened(bomb, limits=Limits(most_pixels=1000))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_picture_of_the_web_is_opened_for_strangers(kind):
    content = io.BytesIO()
    Image.new("RGB", (20, 10)).save(content, kind)
    assert opened(content.getvalue()).size == (20, 10)
