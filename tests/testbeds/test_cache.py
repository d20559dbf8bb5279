import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from gradwise.base.counting import count, counting
from gradwise.testbeds import Recipe, cache, cache_directory, trained
from gradwise.testbeds.nets import digits_mlp

runs = []


def build(generator, width=3, **config):
    return nn.Sequential(*digits_mlp(generator, (4, width, 2)), nn.Dropout(0.5))


def train(module, generator, width=3, steps=3):
    runs.append(steps)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        count(gradient=1)


RECIPE = Recipe(build, train)


@pytest.fixture(autouse=True)
def _fresh():
    runs.clear()
    cache._warned.clear()


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters())


def test_trained_once_and_bit_identical_with_and_without_the_cache(tmp_path):
    first = trained(RECIPE, {"steps": 3}, 0, directory=tmp_path)
    second = trained(RECIPE, {"steps": 3}, 0, directory=tmp_path)
    elsewhere = trained(RECIPE, {"steps": 3}, 0, directory=tmp_path / "other")
    assert runs == [3, 3]  # the second came from the file, the third from training
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(weights(first), weights(elsewhere))
    assert not first.training
    assert not second.training
    assert all(p.grad is None and p.requires_grad for p in (*first.parameters(), *second.parameters()))


def test_dropout_draws_do_not_touch_the_callers_state(tmp_path):
    before = torch.get_rng_state()
    trained(RECIPE, {}, 0, directory=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", ["config", "seed", "dtype", "threads", "code"])
def test_the_key_covers(change, tmp_path, monkeypatch):
    trained(RECIPE, {"steps": 3}, 0, directory=tmp_path)
    config, seed, recipe = {"steps": 3}, 0, RECIPE
    if change == "config":
        config = {"steps": 4}
    elif change == "seed":
        seed = 1
    elif change == "dtype":
        monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    else:
        monkeypatch.setattr(cache, "code_digest", lambda *functions: "edited")
    trained(recipe, config, seed, directory=tmp_path)
    assert len(runs) == 2


def test_work_is_charged_as_preparation_each_time(tmp_path):
    for _ in range(2):
        with counting() as counts:
            trained(RECIPE, {"steps": 5}, 0, directory=tmp_path)
        assert counts.gradient == 0
        assert counts.preparation["gradient"] == 5
        assert counts.preparation["cpu_seconds"] > 0
    assert len(runs) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_file_is_detected_and_trained_again(tmp_path, damage):
    good = trained(RECIPE, {}, 0, directory=tmp_path)
    (file,) = tmp_path.glob("*.model")
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:  # whole, but the weights of another network
        trained(RECIPE, {"width": 7}, 0, directory=tmp_path / "other")
        content = next((tmp_path / "other").glob("*.model")).read_bytes()
    file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="trained again"):
        again = trained(RECIPE, {}, 0, directory=tmp_path)
    assert torch.equal(weights(good), weights(again))
    runs.clear()
    trained(RECIPE, {}, 0, directory=tmp_path)
    assert runs == []


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import hashlib
    import io

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    trained(RECIPE, {}, 0, directory=tmp_path)
    (file,) = tmp_path.glob("*.model")
    buffer = io.BytesIO()
    torch.save({"state": Evil(), "work": {}}, buffer)
    file.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    with pytest.warns(UserWarning, match="trained again"):
        trained(RECIPE, {}, 0, directory=tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_directory_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "models"
    with pytest.warns(UserWarning, match="GRADWISE_CACHE") as caught:
        first = trained(RECIPE, {}, 0, directory=blocked)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = trained(RECIPE, {}, 0, directory=blocked)
    assert torch.equal(weights(first), weights(second))
    assert len(runs) == 2


def test_a_full_disk_leaves_no_debris(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        trained(RECIPE, {}, 0, directory=tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.model"))


def test_a_file_that_can_be_read_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    trained(RECIPE, {}, 0, directory=tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: pytest.fail("tried to write"))
    trained(RECIPE, {}, 0, directory=tmp_path)
    assert len(runs) == 1


def test_a_failing_training_leaves_the_lock_free(tmp_path):
    def fail(module, generator, **config):
        raise FloatingPointError("diverged")

    for _ in range(2):  # would block for ever if the first attempt kept the lock
        with pytest.raises(FloatingPointError):
            trained(Recipe(build, fail), {}, 0, directory=tmp_path)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_still_gets_a_trained_model(tmp_path, mode):
    good = trained(RECIPE, {}, 0, directory=tmp_path)
    for directory in (tmp_path, tmp_path / "other"):
        with mode():
            again = trained(RECIPE, {}, 0, directory=directory)
        assert torch.equal(weights(good), weights(again))
        assert not again[0].weight.is_inference()


def test_plain_functions_are_refused(tmp_path):
    with pytest.raises(TypeError, match="Recipe"):
        trained(build, {}, 0, directory=tmp_path)


def test_location(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADWISE_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    assert cache_directory(tmp_path / "a") == tmp_path / "a"
    monkeypatch.delenv("GRADWISE_CACHE")
    assert "gradwise" in str(cache_directory())


WORKER = """
import sys, time, pathlib, os
import torch
from torch import nn
from gradwise.testbeds.cache import Recipe, trained

directory, pause = pathlib.Path(sys.argv[1]), float(sys.argv[2])

def build(generator):
    return nn.Linear(2, 1)

def train(module, generator):
    with (directory / "trainings").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(pause)
    nn.init.constant_(module.weight, 3.0)

print(trained(Recipe(build, train), {}, 0, directory=directory).weight.sum().item())
"""


def start(tmp_path, pause):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return subprocess.Popen([sys.executable, script, tmp_path, str(pause)], stdout=subprocess.PIPE, text=True)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.distributed
def test_two_processes_train_once(tmp_path):
    processes = [start(tmp_path, 1.0) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == ["6.0", "6.0"]
    assert len((tmp_path / "trainings").read_text().split()) == 1


@pytest.mark.distributed
def test_a_killed_process_does_not_keep_the_lock(tmp_path):
    holder = start(tmp_path, 600)
    wait_for(tmp_path / "trainings")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert not list(tmp_path.glob("*.model"))
    output, _ = start(tmp_path, 0).communicate(timeout=120)
    assert output.strip() == "6.0"
    assert len(list(tmp_path.glob("*.model"))) == 1
