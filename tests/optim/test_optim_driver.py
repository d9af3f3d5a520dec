"""Drivers: further evaluations within one step."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import CompositionError
from deltaw.optim import Driver, MatrixOptimizer, Muon, momentum


class Extragradient(Driver):
    """The example of the docstring."""

    max_evaluations = 2
    needs_closure = True
    refuses = {"trainer": "it evaluates the loss itself"}

    def drive(self, evaluate, optimizer):
        kept = [p.detach().clone() for p in optimizer.parameters()]
        loss = evaluate()
        optimizer.apply()
        evaluate()
        with torch.no_grad():
            torch._foreach_copy_(optimizer.parameters(), kept)
        optimizer.apply()
        return loss


class Greedy(Driver):
    """Asks for more than it states."""

    def drive(self, evaluate, optimizer):
        evaluate()
        return evaluate()


def _problem(optimizer, p):
    def closure():
        optimizer.zero_grad()
        loss = (p.T @ torch.tensor([[2.0, 0.0], [0.0, 0.5]]) @ p).trace()
        loss.backward()
        return loss

    return closure


def test_a_driver_evaluates_at_another_point():
    p = torch.nn.Parameter(torch.eye(2))
    opt = MatrixOptimizer([p], lr=0.1, chain=[momentum(0.0)], driver=Extragradient())
    loss = opt.step(_problem(opt, p))
    a = torch.tensor([2.0, 0.5])
    middle = 1 - 0.1 * 2 * a
    assert loss.item() == pytest.approx(2.5)
    assert torch.allclose(p.diagonal(), 1 - 0.1 * 2 * a * middle, atol=1e-6)


def test_a_driver_that_needs_a_closure_says_so():
    opt = Muon([torch.nn.Parameter(torch.eye(2))], driver=Extragradient())
    with pytest.raises(CompositionError, match=r"step\(closure\).*trainer"):
        opt.step()


def test_evaluations_are_counted():
    p = torch.nn.Parameter(torch.eye(2))
    opt = Muon([p], driver=Greedy())
    with pytest.raises(CompositionError, match="max_evaluations=1"):
        opt.step(_problem(opt, p))
