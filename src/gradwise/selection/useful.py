"""USEFUL: find examples without the early-learned feature and show them twice.

Nguyen, Haddad, Gan, Mirzasoleiman, "Changing the Training Data Distribution to Reduce Simplicity Bias Improves
In-distribution Generalization", NeurIPS 2024, arXiv:2404.17768.

Gradient descent learns simple features first and may leave slower ones under-learned. Train normally for a few epochs,
cluster each class's outputs in two, take the cluster with the higher mean loss (the examples without the simple
feature), add one copy of it to the data, re-initialise and train by the usual recipe::

    early = collect_outputs(model, DataLoader(data, batch_size=512))     # after the separating epoch
    selector = UsefulSelector(random_state=0).fit(*early)
    sampler = UsefulSampler(len(data), selector.extra_indices_, generator=0)
    loader = DataLoader(data, batch_size=128, sampler=sampler)           # train a fresh model on it

The new epoch is longer: compare methods at equal gradient steps. High-loss examples may also be mislabelled ones;
the paper reports gains under label noise only together with MixUp, so look at ``report_`` before trusting it there.

Several processes (DDP): fit on rank 0, broadcast ``selector.indices_`` (or ``extra_indices_``), and give each rank
``DistributedSampler(as_subset(data, selector))``; its ``set_epoch`` shuffles as usual.
"""

from typing import Any
import warnings

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
import torch

from gradwise.base.arrays import as_tensor
from gradwise.base.checks import require_choice, require_count, require_finite, require_positive
from gradwise.base.random import generator_from
from gradwise.selection._selector import default_losses
from gradwise.training.samplers import RepeatSampler

MINI_BATCH_ABOVE = 20_000  # rows of one class
GAP = 1.1  # a ratio of mean losses below this is no split worth the name


class UsefulSelector(BaseEstimator):
    """Per class, k-means of the network's early outputs; the cluster with the highest mean loss is to be repeated.

    Args:
        n_clusters: Clusters per class.
        factor: How often the found examples are seen; 2, one more copy, is the paper's value, and more hurts there.
        features: ``"logits"`` clusters the raw outputs, as the paper does; ``"probs"`` their softmax (or sigmoid);
            ``"embedding"`` takes any vectors as they are and then needs ``losses``.
        min_loss_ratio: Leave a class alone whose found cluster's mean loss is below this multiple of the rest's. The
            default 1 never does; 1.1 is a cautious choice (an addition to the paper).
        random_state: Seeds k-means: an integer, a NumPy or torch generator, or ``None`` for fresh entropy.

    Attributes:
        extra_indices_: Rows to repeat, ascending (int64).
        indices_: All rows, followed by ``factor - 1`` copies of the extra ones.
        weights_: How often each row is seen [n].
        clusters_: Cluster of each row within its class [n]; -1 where the class could not be clustered.
        report_: Per class: ``sizes`` and ``mean_losses`` of the clusters, the one ``chosen`` (or ``None``, with the
            reason in ``left_alone``), its ``share`` of the class, the ``loss_ratio`` of chosen to rest.
    """

    guarantees = frozenset({"deterministic", "original_rows", "keeps_every_row", "class_equivariant"})

    extra_indices_: np.ndarray
    indices_: np.ndarray
    weights_: np.ndarray | None
    clusters_: np.ndarray
    report_: dict[Any, Any]

    def __init__(
        self,
        n_clusters: Any = 2,
        factor: Any = 2,
        features: Any = "logits",
        min_loss_ratio: float = 1.0,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.factor = factor
        self.features = features
        self.min_loss_ratio = min_loss_ratio
        self.random_state = random_state

    def fit(self, outputs: Any, targets: Any, losses: Any = None) -> "UsefulSelector":
        """Choose the rows to repeat from what the model says about each row at the separating epoch.

        Args:
            outputs: Logits [n, c] (or embeddings); [n] or [n, 1] for two classes with one logit. Arrays or tensors.
            targets: Classes [n], integers from 0.
            losses: Per-example losses [n]; by default the cross-entropy of the logits.

        Raises:
            ValueError: Lengths differ, targets out of range, outputs or losses not finite, a parameter out of range,
                or embeddings without losses.

        Warns:
            UserWarning: The training accuracy is already above 99 %, or in most classes the loss ratio is below 1.1:
                no split was found.
        """
        outputs, targets, losses = self._checked(outputs, targets, losses)
        vectors = _vectors(outputs, self.features)
        seed = int(torch.randint(2**31 - 1, (), generator=generator_from(self.random_state)))
        self.clusters_ = np.full(len(targets), -1)
        self.report_ = {}
        extra = []
        for label in np.unique(targets):
            rows = np.flatnonzero(targets == label)
            clusters = _cluster(vectors[rows], self.n_clusters, seed)
            entry = _judge(clusters, losses[rows], self.min_loss_ratio)
            self.report_[int(label)] = entry
            if clusters is not None:
                self.clusters_[rows] = clusters
                if entry["chosen"] is not None:
                    extra.append(rows[clusters == entry["chosen"]])
        self.extra_indices_ = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *extra])).astype(np.int64)
        self.indices_ = np.concatenate([np.arange(len(targets)), np.tile(self.extra_indices_, self.factor - 1)])
        self.weights_ = np.bincount(self.indices_, minlength=len(targets)).astype(np.float64)
        self._warn(outputs, targets)
        return self

    def _checked(self, outputs: Any, targets: Any, losses: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        require_choice("features", self.features, ("logits", "probs", "embedding"))
        require_count("n_clusters", self.n_clusters, 2)
        require_positive("min_loss_ratio", self.min_loss_ratio)
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor < 1:
            raise ValueError(f"factor must be an integer of at least 1, got {self.factor!r}.")
        out = as_tensor(outputs, dtype=torch.float64, device="cpu")[0].detach()
        out = out.unsqueeze(1) if out.ndim == 1 else out.flatten(1)
        y = as_tensor(targets, device="cpu")[0].detach()
        if y.is_floating_point() or y.ndim != 1:
            raise ValueError(f"targets must be a list of integers, got dtype {y.dtype} and shape {list(y.shape)}.")
        y = y.long()
        if len(out) != len(y) or not len(y):
            raise ValueError(f"outputs and targets must have one length above 0, got {len(out)} and {len(y)}.")
        require_finite("outputs", out)
        classes = max(out.shape[1], 2)
        if int(y.min()) < 0 or (self.features != "embedding" and int(y.max()) >= classes):
            raise ValueError(f"targets must lie in [0, {classes - 1}], got {int(y.min())} to {int(y.max())}.")
        if losses is None:
            if self.features == "embedding":
                raise ValueError("embeddings have no loss of their own: pass losses=.")
            values = default_losses(out, y)
        else:
            values = as_tensor(losses, dtype=torch.float64, device="cpu")[0].detach()
        if values.shape != y.shape:
            raise ValueError(f"losses must have shape {list(y.shape)}, got {list(values.shape)}.")
        require_finite("losses", values)
        return out.numpy(), y.numpy(), values.numpy()

    def _warn(self, outputs: np.ndarray, targets: np.ndarray) -> None:
        if self.features != "embedding":
            guess = outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).astype(np.int64)
            accuracy = float((guess == targets).mean())
            if accuracy > 0.99:
                warnings.warn(
                    f"training accuracy is already {accuracy:.1%}: an earlier epoch separates better.", stacklevel=3
                )
        flat = sum(entry["loss_ratio"] < GAP for entry in self.report_.values())
        if 2 * flat > len(self.report_):
            warnings.warn(
                f"no split found: in {flat} of {len(self.report_)} classes the clusters' mean losses differ by less "
                "than 10 %.",
                stacklevel=3,
            )


class UsefulSampler(RepeatSampler):
    """Every row once per epoch and the found rows ``factor`` times: ``DataLoader(data, sampler=UsefulSampler(...))``.

    Resumable in the middle of an epoch (``state_dict``, ``load_state_dict``). See
    :class:`~gradwise.training.samplers.RepeatSampler` for the checks.

    Args:
        dataset_len: Rows of the data set.
        extra_indices: ``UsefulSelector.extra_indices_``.
        factor: How often they are seen; 1 is an ordinary shuffled pass.
        generator: Decides the orders; a seed is accepted.
    """

    def __init__(self, dataset_len: Any, extra_indices: Any, factor: Any = 2, generator: Any = None) -> None:
        super().__init__(dataset_len, extra_indices, factor, generator)


def separating_epoch(errors: Any) -> int | None:
    """The epoch at which the fall of the training error begins to slow: where to look at the outputs.

    ``errors[0]`` is the error before training (chance), ``errors[t]`` after epoch t. The answer is the first t >= 2
    whose fall ``errors[t-1] - errors[t]`` is less than half of the largest so far; ``None`` while there is none yet, so
    it may be asked after every epoch. A formalisation of the paper's rule of thumb (epoch 8 of ResNet-18 on CIFAR-10).

    Raises ``ValueError`` for errors outside [0, 1].

    >>> separating_epoch([0.9, 0.6, 0.35, 0.25, 0.2])
    3
    """
    values = np.asarray(errors, dtype=np.float64)
    if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)):
        raise ValueError("errors must be a list of error rates in [0, 1].")
    falls = values[:-1] - values[1:]
    for t in range(2, len(values)):
        largest = falls[:t].max()
        if largest > 0 and falls[t - 1] < largest / 2:
            return t
    return None


def _vectors(outputs: np.ndarray, features: str) -> np.ndarray:
    if features != "probs":
        return outputs
    logits = torch.from_numpy(outputs)
    return (torch.sigmoid(logits) if outputs.shape[1] == 1 else torch.softmax(logits, 1)).numpy()


def _cluster(x: np.ndarray, n_clusters: int, seed: int) -> np.ndarray | None:
    """Labels [n] of k-means on ``x`` [n, d], or ``None`` where there are fewer different points than clusters."""
    if len(x) < n_clusters or len(np.unique(x, axis=0)) < n_clusters:
        return None
    kind = MiniBatchKMeans if len(x) > MINI_BATCH_ABOVE else KMeans
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # points that differ by rounding only: seen just below
        labels = kind(n_clusters, n_init=10, random_state=seed).fit_predict(x)
    return labels.astype(np.int64) if len(np.unique(labels)) == n_clusters else None


def _judge(clusters: np.ndarray | None, losses: np.ndarray, min_ratio: float) -> dict[str, Any]:
    """The report of one class: which cluster has the highest mean loss, and by how much."""
    if clusters is None:
        return {"sizes": [len(losses)], "mean_losses": [float(losses.mean())], "chosen": None, "share": 0.0,
                "loss_ratio": 1.0, "left_alone": "fewer different outputs than clusters"}  # fmt: skip
    sizes = np.bincount(clusters)
    means = np.bincount(clusters, losses) / sizes
    top = int(means.argmax())
    rest = float(losses[clusters != top].mean())
    ratio = float(means[top]) / rest if rest > 0 else (float("inf") if means[top] > rest else 1.0)
    entry: dict[str, Any] = {"sizes": sizes.tolist(), "mean_losses": means.tolist(), "chosen": top,
                             "share": float(sizes[top] / len(losses)), "loss_ratio": ratio}  # fmt: skip
    if ratio < min_ratio:
        entry |= {"chosen": None, "share": 0.0, "left_alone": f"the loss ratio is below {min_ratio}"}
    return entry
