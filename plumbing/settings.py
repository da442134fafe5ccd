"""Flags and errors: one dataclass per script becomes its command line; bad input is one sentence and exit code 2."""

import argparse
import dataclasses
import math
import sys
import types
import typing


class InputError(ValueError):
    """Bad input. The message is one sentence for the user: which file, row or flag, and the fix. Exit code 2."""


def first_line(error: Exception) -> str:
    """The first non-empty line of a message, for one-sentence errors."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def arg(default, help_text: str, choices=None, above=None, at_least=None, at_most=None):
    """A dataclass field with its `--help` text. A bool becomes --name / --no-name; default None means not set.

    above, at_least, at_most: the range of a number, or of each number of a list; `parse` refuses what lies outside.
    """
    bounds = {"above": above, "at least": at_least, "at most": at_most}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices, "bounds": bounds})


def parse(settings_class, doc: str, argv=None):
    """Command line -> an instance of the dataclass. `doc` is the script's docstring.

    An unknown flag ends with exit code 2; a number out of its range is an InputError.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        kind = hints[field.name]
        many = typing.get_origin(kind) is list
        if isinstance(kind, types.UnionType) or many:  # "str | None" -> str, list[str] -> str
            kind = typing.get_args(kind)[0]
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" (default {field.default})"
        if kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif many:
            more = {"type": kind, "choices": field.metadata["choices"], "nargs": "+"}
        else:
            more = {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument(flag_of(field.name), default=field.default, help=text, **more)
    settings = settings_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(settings_class):
        check_range(field, getattr(settings, field.name))
    return settings


def flag_of(name: str) -> str:
    """batch_pairs -> --batch-pairs"""
    return "--" + name.replace("_", "-")


def check_range(field: dataclasses.Field, value) -> None:
    """InputError unless every number of the flag is finite and within the bounds that `arg` gave it."""
    values = value if isinstance(value, (list, tuple)) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        bounds = field.metadata["bounds"]
        fits = math.isfinite(number)
        fits = fits and number > bounds.get("above", -math.inf) and number >= bounds.get("at least", -math.inf)
        if not (fits and number <= bounds.get("at most", math.inf)):
            wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
            raise InputError(f"{flag_of(field.name)} {number}: must be {wanted}, and finite.")


def cli(main) -> None:
    """Runs a script's main(). Bad input: one sentence, exit code 2. Ctrl-C: exit code 130. A bug: a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
