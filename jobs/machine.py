"""facepipe models, doctor"""

from jobs.console import FAILED, emit, fail, failures, table
from jobs.options import Json


def models(as_json: Json = False) -> None:
    """List the registered models: where their weights come from, under which licence, what they take.

    Example:

        facepipe models
    """
    with failures():
        from facepipe.models import CARDS

        columns = ("name", "role", "summary", "weights", "licence", "input", "sha256")
        rows = [{name: getattr(card, name) for name in columns} for card in CARDS.values()]
        shown = [[*list(row.values())[:-1], row["sha256"][:12]] for row in rows]
        emit({"models": rows}, as_json, lambda: table("models", columns, shown))


def doctor(as_json: Json = False) -> None:
    """Look at this machine: CPU and GPU, engines, weights, FAISS, object store. Exit code 1 if facepipe cannot run.

    Example:

        facepipe doctor
    """
    with failures():
        from facepipe.doctor import examine

        found = examine()
        rows = {"findings": [finding._asdict() for finding in found]}
        emit(rows, as_json, lambda: table("doctor", ("what", "state", "detail"), found))
        if any(finding.state == "broken" for finding in found):
            fail("something that facepipe needs is broken", FAILED)
