"""Drivers: who calls the loss, how often, and when the weights move.

A chain maps one gradient to one update. A method that needs more evaluations than the one that filled `p.grad`
(zeroth order, line search, a gradient at another point, several losses) is a `Driver` around the chain. The
plain driver below is what every optimizer uses that does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from deltaw.errors import CompositionError

if TYPE_CHECKING:
    from deltaw.optim.base import MatrixOptimizer


class Driver:
    """One evaluation, if a closure is given, then one update.

    A subclass overrides `drive` and states how many evaluations one step may take. Its tensors that must survive
    a checkpoint belong into `optimizer.state[p]`, declared by a transform.

    Example, the extragradient method (two evaluations, the second at the point the first one leads to):

        class Extragradient(Driver):
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
    """

    #: the most evaluations of the closure in one step
    max_evaluations: ClassVar[int] = 1
    #: True: `step()` without a closure is an error
    needs_closure: ClassVar[bool] = False
    #: which of trainer, gradscaler, fsdp2 it cannot work under -> the reason
    refuses: ClassVar[Mapping[str, str]] = {}

    def drive(self, evaluate: Callable[[], Any] | None, optimizer: MatrixOptimizer) -> Any:
        """Take one step: `evaluate()` runs the closure, which fills the gradients and returns the loss;
        `optimizer.apply()` runs the chains on the gradients as they stand. Returns the loss."""
        loss = None if evaluate is None else evaluate()
        optimizer.apply()
        return loss

    def step(self, closure: Callable[[], Any] | None, optimizer: MatrixOptimizer) -> Any:
        """`drive` with the count of evaluations enforced. Raises CompositionError."""
        name = type(self).__name__
        if closure is None and self.needs_closure:
            reasons = "".join(f"; {where}: {why}" for where, why in self.refuses.items())
            raise CompositionError(
                f"{name} evaluates the loss itself, up to {self.max_evaluations} times a step: call "
                f"step(closure) with a closure that zeroes the gradients, runs backward and returns the loss{reasons}"
            )
        left = self.max_evaluations

        def evaluate() -> Any:
            nonlocal left
            if left == 0:
                raise CompositionError(f"{name} states max_evaluations={self.max_evaluations} and asked for one more")
            left -= 1
            return closure()  # type: ignore[misc]

        return self.drive(None if closure is None else evaluate, optimizer)
