"""The command line: one function a command, each in the module named after what it works on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Optional

import typer
from typer.core import TyperGroup

import facepipe
from facepipe.observe import logs
from facepipe.storage.redact import redact
from jobs import evaluate, models
from jobs.adopt import adopt
from jobs.clean import clean
from jobs.cluster import cluster
from jobs.dedup import dedup
from jobs.embed import embed
from jobs.erase import compact, erase
from jobs.gallery import export, info, verify
from jobs.index import index
from jobs.machine import doctor
from jobs.nightly import nightly
from jobs.search import search
from jobs.train import train


class _Commands(TyperGroup):
    """Complaints about the command line repeat words of it; a credential among them is left out."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _redacted():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _redacted():
            return super().invoke(ctx)


@contextmanager
def _redacted() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            error.message = redact(str(getattr(error, "message", "")))  # type: ignore[attr-defined]
        raise


LogFormat = Literal["text", "json"]

app = typer.Typer(
    name="facepipe",
    cls=_Commands,
    help="Large image corpora in, a searchable gallery of 128-D face embeddings out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    embed,
    adopt,
    index,
    search,
    dedup,
    cluster,
    clean,
    train,
    nightly,
    erase,
    compact,
    info,
    verify,
    export,
    doctor,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(models.app, name="models")


def _version(asked: bool) -> None:
    if asked:
        print(f"facepipe {facepipe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="Messages on stderr as text, or as JSON lines for machines.")
    ] = "text",
    log_names: Annotated[
        bool, typer.Option("--log-names", help="Let JSON logs name files and labels; they are hashed otherwise.")
    ] = False,
    metrics_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--metrics-file", metavar="PATH", help="Write the gallery's metrics for Prometheus.", show_default=False
        ),
    ] = None,
) -> None:
    """Large image corpora in, a searchable gallery of 128-D face embeddings out."""
    from pipelines.runtime.run_record import write_metrics_to

    logs.configure(log_format, show_names=log_names)
    logs.install_excepthook()
    write_metrics_to(metrics_file)


def main() -> None:
    """Entry point of the `facepipe` script."""
    app()


if __name__ == "__main__":
    main()
