"""The command `facepipe doctor`."""

from jobs.console import ExitCode, exit_on_error, fail, print_result, print_table
from jobs.options import Json


def doctor(as_json: Json = False) -> None:
    """Check what facepipe needs of this machine.

    Checked are CPU and GPU, engines, weights, FAISS and the object store. The exit code is 1 if facepipe cannot run.

    For example:

        facepipe doctor
    """
    with exit_on_error():
        from facepipe.observe.doctor import examine_machine

        findings = examine_machine()
        print_result(
            {"findings": [finding._asdict() for finding in findings]},
            as_json=as_json,
            print_text=lambda: print_table("doctor", ("what", "state", "detail"), findings),
        )
        if any(finding.state == "broken" for finding in findings):
            fail("something that facepipe needs is broken", ExitCode.FAILED)
