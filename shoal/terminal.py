"""What a person sees: sizes and times, tables, progress, colours, and plain lines for pipes.

Every command draws through here, so that all of them honour NO_COLOR, never send control codes into a pipe or
a log, and never cut a value in a pipe. It knows nothing of meshes and models.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

SILENT_S = 1.0
BAR_CELLS = 28
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes for people: `6.9 MiB`."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds for people: `87 ms`, `2.4 s`, `3 min 5 s`, `2 h`, `7 days`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 and seconds != int(seconds) else f"{seconds:.0f} s"
    whole = round(seconds)
    steps = ((86400, "days", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    large, word, small, small_word = next(step for step in steps if whole >= step[0])
    count, rest = whole // large, whole % large // small
    head = f"{count} {word}".replace("1 days", "1 day") if count == 1 else f"{count} {word}"
    return f"{head} {rest} {small_word}" if rest else head


def console(*, stderr: bool = False) -> Console:
    """A rich console on stdout or stderr. rich itself honours NO_COLOR and the absence of a terminal."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False, emoji=False, markup=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream and it can move its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False


def note(text: str) -> None:
    """One line for the person, beside the command's own output."""
    print(text, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print a table. Cells are text or rich Text. In a pipe: aligned columns, full width, nothing cut."""
    rows = list(rows)
    if not is_terminal(sys.stdout):
        _plain_table(columns, rows, right)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, border_style="dim")
    for name in columns:
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console().print(drawn)


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str]) -> None:
    cells = [[name.upper() for name in columns], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        line = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(line).rstrip())


class Progress(Protocol):
    """Something that shows how far one piece of work has come."""

    def __call__(self, label: str, fraction: float | None, detail: str = "") -> None:
        """`fraction` is 0 to 1, or None where the end is not known."""


@contextmanager
def progress(*, quiet: bool = False, transient: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr; nothing when quiet. A transient one is wiped away at the end.

    Where stderr is no terminal: one line for each label that takes longer than a second.
    """
    if quiet:
        yield lambda label, fraction, detail="": None
    elif not is_terminal(sys.stderr):
        yield _line_progress()
    else:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        screen = console(stderr=True)
        bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR_CELLS),
            TextColumn("{task.fields[detail]}", markup=False, style="dim"),
            TimeElapsedColumn(),
            console=screen,
            transient=transient,
        )
        with bars:
            yield _bar_progress(bars, screen.width - BAR_CELLS - 14)


def _line_progress(clock_s: Callable[[], float] = time.monotonic) -> Callable[..., None]:
    began: dict[str, float] = {}
    told: set[str] = set()

    def show(label: str, fraction: float | None, detail: str = "") -> None:
        now_s = clock_s()
        if now_s - began.setdefault(label, now_s) >= SILENT_S and label not in told:
            told.add(label)
            note(f"{label}{': ' + detail if detail else ''}")

    return show


def _bar_progress(bars: Any, words_cells: int) -> Callable[..., None]:
    """`words_cells`: how many columns of a line label and detail may take together."""
    tasks: dict[str, Any] = {}

    def show(label: str, fraction: float | None, detail: str = "") -> None:
        room = max(words_cells - max(map(len, (*tasks, label))), 0)
        detail = detail if len(detail) <= room else detail[: max(room - 1, 0)] + "…"
        if label not in tasks:
            for task in tasks.values():
                bars.update(task, total=1.0, completed=1.0)
            tasks[label] = bars.add_task(label, total=None, detail="")
        total = None if fraction is None else 1.0
        bars.update(tasks[label], total=total, completed=fraction or 0.0, detail=detail)

    return show


def safe_for_terminal(text: str) -> str:
    """Generated text without the control characters that could steer a terminal; newlines and tabs stay."""
    return "".join(c for c in text if (c >= " " and not "\x7f" <= c <= "\x9f") or c in "\n\t")


def aim(options: Any) -> str:
    """The flags that made a command ask the daemon it asked, to stand behind the next command; mostly ""."""
    for flag, value in (("--api", options.api), ("--data-dir", options.data_dir)):
        if value is not None:
            return f" {flag} {shlex.quote(value)}"
    return ""


def program() -> str:
    """How the person can call this program again: `shoal`, or whatever reaches this very installation."""
    import shutil
    import sysconfig

    script = Path(sysconfig.get_path("scripts")) / ("shoal.exe" if os.name == "nt" else "shoal")
    found = shutil.which("shoal")
    if found and Path(found).resolve() == script.resolve():
        return "shoal"
    if script.exists():
        with_cwd = os.path.relpath(script)
        return shlex.quote(with_cwd if not with_cwd.startswith("..") else str(script))
    return f"{shlex.quote(sys.executable)} -m shoal"
