"""facepipe doctor"""

from jobs.console import FAILED, emit, fail, failures, table
from jobs.options import Json


def doctor(as_json: Json = False) -> None:
    """Look at this machine: CPU and GPU, engines, weights, FAISS, object store. Exit code 1 if facepipe cannot run.

    Example:

        facepipe doctor
    """
    with failures():
        from facepipe.observe.doctor import examine

        found = examine()
        rows = {"findings": [finding._asdict() for finding in found]}
        emit(rows, as_json, lambda: table("doctor", ("what", "state", "detail"), found))
        if any(finding.state == "broken" for finding in found):
            fail("something that facepipe needs is broken", FAILED)
