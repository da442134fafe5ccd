"""Flags and errors: one dataclass per script becomes its command line; bad input is one sentence and exit code 2."""

import argparse
import dataclasses
import sys
import types
import typing


class InputError(ValueError):
    """Bad input. The message is one sentence for the user: which file, row or flag, and the fix. Exit code 2."""


def first_line(error: Exception) -> str:
    """The first non-empty line of a message, for one-sentence errors."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def arg(default, help_text: str, choices=None):
    """A dataclass field with its `--help` text. A bool becomes --name / --no-name; default None means not set."""
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


def parse(settings_class, doc: str, argv=None):
    """Command line -> an instance of the dataclass. `doc` is the script's docstring. Unknown flag: exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        many = typing.get_origin(kind) is list
        if isinstance(kind, types.UnionType) or many:  # "str | None" -> str, list[str] -> str
            kind = typing.get_args(kind)[0]
        text = field.metadata["help"].replace("%", "%%") + (
            "" if field.default is None else f" (default {field.default})"
        )
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            more = {"nargs": "+"} if many else {}
            choices = field.metadata["choices"]
            parser.add_argument(flag, type=kind, default=field.default, choices=choices, help=text, **more)
    return settings_class(**vars(parser.parse_args(argv)))


def cli(main) -> None:
    """Runs a script's main(). Bad input: one sentence on stderr, exit code 2. Ctrl-C: exit code 130. Bugs: a
    traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
