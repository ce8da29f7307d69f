"""The command line: one function per command, in the module named after what it works on."""

import inspect
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

import facepipe
from facepipe.observe import logs
from facepipe.provenance import set_command
from facepipe.storage.redact import redact
from jobs import evaluate, models
from jobs.adopt import adopt
from jobs.bulk_search import bulk_search
from jobs.clean import clean
from jobs.clean_dataset import clean_dataset
from jobs.cluster import cluster
from jobs.compact import compact
from jobs.console import exit_on_error
from jobs.dataset import write_dataset
from jobs.decisions import apply, decisions
from jobs.dedup import dedup
from jobs.doctor import doctor
from jobs.embed import embed
from jobs.erase import erase
from jobs.finish import finish
from jobs.gallery import export, info, verify
from jobs.identify import identify
from jobs.index import index
from jobs.migrate import migrate
from jobs.nightly import nightly
from jobs.options import LogFormat
from jobs.review import review
from jobs.search import search
from jobs.train import train


class _RedactedGroup(TyperGroup):
    """A group whose usage errors, which repeat words of the command line, contain no credentials."""

    # Errors arise while the arguments are parsed and while the command runs, so both calls are wrapped.
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _redact_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _redact_errors():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands in groups, each with the whole first sentence of its help."""
        names = list(self.list_commands(ctx))
        groups = [(title, [name for name in group if name in names]) for title, group in COMMAND_GROUPS.items()]
        grouped = {name for _, group in groups for name in group}
        groups.append(("Other commands", [name for name in names if name not in grouped]))
        for title, group in groups:
            rows = [(name, _get_first_sentence(self.commands[name])) for name in group]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _get_first_sentence(command: Any) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


# Groups of commands in `--help`; a command that is in none comes last.
COMMAND_GROUPS = {
    "Fill a gallery": ["embed", "adopt", "index"],
    "Find people": ["search", "identify"],
    "Clean up": ["dedup", "cluster", "clean", "review", "apply", "decisions", "finish"],
    "Jobs from a TOML file": ["nightly", "clean-dataset", "bulk-search", "train"],
    "Look after a gallery": ["info", "verify", "compact", "erase", "export", "migrate", "doctor"],
    "Models and figures": ["models", "evaluate"],
}


# Longest text of arguments that a message repeats: a shell may have put thousands of files in the place of a pattern.
_MAX_CHARACTERS = 200
_PATTERN_HINT = "A pattern such as 'photos/*.jpg' needs quotes, or the shell puts the names of all files in its place."


@contextmanager
def _redact_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Usage errors have this method; any other error passes unchanged.
        if hasattr(error, "format_message"):
            message = redact(str(getattr(error, "message", "")))
            if message.startswith("Got unexpected extra argument"):
                message = f"{message[:_MAX_CHARACTERS]}. {_PATTERN_HINT}"
            error.message = message  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="facepipe",
    cls=_RedactedGroup,
    help="Large image corpora in, a searchable gallery of 128-D face embeddings out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # wraps paragraphs as they are written, and keeps the examples apart
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Commands in the order in which `--help` lists them.
COMMANDS: dict[str, Callable[..., None]] = {
    "embed": embed,
    "adopt": adopt,
    "index": index,
    "search": search,
    "identify": identify,
    "dedup": dedup,
    "cluster": cluster,
    "clean": clean,
    "apply": apply,
    "decisions": decisions,
    "review": review,
    "finish": finish,
    "write-dataset": write_dataset,
    "train": train,
    "nightly": nightly,
    "clean-dataset": clean_dataset,
    "bulk-search": bulk_search,
    "migrate": migrate,
    "erase": erase,
    "compact": compact,
    "info": info,
    "verify": verify,
    "export": export,
    "doctor": doctor,
}
# Commands with subcommands come last.
for name, command in COMMANDS.items():
    app.command(name=name)(command)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(models.app, name="models")


def _print_version(value: bool) -> None:
    if value:
        print(f"facepipe {facepipe.__version__}")
        raise typer.Exit


@app.callback()
def set_up(
    version: Annotated[
        bool, typer.Option("--version", help="Version of facepipe.", callback=_print_version, is_eager=True)
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="Format of messages on stderr; JSON lines are for programs.")
    ] = "text",
    log_names: Annotated[
        bool, typer.Option("--log-names", help="File names and labels in JSON logs, which are hashed otherwise.")
    ] = False,
    metrics_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--metrics-file", metavar="PATH", help="File for the gallery's metrics, for Prometheus.", show_default=False
        ),
    ] = None,
    openlineage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--openlineage",
            metavar="URL-OR-FILE",
            envvar="FACEPIPE_OPENLINEAGE",
            help="Receiver of OpenLineage events about each run, or file to append them to.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Set up logs and metrics before any command."""
    from pipelines.runtime.run_record import set_lineage_target, set_metrics_file

    # Names that are not UTF-8 are printed as they are.
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    logs.configure_logs(log_format, show_names=log_names)
    logs.install_excepthook()
    set_metrics_file(metrics_file)
    with exit_on_error():
        set_lineage_target(openlineage or None)


def main() -> None:
    """Run the `facepipe` script."""
    set_command(["facepipe", *sys.argv[1:]])
    app()


if __name__ == "__main__":
    main()
