"""The command `facepipe doctor`."""

from typing import Annotated

import typer

from jobs.console import ExitCode, exit_on_error, fail, print_result, print_table
from jobs.options import Json


def doctor(
    gallery: Annotated[
        str, typer.Argument(metavar="[GALLERY]", help="Gallery, or where one will be.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """Check what facepipe needs of this machine, and of the disk or store of a gallery.

    Checked are CPU and GPU, engines, weights, FAISS and the object store. With GALLERY, a small file or object is
    written there and deleted: a store must compare tags, and a file system must have locks that other machines see. The
    exit code is 1 if facepipe cannot run, or if erased rows are on disk longer than they may be.

    For example:

        facepipe doctor
        facepipe doctor s3://faces/gallery
    """
    with exit_on_error():
        from facepipe.erasure.purges import describe_overdue
        from facepipe.observe.doctor import Finding, examine_machine

        findings = examine_machine(gallery)
        if gallery:
            findings += [Finding("hidden rows", "broken", problem) for problem in describe_overdue(gallery)]
        print_result(
            {"findings": [finding._asdict() for finding in findings]},
            as_json=as_json,
            print_text=lambda: print_table("doctor", ("what", "state", "detail"), findings),
        )
        if any(finding.state == "broken" for finding in findings):
            fail("something that facepipe needs is broken", ExitCode.FAILED)
