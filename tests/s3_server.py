"""An S3 server in memory, in a process of its own."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

# The port is chosen by the system and printed, so that two servers never want the same one.
# Moto compares a tag and writes in two steps: a lock makes conditional writes what they are in a real store.
_S3_SERVER = """
import threading
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
application = DomainDispatcherApplication(create_backend_app)
lock = threading.Lock()


def write_one_by_one(environ, start_response):
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        return application(environ, start_response)
    with lock:
        return [b"".join(application(environ, start_response))]


server = make_server("127.0.0.1", 0, write_one_by_one, threaded=True, request_handler=MotoRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def serve_s3() -> Iterator[str]:
    """Serve an empty store, and yield its endpoint."""
    command = [sys.executable, "-c", _S3_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def create_bucket(endpoint: str, name: str) -> None:
    """Create an empty bucket."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT"), timeout=60).close()
