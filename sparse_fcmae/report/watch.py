"""A server of a run's page for the machine that it runs on, which reads the runs anew whenever somebody looks."""

import hashlib
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from sparse_fcmae.report.page import page_of, record_of
from sparse_fcmae.report.record import RunReader, as_json
from sparse_fcmae.runtime.errors import UserError

HERE = "127.0.0.1"
HOSTS = (HERE, "localhost")
PICTURES = "/pictures/"


def watch(readers: list[RunReader], port: int) -> None:
    """Serves the page of some runs until Ctrl-C. Raises UserError where the port is taken."""
    with Server(readers, port) as server, suppress(KeyboardInterrupt):
        print(f"http://{HERE}:{server.server_port} shows the page to this machine, until Ctrl-C", flush=True)
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Serves the page, what it shows as JSON, and its pictures. Nothing outside the machine reaches it.

    It answers under the names HOSTS alone, lest a site of another name that leads here reads the page (DNS rebinding).
    The port may be another one, as that of a tunnel is.
    """

    daemon_threads = True

    def __init__(self, readers: list[RunReader], port: int) -> None:
        try:
            super().__init__((HERE, port), Handler)
        except OSError as error:
            raise UserError(f"`port` {port} can't be served: {error.strerror}: choose another") from None
        self.pictures: dict[str, tuple[bytes, str]] = {}
        self.readers, self.lock = readers, Lock()
        for reader in readers:
            reader.keep_by(self._keep)

    def _keep(self, data: bytes, media_type: str) -> str:
        """The address of a picture, which is of these bytes for ever."""
        address = PICTURES + hashlib.sha256(data).hexdigest()
        self.pictures[address] = data, media_type
        return address

    def answer(self, address: str) -> tuple[HTTPStatus, bytes, str]:
        """What is at an address: the status, the body and its media type."""
        if address in self.pictures:
            return HTTPStatus.OK, *self.pictures[address]
        if address not in ("/", "/record.json"):
            return HTTPStatus.NOT_FOUND, b"no such page", "text/plain; charset=utf-8"
        try:
            with self.lock:
                record = record_of(self.readers, live=True)
                text = as_json(record)
                self.pictures = {place: picture for place, picture in self.pictures.items() if place in text}
        except (UserError, OSError) as error:  # the latter of a file that is deleted at this moment
            return HTTPStatus.GONE, str(error).encode(), "text/plain; charset=utf-8"
        if address == "/":
            return HTTPStatus.OK, page_of(record), "text/html; charset=utf-8"
        return HTTPStatus.OK, text.encode(), "application/json"


class Handler(BaseHTTPRequestHandler):
    """Answers requests for what a Server has."""

    server: Server

    def do_GET(self) -> None:
        if self.headers.get("Host", "").split(":")[0] not in HOSTS:
            status, body, media_type = HTTPStatus.FORBIDDEN, b"asked for under another name", "text/plain"
        else:
            status, body, media_type = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "max-age=86400" if self.path in self.server.pictures else "no-store")
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):  # of a page that was closed
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""
