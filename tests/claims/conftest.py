from dataclasses import replace

import pytest

from gradwise.trials import run_trial


@pytest.fixture(scope="session")
def briefly():
    """Runs a trial at scale smoke with one seed, the first point of a grid standing for all of it."""

    def run(trial):
        arms = [arm if arm.tuning is None else replace(arm, tuning=first(arm.tuning)) for arm in trial.arms]
        return run_trial(replace(trial, arms=arms), scale="smoke", seeds=[0], engine="serial", ledger="sqlite://")

    def first(tuning):
        return replace(tuning, grid={name: values[:1] for name, values in tuning.grid.items()})

    return run
