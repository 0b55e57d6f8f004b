"""Writes docs/cli.md, the reference of every command, from the commands themselves.

    python docs/generate_cli.py            writes it
    python docs/generate_cli.py --check    writes nothing; exits with 1 if it is out of date

Names, defaults and help come from the command objects, kinds of values from the annotations of the functions behind
them, so that the text depends neither on the terminal's width nor on the version of Typer.
"""

import inspect
import sys
import textwrap
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from ticketfind.cli import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 110
KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER", "Path": "PATH"}
HEAD = """\
# Commands

Written by `python docs/generate_cli.py`; do not edit. `ticketfind COMMAND --help` says the same on a terminal.
A *repeatable* option may be given several times. What the options of a search mean in full is in
[recipes.md](recipes.md), the objects that `--json` prints in [json.md](json.md), exit codes and how-tos in
[guide.md](guide.md). Global options stand before the command: `ticketfind --debug search`.
"""


def page() -> str:
    """The whole of docs/cli.md."""
    program = typer.main.get_command(app)
    parts = [HEAD, _section("ticketfind", program, "COMMAND")]
    parts += [_section(f"ticketfind {name}", command) for name, command in program.commands.items()]
    return "\n".join(parts)


def _section(title: str, command: Any, tail: str = "") -> str:
    annotations = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = [title, "[OPTIONS]", *(_shown(p) for p in arguments), *([tail] if tail else [])]
    lines = [f"## {title}", "", f"    {' '.join(usage)}", ""]
    for paragraph in command.help.split("\n\n"):
        lines += [*_wrapped(paragraph), ""]
    if arguments:
        lines += ["Arguments:", ""]
    for p in arguments:
        lines += _wrapped(f"`{_shown(p)}`: {_escaped(p.help)}", bullet=True)
    lines += ["", "Options:", ""] if arguments else ["Options:", ""]
    for p in options:
        lines += _wrapped(_option(p, annotations[p.name]), bullet=True)
    helped = ", ".join(f"`{flag}`" for flag in command.context_settings.get("help_option_names", ["-h", "--help"]))
    lines += _wrapped(f"{helped}: Show the command's help.", bullet=True)
    return "\n".join([*lines, ""])


def _shown(argument: Any) -> str:
    name = argument.metavar.strip("[]")
    return name if argument.required else f"[{name}]"


def _option(option: Any, annotation: Any) -> str:
    kind, limits, many = _kind(annotation)
    value = "" if option.is_flag else f" {option.metavar or kind}"
    flags = ", ".join(f"`{flag}{value}`" for flag in sorted(option.opts, key=len))
    notes = [*limits]
    if many and "repeatable" not in option.help:
        notes.append("repeatable")
    if option.default not in (None, False):
        notes.append(f"default: {option.default.value if isinstance(option.default, Enum) else option.default}")
    return f"{flags}: {_escaped(option.help)}" + (f" *{'; '.join(notes).capitalize()}.*" if notes else "")


def _kind(annotation: Any) -> tuple[str, list[str], bool]:
    """What a value is called, its limits, and whether the option is repeatable."""
    inner, *info = typing.get_args(annotation)
    limits = [f"at least {bound:g}" for bound in (getattr(i, "min", None) for i in info) if bound is not None]
    limits += [f"at most {bound:g}" for bound in (getattr(i, "max", None) for i in info) if bound is not None]
    inner = next((arm for arm in typing.get_args(inner) if arm is not type(None)), inner) if _is_union(inner) else inner
    many = typing.get_origin(inner) is list
    if many:
        (inner,) = typing.get_args(inner)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return "|".join(member.value for member in inner), limits, many
    return KINDS.get(inner.__name__, inner.__name__.upper()), limits, many


def _is_union(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("<", r"\<").replace("_", r"\_")


def _wrapped(text: str, *, bullet: bool = False) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent="- " if bullet else "",
        subsequent_indent="  " if bullet else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def main() -> None:
    """Write docs/cli.md, or with --check compare it."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is out of date; run: python docs/generate_cli.py")
    elif sys.argv[1:]:
        sys.exit(f"usage: python {Path(__file__).name} [--check]")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
