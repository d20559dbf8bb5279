"""The check-up: examine the subject, train it briefly once, take every reading."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
import time
from typing import Any

from gradwise.base.counting import Counts, counting
from gradwise.checkup.examine import examine
from gradwise.checkup.reading import Checkup, Context, Finding, Reading, Skip, finished
from gradwise.checkup.readings import READINGS
from gradwise.checkup.run import short_run
from gradwise.checkup.state import seeded
from gradwise.checkup.subject import require_subject


def diagnose(
    subject: Any,
    *,
    readings: Sequence[Any] | None = None,
    seed: int = 0,
    progress: Callable[..., object] | None = None,
) -> Checkup:
    """Examine ``subject`` and take readings.

    The subject is validated first; then its own model is trained once for a short run that all readings share. A
    reading that does not apply is reported as skipped with the reason, one that fails as failed with its message; the
    others finish. Data sets above 2,000 examples are sampled under the seed. The caller's random state, loaders and
    models are as before.

    Args:
        subject: a :class:`~gradwise.checkup.Subject`, or the name of one (see ``load_subject``).
        readings: ids or :class:`~gradwise.checkup.Reading` objects; all of them by default.
        seed: of the short run and of every sample.
        progress: called after every part with (done, total, label, seconds since the start).

    Raises:
        SubjectError: what is wrong with the subject, and what to do.
        ValueError: for an unknown reading, with the nearest names.
    """
    subject = require_subject(subject)
    chosen = [_reading(item) for item in (READINGS.values() if readings is None else _listed(readings))]
    started = time.perf_counter()
    total = len(chosen) + 2

    def tell(done: int, label: str) -> None:
        if progress is not None:
            progress(done, total, label, time.perf_counter() - started)

    facts = examine(subject, seed)
    tell(1, "subject examined")
    run = short_run(subject, facts, seed)
    tell(2, "short run")
    context = Context(subject, facts, run, seed)
    findings = []
    for place, reading in enumerate(chosen, start=3):
        findings.append(_measured(reading, context))
        tell(place, reading.title)
    return Checkup(subject, findings, run, time.perf_counter() - started, seed, facts)


def _measured(reading: Reading, context: Context) -> Finding:
    started = time.perf_counter()
    counts = Counts()
    with seeded(context.stream(reading.id), context.subject.train, context.subject.valid):
        try:
            with counting() as counts:
                finding = reading.measure(context)
        except Skip as reason:
            finding = Finding(reading.id, reading.title, severity="skipped", meaning=str(reason), source=reading.source)
        except Exception as error:
            message = f"The reading could not be taken: {type(error).__name__}: {error}"
            finding = Finding(reading.id, reading.title, severity="failed", meaning=message, source=reading.source)
    return finished(finding, counts, time.perf_counter() - started)


def _listed(readings: Any) -> Sequence[Any]:
    return [readings] if isinstance(readings, str) or hasattr(readings, "measure") else list(readings)


def _reading(item: Any) -> Reading:
    if isinstance(item, str):
        if item not in READINGS:
            near = get_close_matches(item, READINGS, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {', '.join(READINGS)}."
            raise ValueError(f"there is no reading {item!r}; {hint}")
        return READINGS[item]
    if not isinstance(item, Reading):
        raise ValueError(f"a reading has id, title, source and measure(context), got {type(item).__name__}.")
    return item
