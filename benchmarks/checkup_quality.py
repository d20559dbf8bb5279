"""How good is the check-up itself? Planted faults against healthy subjects, on seeds it was not calibrated on.

Run: python benchmarks/checkup_quality.py [--seeds 5] [--json results/checkup.json]

For every planted fault: in how many seeds its reading calls for action (sensitivity), and which other readings do. For
every healthy subject: in how many seeds no reading calls for action (specificity). Reference ranges were set on seeds
0 to 2; the seeds here start at 10.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, field
import json
from pathlib import Path
import time
from typing import Any

from scipy.stats import binomtest
import torch

from gradwise.base.digest import code_digest
from gradwise.checkup import READINGS, Checkup, diagnose, load_subject
from gradwise.checkup.faults import FAULTS, HEALTHY, Planted

FIRST_SEED = 10


@dataclass
class Row:
    name: str
    note: str
    detects: str | None
    seeds: int = 0
    hits: int = 0
    seconds: list[float] = field(default_factory=list)
    acts: Counter[str] = field(default_factory=Counter)
    watches: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    values: dict[str, list[float | None]] = field(default_factory=dict)

    def add(self, checkup: Checkup) -> None:
        self.seeds += 1
        self.seconds.append(checkup.seconds)
        act = {f.reading for f in checkup.findings if f.severity == "act"}
        self.acts.update(act)
        self.watches.update(f.reading for f in checkup.findings if f.severity == "watch")
        self.failed.update(f.reading for f in checkup.findings if f.severity == "failed")
        self.hits += self.detects in act if self.detects else not act
        for f in checkup.findings:
            self.values.setdefault(f.reading, []).append(f.value)

    def to_dict(self) -> dict[str, Any]:
        interval = share(self.hits, self.seeds)
        return {
            "note": self.note,
            "detects": self.detects,
            "seeds": self.seeds,
            "found" if self.detects else "clean": self.hits,
            "share": interval,
            "act": dict(self.acts),
            "watch": dict(self.watches),
            "failed": dict(self.failed),
            "values": {k: [None if v is None else float(f"{v:.4g}") for v in vs] for k, vs in self.values.items()},
            "seconds_median": sorted(self.seconds)[len(self.seconds) // 2],
        }


def share(hits: int, n: int) -> dict[str, float]:
    found = binomtest(hits, n).proportion_ci(0.95, method="exact")
    return {"value": hits / n, "low": float(found.low), "high": float(found.high), "n": n}


def embedded(name: str, detects: str | None, note: str) -> Planted:
    return Planted(name, lambda seed: load_subject(name), detects, note)


def measure(planted: Planted, seeds: range) -> Row:
    row = Row(planted.name, planted.note, planted.detects)
    for seed in seeds:
        row.add(diagnose(planted.make(seed), seed=seed))
    acts = ", ".join(f"{k} {v}" for k, v in row.acts.most_common()) or "none"
    watches = ", ".join(f"{k} {v}" for k, v in row.watches.most_common()) or "none"
    word = f"found by {row.detects}" if row.detects else "clean"
    print(f"{row.name:<22} {word:<24} {row.hits}/{row.seeds}   act: {acts}; watch: {watches}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    faults = [
        embedded("digits", "stability", "the embedded subject: both faults at once, seen by its step"),
        Planted("digits_labels", lambda seed: load_subject("digits"), "label_noise", "the same, seen by its labels"),
        *FAULTS.values(),
    ]
    healthy = [embedded("digits_healthy", None, "the embedded healthy subject"), *HEALTHY.values()]
    if options.only is not None:
        faults, healthy = ([p for p in group if p.name in options.only] for group in (faults, healthy))
    started = time.perf_counter()
    found = [measure(p, seeds) for p in faults]
    clean = [measure(p, seeds) for p in healthy]
    summary: dict[str, Any] = {
        "faults": {row.name: row.to_dict() for row in found},
        "healthy": {row.name: row.to_dict() for row in clean},
    }
    if found:
        summary["sensitivity"] = share(sum(r.hits for r in found), sum(r.seeds for r in found))
        print("sensitivity", summary["sensitivity"])
    if clean:
        summary["specificity"] = share(sum(r.hits for r in clean), sum(r.seeds for r in clean))
        quiet = sum(r.seeds * len(READINGS) - sum(r.acts.values()) for r in clean)
        summary["specificity_per_reading"] = share(quiet, sum(r.seeds for r in clean) * len(READINGS))
        print("specificity", summary["specificity"], "per reading", summary["specificity_per_reading"])
    summary["protocol"] = (
        f"Seeds {seeds.start} to {seeds.stop - 1}: data split, planted fault and training. Ranges were set on seeds "
        "0 to 2. A fault is found when its reading calls for action; a healthy subject is clean when no reading does. "
        "Intervals: exact binomial, 95 %."
    )
    summary["seconds"] = time.perf_counter() - started
    summary["digest"] = code_digest(diagnose, *(type(r).measure for r in READINGS.values()))
    if options.json is not None:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
