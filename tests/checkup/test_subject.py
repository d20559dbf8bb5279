import pickle

import pytest
import torch
from torch import nn

from gradwise.checkup.subject import Subject, SubjectError, load_subject, require_subject

CODE = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from gradwise.checkup import Subject

def loader():
    return DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(0, 2, (20,))), 5)

mine = Subject("mine", lambda: torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy, loader(), loader())

def made():
    return mine

def broken():
    raise RuntimeError("no data here")

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "user_subject_code.py"
    path.write_text(CODE)
    return path


def test_a_subject_by_path_by_function_and_as_itself(file):
    subject = load_subject(f"{file}:mine")
    assert isinstance(subject, Subject)
    assert load_subject(f"{file}:made").name == "mine"
    assert load_subject(subject) is subject
    assert require_subject(f"{file}:mine").name == "mine"


def test_a_subject_by_module_in_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_subject("user_subject_code:mine").name == "mine"


@pytest.mark.parametrize("name", ["digits", "digits_healthy"])
def test_embedded_subjects(name):
    subject = load_subject(name)
    assert subject.name == name
    x, _ = next(iter(subject.train))
    assert subject.model()(x).shape == (32, 10)


def test_the_faulty_subject_differs_in_labels_and_step_only():
    faulty, healthy = load_subject("digits"), load_subject("digits_healthy")
    (x, y), (a, b) = faulty.train.dataset.tensors, healthy.train.dataset.tensors
    assert torch.equal(x, a)
    assert (y != b).double().mean().item() == pytest.approx(0.18)
    assert torch.equal(faulty.valid.dataset.tensors[1], healthy.valid.dataset.tensors[1])
    assert faulty.epochs == healthy.epochs
    assert faulty.model is healthy.model


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digit", ["names no subject", "Did you mean 'digits'", "package.module:attribute"]),
        (":mine", ["names no subject"]),
        (42, ["expected a Subject or a name, got int"]),
        ("no_such_module_anywhere:x", ["there is no module 'no_such_module_anywhere'", "searched first"]),
        ("/no/such/file.py:x", ["there is no file /no/such/file.py"]),
        ("{file}:mind", ["has no 'mind'", "mine"]),
        ("{file}:number", ["is a int, not a gradwise.Subject"]),
        ("{file}:broken", ["RuntimeError: no data here"]),
    ],
)
def test_what_cannot_be_loaded_is_told_exactly(spec, words, file):
    with pytest.raises(SubjectError) as caught:
        load_subject(spec.format(file=file) if isinstance(spec, str) else spec)
    assert caught.value.part == "import"
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_raises_and_one_that_imports_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "raising_subject.py").write_text("1 / 0")
    (tmp_path / "importing_subject.py").write_text("import surely_not_installed_anywhere")
    with pytest.raises(SubjectError, match="ZeroDivisionError"):
        load_subject(f"{tmp_path}/raising_subject.py:x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SubjectError, match="imports 'surely_not_installed_anywhere', which is not installed"):
        load_subject("importing_subject:x")


@pytest.mark.parametrize(
    ("value", "words"),
    [(nn.Linear(2, 2), "model=lambda: Linear"), ({"name": "x"}, "your_mapping"), (None, "got NoneType")],
)
def test_things_that_are_no_subject(value, words):
    with pytest.raises(SubjectError, match=r"subject\.type") as caught:
        require_subject(value)
    assert words in str(caught.value)


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(SubjectError("loss", "is odd.", "Fix it.")))
    assert (error.part, str(error)) == ("loss", "subject.loss: is odd. Fix it.")
