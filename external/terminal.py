"""Text from data, files or servers, made fit to be printed: it may hold anything."""

import io
import sys

LONGEST = 200  # characters of foreign text in one message


def count(n: int, noun: str) -> str:
    """1 row, 1,280 rows."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def printable(text: str, longest: int | None = None) -> str:
    """The text with control characters escaped (ESC as \\x1b, a newline as \\n), cut after `longest` characters.

    Raw, such characters clear the screen, set the window's title or turn the reading direction around.
    """
    cut = longest is not None and len(text) > longest
    shown = text[:longest] if cut else text
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return f"{shown}... ({len(text):,} characters)" if cut else shown


def set_up_terminal() -> None:
    """For a command's beginning: any letter can be printed, and Ctrl-C or `| head` end it without a traceback."""
    print_any_letter()
    sys.excepthook = say_how_it_ended


def say_how_it_ended(kind: type[BaseException], error: BaseException, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted. Its files are whole, and a command that resumes continues from them.", file=sys.stderr)
    elif not issubclass(kind, BrokenPipeError):  # nobody reads on: `| head` has its lines
        sys.__excepthook__(kind, error, trace)


def print_any_letter() -> None:
    """From here on a letter that the console's encoding lacks is printed as its number, and ends nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
