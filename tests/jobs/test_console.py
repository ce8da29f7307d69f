"""What commands print: names as they are, whatever is in them."""

import pytest

from jobs.console import ExitCode, exit_on_error, print_table


@pytest.mark.parametrize("name", ["[bold]x[/]", "[/]", "a [link=x] b", ":smile:", "\U00020bb7 \U0001f600", "O'Brien"])
def test_a_table_shows_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(f"of {name}", ("name",), [(name,)])
    out = capsys.readouterr().out
    assert out.count(name) == 2, out


def test_a_name_that_no_library_can_write_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit) as ended, exit_on_error():
        "\udcff.parquet".encode()
    assert ended.value.exit_code == ExitCode.USAGE
    assert "is not UTF-8" in capsys.readouterr().err
