"""Progress for people who wait: a bar with the time left on standard error, never on standard output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradwise.reporting import numbers

EVERY = 15.0  # seconds between lines where standard error is a file or a pipe


@contextmanager
def bar(what: str, *, every: float = EVERY) -> Iterator[Callable[..., None]]:
    """A function to be told (done, total, label, ...) after every piece of work; ``what`` names the pieces.

    On a terminal it moves a bar; elsewhere (a log) it writes a line now and then. Labels are shown as they are: square
    brackets in them are no markup.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, what, every)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[label]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None, label="")

        def told(done: float, total: float, label: str = "", *_: object) -> None:
            progress.update(task, completed=done, total=total, label=str(label)[:60])

        yield told


class _Lines:
    def __init__(self, console: Console, what: str, every: float) -> None:
        self.console, self.what, self.every = console, what, every
        self.started = self.last = time.monotonic()

    def __call__(self, done: float, total: float, label: str = "", *_: object) -> None:
        now = time.monotonic()
        if done <= 0 or (now - self.last < self.every and done < total):
            return
        self.last = now
        left = (now - self.started) / done * max(total - done, 0)
        rest = f", about {numbers.seconds(left)} left" if done < total else f", {numbers.seconds(now - self.started)}"
        self.console.print(f"{self.what}: {done:g} of {total:g}{rest}", markup=False, highlight=False, soft_wrap=True)
