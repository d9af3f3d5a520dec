"""The probe is regularised logistic regression, fitted to its optimum."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import DataError
from deltaw.train import fit_probe
from deltaw.train.probe import fit_logistic


def blobs(n: int = 200, d: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    centres = torch.randn(3, d, generator=g)
    return torch.nn.functional.normalize(centres[y] + torch.randn(n, d, generator=g), dim=-1), y


@pytest.mark.parity
@pytest.mark.parametrize("strength", [0.3, 3.0, 30.0])
def test_agrees_with_scikit_learn(strength: float):
    linear_model = pytest.importorskip("sklearn.linear_model")
    from tolerances import TOLERANCES

    x, y = blobs()
    weight, bias = fit_logistic(x, y, 3, strength)
    peer = linear_model.LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(x.double().numpy(), y.numpy())
    ours = (x @ weight.T + bias).softmax(-1)
    theirs = torch.from_numpy(peer.predict_proba(x.double().numpy())).float()
    assert (ours - theirs).abs().max() < TOLERANCES["probe/scikit-learn"][0]


def test_gradient_vanishes_at_the_solution():
    x, y = blobs()
    weight, bias = fit_logistic(x, y, 3, 3.0, iterations=500)
    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    loss = 3.0 * torch.nn.functional.cross_entropy(x.double() @ w.T + b, y, reduction="sum") + 0.5 * w.square().sum()
    loss.backward()
    assert w.grad.norm() < 1e-3 * len(y)
    assert b.grad.norm() < 1e-3 * len(y)


def test_the_strength_is_chosen_by_cross_validation_and_the_fit_repeats():
    x, y = blobs(150)
    first, second = fit_probe(x, y, seed=1), fit_probe(x, y, seed=1)
    assert first.strength == max(first.scores, key=lambda c: (first.scores[c], -c))
    assert torch.equal(first.weight, second.weight)
    assert (first.logits(x).argmax(-1) == y).float().mean() > 0.7
    with pytest.raises(DataError, match="at least 10 examples"):
        fit_probe(x[:5], y[:5])
