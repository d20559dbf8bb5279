"""The four verbs as ordinary calls; the command line adds nothing but printing.

>>> import gradwise
>>> sorted(name for name in dir(gradwise) if name in {"diagnose", "trial", "reproduce", "compare"})
['compare', 'diagnose', 'reproduce', 'trial']
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwise.checkup import Checkup
    from gradwise.trials import Trial, TrialResult

SCALES = ("smoke", "small", "full")
ENGINES = ("processes", "serial", "dask")
Progress = Callable[..., object]


def diagnose(
    subject: Any, *, readings: Sequence[str] | None = None, seed: int = 0, progress: Progress | None = None
) -> "Checkup":
    """Check up a model and its data: readings with healthy ranges, what they mean, and what treats them.

    Args:
        subject: a :class:`gradwise.Subject`, or the name of one: an embedded one (``"digits"``),
            ``"package.module:attribute"`` or ``"path/to/file.py:attribute"``.
        readings: ids of the readings to take; ``None`` takes all that the subject allows.
        seed: of everything random in the check-up.
        progress: called as the work goes on, with (done, total, label, seconds).

    Raises:
        SubjectError: for a subject that cannot be examined; the message names the part and the remedy.
    """
    from gradwise.checkup import diagnose as examine

    return examine(_subject(subject), readings=readings, seed=seed, progress=progress)


def trial(
    subject: Any,
    with_: Sequence[str] | str,
    *,
    checkup: "Checkup | None" = None,
    scale: str = "small",
    seeds: Any = None,
    ledger: Any = None,
    engine: str = "processes",
    n_jobs: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> "TrialResult":
    """Train the same model with and without each treatment, paired by seed, at equal steps and at equal cost.

    Args:
        subject: as for :func:`diagnose`.
        with_: ids of treatments, such as ``["gam", "useful"]``.
        checkup: a finished check-up of the subject, from which a treatment may take its strength.
        scale: ``"smoke"`` (seconds), ``"small"`` (minutes) or ``"full"``.
        seeds: their number, or the seeds themselves; ``None`` takes the scale's own number.
        ledger: where runs are kept: an open ledger, its URL or file; ``None`` for the default one.
        engine: ``"processes"``, ``"serial"`` or ``"dask"``; ``n_jobs`` processes, a Dask scheduler at ``address``.
        progress: called after every run with (done, total, label, seconds).

    Raises:
        KeyError: for an unknown treatment; the message names the nearest ones.
        SubjectError: for a subject that cannot be examined.
    """
    names = [with_] if isinstance(with_, str) else list(with_)
    if not names:
        raise ValueError("with_ must name at least one treatment, got none.")
    from gradwise.checkup import treatment_trial

    planned = treatment_trial(_subject(subject), names, checkup=checkup)
    return _run(planned, scale, seeds, ledger, engine, n_jobs, address, progress)


def reproduce(
    id: str,
    *,
    scale: str = "small",
    seeds: Any = None,
    ledger: Any = None,
    engine: str = "processes",
    n_jobs: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> "TrialResult":
    """Run a paper's central claim as a scaled-down experiment with baselines and a control, and judge it.

    ``id`` is a paper's id (``"idgi"``) or key (``"attribution/idgi"``); the rest is as for :func:`trial`.

    Raises:
        UnknownNameError: a ``KeyError`` for an unknown paper; the message names the nearest ones.
        LookupError: when the paper has no executable claim yet.
    """
    return _run(claim_of(id), scale, seeds, ledger, engine, n_jobs, address, progress)


def compare(
    family: str,
    *,
    scale: str = "small",
    seeds: Any = None,
    ledger: Any = None,
    engine: str = "processes",
    n_jobs: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> "TrialResult":
    """Run a family's methods head to head on the same work: quality, cost, memory.

    ``family`` is a name such as ``"attribution"``; the rest is as for :func:`trial`.

    Raises:
        UnknownNameError: a ``KeyError`` for an unknown family; the message names the nearest ones.
        LookupError: when the family has no comparison yet.
    """
    from gradwise import claims
    from gradwise.catalog import find_family

    name = find_family(family)
    if name not in claims.families():
        there = ", ".join(claims.families()) or "none"
        raise LookupError(f"the family {name!r} has no comparison yet; there is one for: {there}.")
    return _run(claims.comparison(name), scale, seeds, ledger, engine, n_jobs, address, progress)


def claim_of(id: str) -> "Trial":
    """The executable claim of a paper (or the comparison ``"family/compare"``), without running it.

    Raises as :func:`reproduce` does.
    """
    import importlib

    from gradwise import claims
    from gradwise.catalog import find, resolves

    family, _, last = id.rpartition("/")
    if family in claims.families() and last == claims.COMPARISON:
        return claims.comparison(family)
    record = find(id)
    if record.key in claims.ids():
        return claims.load(record.key)
    if resolves(record.claim_module):
        return importlib.import_module(record.claim_module).claim
    there = ", ".join(name.partition("/")[2] for name in claims.ids()) or "none"
    raise LookupError(f"{record.key} has no executable claim yet (status: {record.status}); there is one for: {there}.")


def _subject(subject: Any) -> Any:
    from gradwise.checkup.subject import load_subject

    return load_subject(subject) if isinstance(subject, str) else subject


def _run(
    planned: "Trial",
    scale: Any,
    seeds: Any,
    ledger: Any,
    engine: Any,
    n_jobs: int | None,
    address: str | None,
    progress: Progress | None,
) -> "TrialResult":
    from gradwise.base.checks import require_choice, require_count
    from gradwise.trials import run_trial

    require_choice("scale", scale, SCALES)
    require_choice("engine", engine, ENGINES)
    if seeds is not None:
        listed = isinstance(seeds, Sequence) and not isinstance(seeds, str)
        seeds = tuple(seeds) if listed else tuple(range(require_count("seeds", seeds)))
    return run_trial(
        planned,
        scale=scale,
        seeds=seeds,
        ledger=ledger,
        engine=engine,
        n_jobs=n_jobs,
        address=address,
        progress=progress,
    )
