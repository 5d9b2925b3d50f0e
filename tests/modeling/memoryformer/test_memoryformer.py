"""Properties from the paper, training with sparse gradients, conversion of linear layers, bad input."""

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_attn.architectures.memory_layer import MemoryLayer
from hf_attn.checkpoints.official import ConversionError, from_official
from hf_attn.kernels.memory import hash_chunks, plain_lookup
from hf_attn.modeling.memoryformer.configuration_memoryformer import MemoryFormerConfig
from hf_attn.modeling.memoryformer.flops import block_flops
from hf_attn.modeling.memoryformer.modeling_memoryformer import MemoryFormerForCausalLM
from hf_attn.patching.memory_layer import convert_linear
from hf_attn.training.memory_optimizer import TableOptimizer
from tests.batteries.text import llama


def make_layer(*sizes: int, **options) -> MemoryLayer:
    set_seed(0)
    return MemoryLayer(*sizes, **options)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tokens", [0, 1, 5, 130])
@pytest.mark.parametrize("options", [{}, {"bucket_weight": "probability", "temperature": 0.5}, {"bias": False}])
@pytest.mark.parametrize("sparse", [False, True])
def test_layer_and_gradients_are_those_of_the_plain_sum(tokens, options, sparse):
    layer = make_layer(60, 7, code_length=3, sparse_gradients=sparse, **options)
    states = drawn(tokens, 60).requires_grad_()
    rows, weights = layer.hash(states)
    expected = plain_lookup(rows, weights, layer.tables) + (0 if layer.bias is None else layer.bias)
    probe = drawn(tokens, 7)
    gradients = torch.autograd.grad((expected * probe).sum(), (states, layer.tables))
    output = layer(states)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (output * probe).sum().backward()
    torch.testing.assert_close(states.grad, gradients[0], atol=1e-5, rtol=1e-5)
    assert layer.tables.grad.is_sparse == sparse
    torch.testing.assert_close(layer.tables.grad.to_dense(), gradients[1], atol=1e-5, rtol=1e-5)
    if sparse:
        assert layer.tables.grad.coalesce().indices().shape[1] <= tokens * layer.num_tables


def test_hash_by_hand():
    rows, weights = hash_chunks(torch.tensor([[0.0, -1.0, 2.0, 0.5, 3.0, -0.0]]), code_length=3)
    assert rows.tolist() == [[0b101, 8 + 0b111]]
    sigmoid = lambda value: 1 / (1 + torch.exp(torch.tensor(-2.0 * value)))  # noqa: E731
    assert weights[0, 0].item() == pytest.approx((3 * 0.5 * sigmoid(1) * sigmoid(2)).item())
    scaled = hash_chunks(torch.tensor([[0.0, -1.0, 2.0, 0.5, 3.0, -0.0]]) * 7, code_length=3)[0]
    assert torch.equal(scaled, rows)


def test_weights_at_zero_and_at_infinity():
    layer = make_layer(8, 5, code_length=4)
    zero = torch.zeros(1, 8)
    torch.testing.assert_close(layer(zero)[0], layer.bias)
    layer.bucket_weight = "probability"
    mean = layer.tables.unflatten(0, (2, 16))[:, -1].sum(0) / 16
    torch.testing.assert_close(layer(zero)[0], mean + layer.bias)
    total = layer.tables.unflatten(0, (2, 16))[:, -1].sum(0)
    torch.testing.assert_close(layer(zero + 50)[0], total + layer.bias)


def test_equal_rows_forget_the_signs():
    layer = make_layer(8, 5, code_length=4)
    with torch.no_grad():
        layer.tables.copy_(layer.tables.unflatten(0, (2, 16))[:, :1].expand(-1, 16, -1).flatten(0, 1))
    states = drawn(6, 8)
    torch.testing.assert_close(layer(states), layer(states.abs()))


def test_nothing_as_large_as_the_gathered_rows_is_made():
    """The largest tensor in forward and backward pass."""
    layer, states = make_layer(64, 64, code_length=4), drawn(512, 64).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        layer(states).square().sum().backward()
    assert largest <= 512 * 64 < 512 * layer.num_tables * 64


def test_published_sizes_and_flops():
    published = {"tiny_70m": 466_777_856, "small_160m": 1_945_920_000, "base_410m": 6_747_040_768}
    exact = {"tiny_70m": 0.352, "small_160m": 0.793, "base_410m": 1.409}
    paper = {"tiny_70m": 0.403, "small_160m": 0.906, "base_410m": 1.611}
    totals = {"tiny_70m": 4.7, "base_410m": 10.2}
    for name, count in published.items():
        config = MemoryFormerConfig.from_variant(name)
        with torch.device("meta"):
            assert MemoryFormerForCausalLM(config).num_parameters() == count
        flops = {part: value / 1e9 for part, value in block_flops(config, 2048).items()}
        assert flops["memory_layers"] == pytest.approx(exact[name], abs=1e-3)
        assert flops["memory_layers_in_paper"] == pytest.approx(paper[name], abs=1e-3)
        if name in totals:
            assert flops["attention"] + flops["memory_layers_in_paper"] == pytest.approx(totals[name], abs=0.05)
    wide = block_flops(MemoryFormerConfig(hidden_size=2048, num_attention_heads=16), 2048)
    share = (wide["attention"] + wide["memory_layers_in_paper"]) / (wide["attention"] + wide["standard_layers"])
    assert share == pytest.approx(0.19, abs=0.01)
    tiny = MemoryFormerConfig.from_variant("tiny_70m")
    table_bytes = 2 * tiny.num_tables * 2**8 * tiny.hidden_size
    assert table_bytes / 1e6 == pytest.approx(16.8, abs=0.05)


def test_padding_rows_of_zeros_have_gradients():
    model = MemoryFormerForCausalLM(MemoryFormerConfig.from_variant("tiny"))
    input_ids = torch.tensor([[0, 0, 5, 6]])
    model(input_ids, attention_mask=(input_ids != 0).long(), labels=input_ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("sparse", [True, False])
def test_training_with_its_optimiser_through_trainer_and_resumed(sparse, tmp_path):
    rows = [{"input_ids": drawn(16).argsort() + index, "labels": drawn(16).argsort() + index} for index in range(8)]

    def trainer(folder, **arguments):
        set_seed(0)
        model = MemoryFormerForCausalLM(MemoryFormerConfig.from_variant("tiny", sparse_gradients=sparse))
        settings = {"max_grad_norm": 0, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
        settings |= {"disable_tqdm": True, "logging_steps": 1, "save_steps": 5, "max_steps": 10}
        return Trainer(
            model,
            TrainingArguments(str(tmp_path / folder), **settings, **arguments),
            train_dataset=rows,
            optimizers=(TableOptimizer(model, lr=1e-2), None),
        )

    whole = trainer("whole", gradient_accumulation_steps=1)
    before = whole.model.model.layers[0].mlp.up_proj.tables.detach().clone()
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    changed = (whole.model.model.layers[0].mlp.up_proj.tables != before).any(-1)
    assert changed.any() and not changed.all()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, msg=name)


def test_optimiser_without_tables():
    with pytest.raises(ValueError, match="no memory layers"):
        TableOptimizer(torch.nn.Linear(2, 2))


def test_convert_linear_fits_a_pretrained_model(capsys):
    model = llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2).eval()
    original = model.model.layers[0].self_attn.q_proj
    batches = [
        {"input_ids": torch.randint(1, 257, (8, 64), generator=torch.Generator().manual_seed(i))} for i in range(4)
    ]
    before = model(batches[0]["input_ids"]).logits
    report = convert_linear(model, ["q_proj", "up_proj"], batches, code_length=4)
    assert report.names == tuple(
        f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    printed = capsys.readouterr()
    for fit in report.fits:
        assert fit.error < 0.6 and fit.error <= fit.first_error < 1
        assert fit.name in printed.out + printed.err
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, MemoryLayer) and not isinstance(original, MemoryLayer)
    after = model(batches[0]["input_ids"]).logits
    assert (after - before).norm() / (before - before.mean()).norm() < 0.6

    again = llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2).eval()
    assert not convert_linear(again, ["q_proj", "up_proj"], code_length=4, progress=False).fits
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batches[0]["input_ids"]).logits, after)


def test_convert_linear_refuses():
    model = llama(hidden_size=16, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"No linear layer fits \['nothing'\]"):
        convert_linear(model, ["nothing"])
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        convert_linear(model, "lm_head")
    with pytest.raises(ValueError, match="16 inputs, which is not a multiple of code_length=3"):
        convert_linear(model, ["q_proj"], code_length=3)
    with pytest.raises(ValueError, match="contain 2 tokens"):
        convert_linear(model, ["q_proj"], [torch.tensor([[1, 2]])], progress=False)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"num_tables \* code_length must be in_features: 2 \* 4 = 8, not 10"):
        MemoryLayer(10, 4, code_length=4)
    with pytest.raises(ValueError, match=r"need [\d,]+\.\d GiB, and this machine has"):
        MemoryLayer(40, 4, code_length=40)
    with pytest.raises(ValueError, match="bucket_weight must be one of"):
        MemoryLayer(8, 4, code_length=4, bucket_weight="softmax")
    with pytest.raises(ValueError, match=r"last dimension must be 8, got shape \(2, 6\)"):
        MemoryLayer(8, 4, code_length=4)(torch.ones(2, 6))
    for fields, message in (
        ({"num_tables": 3}, "must be hidden_size"),
        ({"code_length": 0}, "code_length=0 is out of range"),
        ({"intermediate_size": 50}, "intermediate_size follows from the tables"),
        ({"temperature": 0.0}, "temperature"),
        ({"extra_bits": -1}, "extra_bits"),
        ({"head_dim": 4}, "must equal hidden_size"),
    ):
        with pytest.raises(Exception, match=message):
            MemoryFormerConfig.from_variant("tiny", **fields)


def test_converter_refuses_unsupported_configurations():
    weights = {"tables": torch.zeros(48, 10), "bias": torch.zeros(10)}
    arguments = {"level": "memory_layer", "hidden_size": 12, "ffn_num_table": 3, "code_length": 4}
    assert from_official("memoryformer", weights, config=arguments).out_features == 10
    for wrong in ({"output_size": 11}, {"remove_projection": False}, {"unknown": 1}):
        with pytest.raises(ConversionError):
            from_official("memoryformer", weights, config={**arguments, **wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = make_layer(32, 16, code_length=8)
    states = drawn(70, 32)
    half = make_layer(32, 16, code_length=8).to(dtype)
    found = half(states.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), layer(states), atol=5e-3, rtol=5e-2)
    model = MemoryFormerForCausalLM(MemoryFormerConfig.from_variant("tiny")).to(dtype).eval()
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 5)
