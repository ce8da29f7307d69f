"""The `facepipe` script: it answers an interruption while the commands are still being imported."""

import signal
import sys


def main() -> None:
    """Import the command line and run it.

    Until it is imported, an interruption ends the process at once and without a traceback: nothing has begun.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from facepipe.provenance import set_command
    from jobs.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_command(["facepipe", *sys.argv[1:]])
    app()
