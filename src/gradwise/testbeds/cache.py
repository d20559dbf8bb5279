"""Trained models kept on disk: a shared base model is trained once, by whichever process comes first.

A stored model is used only under the code, configuration, seed, default dtype, thread count and torch version it was
trained with. Files are written beside their place and renamed, carry a checksum, and are read with
``weights_only=True``; a damaged one is trained again. The lock is the operating system's, so it dies with its holder.
A directory that cannot be written costs a warning and the training time, never the result.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
import hashlib
import io
import os
from pathlib import Path
import pickle
import tempfile
import time
from typing import Any
import warnings

import platformdirs
import torch
from torch import nn

from gradwise.base.counting import count_preparation, counting, preparing
from gradwise.base.digest import code_digest, config_digest
from gradwise.testbeds.nets import seeded

try:
    import fcntl
except ImportError:  # Windows: two processes may both train; the rename keeps the result whole
    fcntl = None  # type: ignore[assignment]

ENVIRONMENT = "GRADWISE_CACHE"
Found = tuple[nn.Module, dict[str, float]]  # the module and the work its training was
_warned: set[str] = set()


@dataclass(frozen=True)
class Recipe:
    """How a model is made: ``build(generator, **config)`` the module, then ``train(module, generator, **config)`` it.

    Two steps, because stored weights need a module to go into. Calling the recipe does both.
    """

    build: Callable[..., nn.Module]
    train: Callable[..., None]

    def __call__(self, generator: torch.Generator, **config: Any) -> nn.Module:
        """Build and train; the module comes back as training left it."""
        module = self.build(generator, **config)
        self.train(module, generator, **config)
        return module


def trained(
    recipe: Recipe, config: Mapping[str, Any], seed: int, *, directory: str | os.PathLike[str] | None = None
) -> nn.Module:
    """The model that ``recipe`` trains under ``config`` and ``seed``, from the cache when it is there.

    The same bits come back with and without the cache. What training counted and its CPU seconds are stored beside
    the weights and charged to open counting blocks as preparation, whether or not training ran this time.

    Args:
        recipe: How to build and train. Everything random must come from the generator it gets; global draws (dropout)
            are seeded too, and the caller's global state is left alone.
        config: Keyword arguments of the recipe, part of the key.
        seed: Seeds the generator, part of the key.
        directory: Where to keep models; else ``$GRADWISE_CACHE``, else the user's cache directory.

    Returns:
        The module in evaluation mode, without gradients.

    Raises:
        TypeError: ``recipe`` is not a :class:`Recipe`.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe(build, train), got {type(recipe).__name__}.")
    path = cache_directory(directory) / f"{_key(recipe, config, seed)}.model"
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be evaluating; training is not
        found = _load(path, recipe, config, seed)
        if found is None:
            with preparing(), _locked(path):  # waiting and training are nobody's own time
                found = _load(path, recipe, config, seed, warn=True)  # another process may have trained it meanwhile
                if found is None:
                    found = _train_and_store(path, recipe, config, seed)
    module, work = found
    count_preparation(**work)
    return module.eval()


def cache_directory(directory: str | os.PathLike[str] | None = None) -> Path:
    """Where trained models are kept: the argument, else ``$GRADWISE_CACHE``, else the user's cache directory."""
    return Path(directory or os.environ.get(ENVIRONMENT) or Path(platformdirs.user_cache_dir("gradwise")) / "models")


def _key(recipe: Recipe, config: Mapping[str, Any], seed: int) -> str:
    code = code_digest(recipe.build, recipe.train)
    names = (recipe.build.__qualname__, recipe.train.__qualname__)
    setting = (torch.get_default_dtype(), torch.get_num_threads(), torch.__version__)
    return config_digest((code, names, dict(config), seed, tuple(map(str, setting))))


def _train_and_store(path: Path, recipe: Recipe, config: Mapping[str, Any], seed: int) -> Found:
    started = time.process_time()
    with counting(isolated=True) as counts, seeded(seed):
        module = recipe(torch.Generator().manual_seed(seed), **config)
    work = {"gradient": counts.gradient_equivalents(), "cpu_seconds": time.process_time() - started}
    module.zero_grad(set_to_none=True)
    buffer = io.BytesIO()
    torch.save({"state": module.state_dict(), "work": work}, buffer)
    _store(path, buffer.getvalue())
    return module, work


def _store(path: Path, payload: bytes) -> None:
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        _warn_once(path.parent, error)


def _load(path: Path, recipe: Recipe, config: Mapping[str, Any], seed: int, *, warn: bool = False) -> Found | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("its checksum does not match")
        stored = torch.load(io.BytesIO(content[32:]), weights_only=True)
        with seeded(seed):
            module = recipe.build(torch.Generator().manual_seed(seed), **config)
        module.load_state_dict(stored["state"])
        work = {name: float(amount) for name, amount in stored["work"].items()}
    except (ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if warn:
            warnings.warn(f"The cached model {path} cannot be used ({error}); it is trained again.", stacklevel=3)
        return None
    return module, work


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` if the file system offers one. The lock file stays: deleting it would be a race."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("a")
    except OSError as error:
        _warn_once(path.parent, error)
        yield
        return
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # some network file systems have no locks
                _warn_once(path.parent, error)
        yield


def _warn_once(directory: Path, error: OSError) -> None:
    if str(directory) not in _warned:
        _warned.add(str(directory))
        warnings.warn(
            f"Trained models cannot be kept in {directory} ({error}); they are trained each time. "
            f"Set {ENVIRONMENT} to a directory that can be written.",
            stacklevel=5,
        )
