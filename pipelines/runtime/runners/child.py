"""The worker process of the local pool: `python -m pipelines.runtime.runners.child FD`."""

import os
import pickle
import sys
from multiprocessing.connection import Connection

from facepipe.errors import FacepipeError
from facepipe.gallery.commits.parts import PartRecord
from facepipe.observe import logs
from facepipe.sources.blocks import decode_block
from facepipe.storage.redact import redact
from pipelines.runtime.device_health import DeviceFaultError
from pipelines.runtime.worker import DEVICE_FAULT_CODE, BlockWorker


def main(fd: int) -> None:
    """Process blocks from the driver until it closes the connection or ends.

    Args:
        fd: file descriptor of the connection.
    """
    logs.install_excepthook()  # an error that is raised below is shown without credentials
    connection = Connection(fd)
    # A closed connection is the end of the work. An error of facepipe travels as it is, any other as text.
    try:
        _serve_blocks(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except DeviceFaultError:
        # A context of CUDA that has failed may hang at the end of the interpreter.
        os._exit(DEVICE_FAULT_CODE)
    except FacepipeError as error:
        connection.send_bytes(pickle.dumps(("failed", error)))
    except Exception as error:
        connection.send_bytes(pickle.dumps(("failed", redact(f"{type(error).__name__}: {error}"))))
        raise


def _serve_blocks(connection: Connection) -> None:
    """Receive the job, then blocks, and send a record for each block."""
    worker = BlockWorker(pickle.loads(connection.recv_bytes()))
    worker.setup()
    connection.send_bytes(pickle.dumps(("ready", None)))
    while True:
        # The driver sends the next block only after this record, so that one block is in work at a time.
        record = worker(decode_block(pickle.loads(connection.recv_bytes())))
        assert isinstance(record, PartRecord)
        connection.send_bytes(pickle.dumps(("record", record.to_json())))


if __name__ == "__main__":
    main(int(sys.argv[1]))
