import pytest
import torch

from gradwise.base.losses import LossTerms


def test_total_is_the_differentiable_sum_and_parts_are_for_people():
    w = torch.tensor(2.0, requires_grad=True)
    terms = LossTerms(fit=w**2, penalty=3 * w, constant=torch.tensor(1.0))
    terms.total.backward()
    assert terms.total.item() == 11
    assert w.grad == 7
    assert not terms["fit"].requires_grad
    assert list(terms) == ["fit", "penalty", "constant"]
    assert len(terms) == 3
    assert dict(terms) == {"fit": 4, "penalty": 6, "constant": 1}
    assert repr(terms) == "LossTerms(fit=4, penalty=6, constant=1)"


def test_one_term_is_its_own_total():
    w = torch.tensor(2.0, requires_grad=True)
    assert LossTerms(fit=w).total is w


def test_names_that_could_clash_are_fine():
    assert list(LossTerms(self=torch.tensor(1.0), total=torch.tensor(2.0))) == ["self", "total"]


def test_wrong_terms_are_refused():
    with pytest.raises(ValueError, match="at least one named term"):
        LossTerms()
    with pytest.raises(ValueError, match=r"'fit' must be a scalar, got shape \[2\]"):
        LossTerms(fit=torch.ones(2))
    with pytest.raises(KeyError):
        LossTerms(fit=torch.tensor(1.0))["other"]
