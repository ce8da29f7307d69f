"""`--help-settings` and the choices of options: they say what the configs say."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field
from typer.testing import CliRunner

from facepipe.adoption.tables import Names
from facepipe.curation.duplicates.rule import Keep, Kind
from facepipe.index.decide import DecisionRule
from facepipe.sources.identity import IdentityRule
from jobs import options
from jobs.cli import app
from jobs.reference import list_commands
from jobs.settings import CONFIG_CLASSES, describe_type, format_section, list_sections, load_config_classes
from pipelines.embed.config import Runner


@dataclass(frozen=True)
class Inner:
    """Settings of a part.

    More about it.

    Attributes:
        size: Longest side,
            in pixels.
        name: Its name.
    """

    size: Annotated[int, Field(ge=1)] = 640
    name: str | None = None


@dataclass(frozen=True)
class Base:
    """Settings that two configs share.

    Attributes:
        mode: What to do.
    """

    mode: Literal["fast", "exact"] = "fast"


@dataclass(frozen=True)
class Whole(Base):
    """All settings.

    Attributes:
        part: A part.
        many: Parts.
    """

    part: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()


def test_sections_of_a_config() -> None:
    texts = [format_section(section) for section in list_sections(Whole)]
    assert texts[0] == '  mode = "fast"    (fast | exact)\n      What to do.\n'
    assert texts[1] == (
        "[part]\nSettings of a part.\n"
        "  part.size = 640    (integer >= 1)\n      Longest side, in pixels.\n"
        "  part.name = not set    (text)\n      Its name.\n"
    )
    assert texts[2].startswith("[[many]]\n")


@pytest.mark.parametrize(
    ("hint", "description"),
    [
        (bool, "true | false"),
        (float | None, "number"),
        (tuple[str, ...], "list of text"),
        (Annotated[float, Field(gt=0, le=1)] | None, "number > 0 and <= 1"),
        (Literal["a"] | tuple[str, ...], "a | list of text"),
    ],
)
def test_descriptions_of_types(hint: Any, description: str) -> None:
    assert describe_type(hint) == description


def test_every_command_with_settings_lists_them() -> None:
    with_settings = {name for name, command in list_commands() if "settings" in {p.name for p in command.params}}
    assert with_settings == set(CONFIG_CLASSES)
    for name in with_settings:
        result = CliRunner().invoke(app, [name, "--help-settings"])
        assert (result.exit_code, result.stderr) == (0, "")
        for config in load_config_classes(name):
            for section in list_sections(config):
                for setting in section.settings:
                    assert f"  {setting.name} = " in result.stdout
                    assert setting.meaning, f"{config.__name__} does not say what {setting.name} means"


@pytest.mark.parametrize(
    ("choices", "config_choices"),
    [
        (options.IdentityRule, IdentityRule),
        (options.Runner, Runner),
        (options.Keep, Keep),
        (options.Drop, Kind),
        (options.Decide, DecisionRule),
        (options.NameRole, Names),
    ],
)
def test_options_have_the_choices_of_the_configs(choices: Any, config_choices: Any) -> None:
    assert set(get_args(choices)) == set(get_args(config_choices))


def test_choices_are_listed_in_help_and_errors() -> None:
    result = CliRunner().invoke(app, ["dedup", "gallery", "--keep", "smallest"])
    assert result.exit_code == 2
    assert all(choice in result.stderr for choice in get_args(options.Keep))
