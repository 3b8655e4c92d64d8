"""Shared by all scripts: argument types, progress, and one-line errors."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
USER_ERROR = 2
INTERRUPTED = 130
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Makes PyTorch allocate pages of 2 MB: a step of three students on a CPU took a fifth less time.
PyTorch reads it at its first large allocation; a value that the user has set is kept."""
WORKERS_ERROR = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")
"""First line of PyTorch's message for an error in a data worker; its last line is the error."""
QUIET_SECONDS = 30.0
"""Seconds between two progress lines if there is no terminal."""
LARGEST_COUNT = (1 << 32) - 1
"""Largest whole number of a flag: the largest seed that NumPy takes."""
LARGEST = 1e12
"""Largest other number of a flag: its square is well within float32, which ends at 3e38."""
WORKERS_A_CPU = 4
LAYOUT_HELP = (
    "how proteins are written for the model: protgpt2, plain, spaced, progen, zymctrl, or a "
    "template such as '{begin}{tag}<start>{residues}{end}' (default: found at loading)"
)
SHOWN = 40
"""Characters of a wrong value that a message repeats."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag and keeps the line breaks of a description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Identity, not equality: 0 equals False, but is a default to show.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Joined(argparse.Action):
    """Keeps the values of a flag that takes several as one text with commas between them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Store the values."""
        setattr(namespace, self.dest, ",".join(values))


def add_data_flags(add: Callable[..., Any], help: str, **options: Any) -> None:
    """Add ``--data``, which takes files, patterns, a directory or a hub id, and what reads it."""
    add("--data", nargs="+", action=Joined, help=help, **options)
    add("--sequence_column", help="column of the residues in a table (default: a usual name)")


def take_defaults(parser: argparse.ArgumentParser, *settings: Any, but: Sequence[str] = ()) -> None:
    """Let flags ``but`` some default to settings of the same names, which are written once."""
    values = {name: value for each in settings for name, value in vars(each).items()}
    flags = {action.dest for action in parser._actions} - {*but}
    parser.set_defaults(**{name: values[name] for name in flags & values.keys()})


def say(line: str = "") -> None:
    """Print one line and flush, so that it appears at once in a file too."""
    print(line, flush=True)


def unheard(line: str = "") -> None:
    """Print nothing, where :func:`say` would."""


def run_script(
    run: Callable[[argparse.Namespace], Any],
    build_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the arguments, run, and return the exit status.

    ``ValueError`` and ``OSError`` of ``run`` are errors of the user. Arguments are those of the
    process where ``argv`` is None.

    Returns:
        0; 2 after a user's error, printed in one line, or if a package is missing; 130 after
        Ctrl-C. ``SystemExit`` passes through. With ``DISTILL_TRACEBACK`` set in the environment,
        errors are raised with their traceback.
    """
    prog = os.path.basename(sys.argv[0])
    try:
        parser = build_parser()
        prog = parser.prog
        parser.error = lambda message: parser.exit(  # type: ignore[method-assign]
            USER_ERROR, f"{prog}: error: {message} (--help shows all flags)\n"
        )
        args = parser.parse_args(argv)
        os.environ.setdefault(HUGE_PAGES, "1")
        run(args)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if os.environ.get("DISTILL_TRACEBACK") or package in ("", "src", "scripts", "tools"):
            raise
        print(
            f"{prog}: error: the package {package} is not installed for {sys.executable}: "
            "source .venv/bin/activate, or pip install -r requirements.txt",
            file=sys.stderr,
        )
        return USER_ERROR
    except (ValueError, OSError) as error:
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    return 0


def quiet_libraries() -> None:
    """Switch off transformers' progress bars and notices; errors are still shown."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without terminal control characters."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return printable(f"{name}{error.strerror}")
    text = str(error)
    if WORKERS_ERROR.match(text):
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return printable(" ".join(text.split())) or type(error).__name__


def printable(text: str) -> str:
    """Return a text with unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """Return the first of some items, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def positive_int(text: str) -> int:
    """Argparse type: a whole number of at least 1."""
    value = natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text[:SHOWN]}")
    return value


def natural(text: str) -> int:
    """Argparse type: a whole number of at least 0."""
    value = _number(text, int, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text[:SHOWN]}")
    if value > LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST_COUNT}, got {text[:SHOWN]}")
    return value


def workers(text: str) -> int:
    """Argparse type: a number of data workers, at most four for each CPU."""
    value, most = natural(text), WORKERS_A_CPU * (os.cpu_count() or 1)
    if value > most:
        raise argparse.ArgumentTypeError(
            f"must be at most {most}, {WORKERS_A_CPU} for each CPU of this machine, got {value}"
        )
    return value


def folder(text: str) -> str:
    """Argparse type: a directory, which may be missing."""
    if os.path.lexists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"must be a directory, and {text} is none")
    return text


def positive_float(text: str) -> float:
    """Argparse type: a number above 0 and at most :data:`LARGEST`."""
    value = _number(text, float, "a number")
    if not 0 < value <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"must be above 0 and at most {LARGEST:g}, got {text[:SHOWN]}"
        )
    return value


def share(text: str) -> float:
    """Argparse type: a share in (0, 1]."""
    value = _number(text, float, "a number")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text[:SHOWN]}")
    return value


def _number(text: str, kind: type, description: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {description}, got {text[:SHOWN]!r}") from None


def progress(
    items: Iterable[Item],
    total: int | None = None,
    description: str | Callable[[], str] = "",
    unit: str = "it",
) -> Iterator[Item]:
    """Yield items and show on standard error how many are done, the rate and the remaining time.

    On a terminal this is a bar; elsewhere one line is printed every 30 seconds. Of several
    processes the first shows its own.

    Args:
        items: any iterable.
        total: number of items; None: unknown, or ``len(items)``.
        description: what is being done; a function, where that changes.
        unit: name of the items.
    """
    from src.common.processes import is_first

    if not is_first():
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]

    def now_said() -> str:
        return description if isinstance(description, str) else description()

    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", leave=False) as bar:
            for item in items:
                bar.set_description_str(now_said(), refresh=False)
                bar.update()
                yield item
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= QUIET_SECONDS:
            last = now
            rate = done / (now - started)
            left = f", {duration((total - done) / rate)} left" if total else ""
            of = f" of {total:,}" if total else ""
            pace = f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
            print(
                f"{now_said()}: {done:,}{of} {unit}, {pace}{left}",
                file=sys.stderr,
                flush=True,
            )


def duration(seconds: float) -> str:
    """Return a duration as text: ``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number_of_bytes: float) -> str:
    """Return a size as text: ``3.4 MB``, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number_of_bytes < 1000:
            return (
                f"{number_of_bytes:.0f} {unit}" if unit == "B" else f"{number_of_bytes:.1f} {unit}"
            )
        number_of_bytes /= 1000
    return f"{number_of_bytes:.1f} TB"
