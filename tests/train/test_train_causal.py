"""Language modelling end to end on a small random model: the completion is learned, the prompt is not counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaw.models import load_tokenizer
from deltaw.train import TrainOptions, evaluate, load, train

ROWS = [{"prompt": f"the colour of number {i} is", "completion": "blue and green"} for i in range(16)]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2 (Conv1D, tied head) with the embedded model's vocabulary."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer("all-minilm-l6-v2")
    tokenizer.eos_token = "[SEP]"
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=len(tokenizer), **ends)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw"), ("full", "normuon")])
def test_completions_are_learned(gpt2: Path, tmp_path: Path, method: str, optimizer: str):
    options = TrainOptions(epochs=6, batch_size=8, max_length=32, lr=2e-2)
    data = {"train": ROWS, "test": ROWS[:4]}
    trained = train(
        gpt2, data, method=method, optimizer=optimizer, options=options, out=tmp_path / "out", data_options={"validation_fraction": 0.0}
    )  # fmt: skip
    assert trained.data.task == "causal-lm"
    assert trained.evaluation is not None
    start = evaluate(load(gpt2, task="causal-lm"), trained.tokenizer, ROWS[:4], task="causal-lm", max_length=32)
    assert start.count == trained.evaluation.count == 4 * 4  # three words and the end, of four examples
    assert trained.evaluation.loss < start.loss - 0.3
    again = evaluate(load(tmp_path / "out"), trained.tokenizer, ROWS[:4], task="causal-lm", max_length=32)
    assert again.loss == pytest.approx(trained.evaluation.loss, abs=1e-4)
