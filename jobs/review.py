"""The command `facepipe review`."""

import getpass
import os
import webbrowser
from typing import Annotated, Literal

import typer

from jobs.console import Terminated, exit_on_error
from jobs.options import GalleryPath

ReportName = Literal["clean", "cluster", "dedup"]


def review(
    gallery: GalleryPath,
    report: Annotated[ReportName, typer.Option(help="Report to work on.")] = "clean",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 for any free one.")] = 0,
    who: Annotated[
        str, typer.Option(help="Name that is saved with each decision.", show_default="your user name")
    ] = "",
    browser: Annotated[bool, typer.Option("--browser", help="Page opened in the default browser.")] = False,
) -> None:
    """Open a report as a page that saves each decision into the gallery.

    The page is the report's own, served from this machine to this machine only. It also shows the pictures that had no
    room in the file. The address holds a secret: whoever has it can decide. Ctrl-C ends the review; decisions are
    saved at once, and the next run of the command respects them.

    For example:

        facepipe review gallery/

        facepipe review gallery/ --report cluster --port 8080
    """
    with exit_on_error("decisions are saved at once; run the same command again to go on"):
        from facepipe.review import ReviewServer
        from pipelines.review import open_review

        session = open_review(gallery, report, who or _get_user_name())
        try:
            server = ReviewServer(session, port)
        except OSError as error:
            typer.echo(f"facepipe: cannot use the port {port}: {os.strerror(error.errno or 0).lower()}", err=True)
            raise typer.Exit(1) from None
        # The address is the result of the command: it goes to stdout, at once.
        print(server.address, flush=True)
        typer.echo("Open this address in a browser on this machine. Ctrl-C ends the review.", err=True)
        if browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever(poll_interval=0.2)
        except (KeyboardInterrupt, Terminated):
            # This is how a review ends.
            pass
        finally:
            server.server_close()
        typer.echo(f"{session.saved:,} decisions saved in this review", err=True)


def _get_user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""  # a container may have no names of users
