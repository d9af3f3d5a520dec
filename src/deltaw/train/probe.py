"""The linear probe: logistic regression on the frozen model's mean-pooled features.

The baseline that every adapted model has to beat. Its regularisation is chosen by cross-validation on the
training examples, so that it is an honest opponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import DataError
from deltaw.train.tokenise import batches, tokenise


@dataclass(frozen=True)
class Probe:
    """A linear classifier on unit-length features: `logits = x @ weight.T + bias`."""

    weight: Tensor  # [classes, features]
    bias: Tensor  # [classes]
    strength: float  # the chosen C: inverse of the L2 penalty, as in scikit-learn
    scores: dict[float, float]  # cross-validated accuracy per C

    def logits(self, features: Tensor) -> Tensor:
        """[N, classes] logits of [N, features] features."""
        return features @ self.weight.T + self.bias

    @property
    def trainable_params(self) -> int:
        """Number of trained values."""
        return self.weight.numel() + self.bias.numel()


@torch.no_grad()
def mean_pooled_features(
    encoder: nn.Module,
    tokenizer: Any,
    examples: Sequence[dict[str, Any]],
    *,
    max_length: int = 128,
    batch_size: int = 64,
) -> Tensor:
    """Mean over the unmasked tokens of the last hidden state, scaled to unit length: [N, hidden] float32."""
    rows = tokenise([{"text": e["text"]} for e in examples], tokenizer, "classification", max_length)
    base: Any = getattr(encoder, str(getattr(encoder, "base_model_prefix", "")), encoder)
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    out: Tensor | None = None
    for indices, batch in batches(rows, tokenizer, "classification", batch_size):
        batch = batch.to(device)
        hidden = base(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        if out is None:
            out = torch.empty(len(rows), pooled.shape[-1])
        out[indices] = pooled
    encoder.train(training)
    if out is None:
        raise DataError("no examples to take features from")
    return out


@torch.no_grad()
def classifier_inputs(
    net: nn.Module,
    classifier: nn.Module,
    tokenizer: Any,
    examples: Sequence[dict[str, Any]],
    *,
    max_length: int = 128,
    batch_size: int = 64,
) -> Tensor:
    """What the linear layer `classifier` inside `net` is given for each example: [N, features] float32."""
    rows = tokenise([{"text": e["text"]} for e in examples], tokenizer, "classification", max_length)
    seen: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].float().cpu()))
    training = net.training
    net.eval()
    try:
        order = []
        for indices, batch in batches(rows, tokenizer, "classification", batch_size):
            net(**batch.to(next(net.parameters()).device))
            order += indices
    finally:
        handle.remove()
        net.train(training)
    found = torch.cat(seen)
    return found[torch.tensor(order).argsort()]


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, strength: float, iterations: int = 300
) -> tuple[Tensor, Tensor]:
    """Minimise `C · Σ cross-entropy + ½‖weight‖²` by L-BFGS in float64; the bias is not penalised."""
    x, y = features.double(), labels
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    scale = 1 / (strength * len(y))

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y) + 0.5 * scale * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach().float(), bias.detach().float()


def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    grid: Sequence[float] = (0.3, 1, 3, 10),
    folds: int = 5,
    seed: int = 0,
) -> Probe:
    """Fit the probe with the C of best cross-validated accuracy (ties go to the stronger penalty).

    Args:
        features: [N, d] float features.
        labels: [N] class indices.
        classes: number of classes; the largest label plus one by default.
    """
    count = len(labels)
    if count < 2 * folds:
        raise DataError(f"a probe with {folds} folds needs at least {2 * folds} examples, found {count}")
    classes = classes or int(labels.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.chunk(folds)
    scores = {}
    for strength in sorted(grid):
        hits = 0
        for part in parts:
            rest = torch.ones(count, dtype=torch.bool)
            rest[part] = False
            weight, bias = fit_logistic(features[rest], labels[rest], classes, strength)
            hits += int(((features[part] @ weight.T + bias).argmax(-1) == labels[part]).sum())
        scores[float(strength)] = hits / count
    best = max(scores, key=lambda c: (scores[c], -c))
    weight, bias = fit_logistic(features, labels, classes, best)
    return Probe(weight, bias, best, scores)
