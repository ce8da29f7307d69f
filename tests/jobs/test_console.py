"""What commands print: names as they are, whatever is in them."""

import pytest
import typer

from facepipe.errors import StorageError
from jobs.console import ExitCode, exit_on_error, print_table


@pytest.mark.parametrize("name", ["[bold]x[/]", "[/]", "a [link=x] b", ":smile:", "\U00020bb7 \U0001f600", "O'Brien"])
def test_a_table_shows_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(f"of {name}", ("name",), [(name,)])
    out = capsys.readouterr().out
    assert out.count(name) == 2, out


def test_a_name_that_no_library_can_write_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, exit_on_error():
        "\udcff.parquet".encode()
    assert ended.value.exit_code == ExitCode.USAGE
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["no space left on device", "Disk quota exceeded"])
def test_a_full_disk_says_what_is_kept(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), exit_on_error():
        raise StorageError(f"cannot write 'g/faces': {words}")
    message = capsys.readouterr().err
    assert "Free some space; finished work is kept; run the same command again" in message
    with pytest.raises(typer.Exit), exit_on_error():
        raise StorageError("cannot write 'g/faces': permission denied")
    assert "Free some space" not in capsys.readouterr().err
