"""The HTTP server of a review: this machine only, one token, four routes.

    GET  /TOKEN/            the page, `?part=N` for its later parts
    GET  /TOKEN/thumb/ID    the picture of a face
    POST /TOKEN/decide      saves an act
    POST /TOKEN/undo        takes it back

Other pages in the same browser can send requests here, and their hosts can be made to resolve to this machine (DNS
rebinding). So a request must name this server as its host, a POST must come from the page itself, and all need the
token, which no other page can read.
"""

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from facepipe.errors import FacepipeError
from facepipe.reports.html import build_served_policy
from facepipe.review.session import ActError, ReviewSession

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
_MAX_BODY = 4 << 20  # bytes of a POST
_TIMEOUT_S = 30.0


class ReviewServer(ThreadingHTTPServer):
    """Serves one session until `shutdown`."""

    daemon_threads = True

    def __init__(self, session: ReviewSession, port: int = 0, token: str | None = None):
        """Bind to the loopback address.

        Args:
            session: what is served.
            port: the port; 0 for any free one.
            token: the secret part of the address; a new one by default.

        Raises:
            OSError: the port is in use.
        """
        self.session = session
        self.token = token or secrets.token_urlsafe(32)
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """The address of the page, with its token."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about connections that break: the browser opens and closes them as it likes."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ReviewServer
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Answer with the page or a picture."""
        route = self._find_route()
        if route is None:
            return
        path, query = route
        try:
            if path == "":
                part = self._parse_part(query)
                self._send_page(self.server.session.render(part))
            elif path.startswith("thumb/"):
                self._send_thumb(path.removeprefix("thumb/"))
            else:
                self._refuse(HTTPStatus.NOT_FOUND)
        except FacepipeError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def do_POST(self) -> None:
        """Save an act, or take one back."""
        route = self._find_route()
        if route is None:
            return
        path = route[0]
        if path not in ("decide", "undo"):
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        if not self._is_from_page():
            self._refuse(HTTPStatus.FORBIDDEN, "only the page itself may send this")
            return
        content = self._read_json()
        if content is None:
            return
        try:
            session = self.server.session
            if path == "decide":
                answer = session.decide(content)
            else:
                session.undo(content.get("id") if isinstance(content, dict) else None)
                answer = {}
        except ActError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
        except FacepipeError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())

    # ---- checks

    def _find_route(self) -> tuple[str, str] | None:
        """Return the path behind the token, and the query; None if the request was refused."""
        if not self._has_own_host():
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to its own address only")
            return None
        try:
            parts = urlsplit(self.path)
        except ValueError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        token, slash, path = parts.path.removeprefix("/").partition("/")
        # Bytes are compared in constant time, so that the time tells nothing about the token.
        is_right = hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self.server.token.encode())
        if parts.scheme or parts.netloc or not is_right or not slash:
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return path, parts.query

    def _has_own_host(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and hosts[0].lower() in self._own_hosts()

    def _own_hosts(self) -> list[str]:
        return [f"{name}:{self.server.server_port}" for name in _NAMES]

    def _is_from_page(self) -> bool:
        """Return whether the browser says that the page itself sent the request."""
        host = self.headers["Host"].lower()
        origins = self.headers.get_all("Origin", [])
        site = self.headers.get("Sec-Fetch-Site", "same-origin")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return origins == [f"http://{host}"] and site == "same-origin" and kind == "application/json"

    def _read_json(self) -> Any:
        """Read the body; None if the request was refused."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdecimal()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED)
            return None
        if len(length) > 9 or int(length) > _MAX_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_MAX_BODY:,} bytes")
            return None
        body = self.rfile.read(int(length))
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if content is None or len(body) != int(length):
            self._refuse(HTTPStatus.BAD_REQUEST, "the body is not JSON")
            return None
        return content

    def _parse_part(self, query: str) -> int:
        """Return the number of the requested part, from 0."""
        values = parse_qs(query).get("part", ["0"])
        is_number = values[0].isascii() and values[0].isdecimal() and len(values[0]) < 9
        last = self.server.session.page.part_count - 1
        return min(int(values[0]), last) if is_number else 0

    # ---- answers

    def _send_page(self, text: str) -> None:
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", text.encode("utf-8", "replace"))

    def _send_thumb(self, text: str) -> None:
        is_id = text.isascii() and text.isdecimal() and len(text) <= 19
        picture = self.server.session.page.read_thumb(int(text)) if is_id and int(text) < 1 << 63 else None
        if picture is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send(HTTPStatus.OK, "image/jpeg", picture)

    def _refuse(self, status: HTTPStatus, text: str = "") -> None:
        # What is left of a request is not read: the connection ends.
        self.close_connection = True
        self._send(status, "text/plain; charset=utf-8", (text or status.phrase).encode("utf-8", "replace"))

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{build_served_policy()}; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the base class cannot parse, or a method that there is not, in plain text."""
        self._refuse(HTTPStatus(code))

    def version_string(self) -> str:
        """Tell nothing about versions."""
        return "facepipe"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the name that the base class has)
        """Log nothing: addresses hold the token."""
