"""What treatments of the data share: a copy trained for a while and asked about every example, and a new loader."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from gradwise.checkup.state import seeded
from gradwise.checkup.treatment import Plan, TreatmentError, make_plan
from gradwise.selection._selector import Outputs, collect_outputs
from gradwise.training.loop import fit


def indexable(name: str, plan: Plan) -> Any:
    """The data set behind the training loader; :class:`TreatmentError` when rows cannot be picked from it."""
    dataset = getattr(plan.subject.train, "dataset", None)
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TreatmentError(f"{name} picks examples: train must be a DataLoader over an indexable data set.")
    return dataset


def reloaded(plan: Plan, dataset: Any, *, sampler: Any = None) -> DataLoader[Any]:
    """A loader like the subject's over other rows: same batch size, collation and workers, shuffled."""
    old = plan.subject.train
    return DataLoader(
        dataset,
        batch_size=old.batch_size or plan.facts.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        collate_fn=old.collate_fn,
        drop_last=old.drop_last,
        num_workers=old.num_workers,
    )


def warm_up(plan: Plan, dataset: Any, epochs: int) -> Iterator[Outputs]:
    """Train a fresh copy of the plain run epoch by epoch; after each, what it says about every row of ``dataset``.

    Training and forward passes are counted. The plan itself, and all random states, are as before.
    """
    copy = make_plan(plan.subject, plan.facts, plan.seed)
    scheduler = None if plan.subject.scheduler is None else plan.subject.scheduler(copy.base)
    generator = copy.generator()
    ordered = DataLoader(dataset, batch_size=plan.facts.batch_size, collate_fn=plan.subject.train.collate_fn)
    for _ in range(epochs):
        with seeded(plan.seed, plan.subject.train):
            fit(
                copy.model,
                copy.objective,
                copy.loader,
                copy.optimizer,
                epochs=1,
                scheduler=scheduler,
                generator=generator,
            )
            early = collect_outputs(copy.model, ordered, loss=plan.subject.loss)
        yield early
