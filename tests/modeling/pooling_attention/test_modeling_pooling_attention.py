"""Properties of the designs from the paper, and embedders made from pretrained decoders."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from hf_attn import PoolingAttentionConfig, PoolingAttentionModel, contrastive_loss, embedding_tokenizer, from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.pooling_attention.adapter import load_official_adapter
from hf_attn.modeling.pooling_attention.head import PoolingHead
from tests.batteries.text import byte_tokenizer


DESIGNS = range(1, 6)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD = {"num_latents": 3, "num_pooling_heads": 2, "pooling_head_dim": 8}


def make(design, **overrides):
    set_seed(0)
    return PoolingAttentionModel(PoolingAttentionConfig.from_variant("tiny", design=design, **overrides)).eval()


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (length,), generator=generator) for length in (7, 1, 4)]


def padded(side):
    ids = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True, padding_value=1, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(text) for text in texts()], batch_first=True, padding_side=side
    )
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_either_side_does_not_change_an_embedding(design, implementation):
    model = make(design)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        alone = torch.cat([model(text[None]).pooler_output for text in texts()])
        for side in ("left", "right"):
            batch = model(**padded(side)).pooler_output
            torch.testing.assert_close(batch, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("design", DESIGNS)
def test_bidirectional_designs_and_only_they_look_ahead(design):
    model, ids = make(design), texts()[0][None]
    other = ids.clone()
    other[0, -1] = 3 + (ids[0, -1] - 2) % 60
    with torch.no_grad():
        first, second = model(ids).last_hidden_state[:, 0], model(other).last_hidden_state[:, 0]
    assert torch.equal(first, second) == (design <= 3)


@pytest.mark.parametrize("design", DESIGNS)
def test_half_precision_stays_near_float32(design):
    model = make(design)
    with torch.no_grad():
        expected = model(**padded("left")).pooler_output
        found = model.bfloat16()(**padded("left")).pooler_output
    assert found.dtype == torch.bfloat16
    # A dozen layers round to 8 bits; a wrong implementation would differ by the norm of the vector.
    assert (found.float() - expected).norm(dim=-1).max() < 12 * 2**-8


def test_one_key_gives_the_queries_no_gradient():
    model = make(2)
    model(**padded("left")).pooler_output.sum().backward()
    assert model.head.attention.query.weight.grad.count_nonzero() == 0
    assert model.head.attention.value.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("keys,head_dim", [(1, 8), (3, 8), (3, 64), (40, 8)], ids=["one", "few", "folded", "many"])
def test_every_form_of_the_head_equals_the_equation(keys, head_dim):
    set_seed(0)
    head = PoolingHead(16, 6, 2, head_dim).double()
    assert head.attention._folds(6, keys) == (head_dim == 64 or keys < 4)
    mask = torch.arange(keys) < torch.tensor([[keys], [max(1, keys // 2)]])
    gradients = []
    for forward in (head.eager_forward, head.forward):
        set_seed(1)
        states = torch.randn(2, keys, 16, dtype=torch.double, requires_grad=True)
        head.zero_grad()
        output = forward(states, mask)
        output.square().sum().backward()
        gradients.append([output, states.grad, *(parameter.grad for parameter in head.parameters())])
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-6, rtol=1e-6)  # the softmax is in float32


def test_the_last_layer_head_ignores_the_order_and_the_multi_layer_head_does_not():
    set_seed(0)
    head, states = PoolingHead(16, 3, 2, 4, num_layers=5).eval(), torch.randn(2, 5, 16)
    flipped = states.flip(1)
    with torch.no_grad():
        assert not torch.allclose(head(states), head(flipped), atol=1e-3)
        head.layer_embeddings.zero_()
        torch.testing.assert_close(head(states), head(flipped), atol=1e-6, rtol=1e-5)
        last = PoolingHead(16, 3, 2, 4)
        last.load_state_dict({name: t for name, t in head.state_dict().items() if name != "layer_embeddings"})
        torch.testing.assert_close(last(states), head(states))
        with pytest.raises(ValueError, match="for 5 layers and was given 6"):
            head(torch.randn(2, 6, 16))


@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("design", [2, 3, 4, 5])
def test_a_head_can_start_as_the_mean_of_what_it_pools(design, head_dim):
    model = make(design, pooling_head_dim=head_dim, pooling_init="mean", pooling_std=0.0).eval()
    ids, states = torch.tensor([[3, 4, 5], [6, 7, 8]]), {}
    model.head.register_forward_pre_hook(lambda _, inputs: states.update(pooled=inputs[0]))
    embeddings = model(ids).pooler_output
    expected = torch.nn.functional.layer_norm(states["pooled"], [32], eps=1e-5).mean(dim=1)
    if design != 2:  # a single key has weight 1; the weights of several keys are nearly equal
        model.head.attention.query.weight.data.zero_()
        embeddings = model(ids).pooler_output
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(expected, dim=-1))


def test_official_numbers_of_parameters():
    with torch.device("meta"):
        heads = [
            PoolingHead(4096, 768, 32, 2048),
            PoolingHead(4096, 768, 32, 2048, 32),
            PoolingHead(896, 768, 32, 2048, 24),
        ]
    counts = [sum(parameter.numel() for parameter in head.parameters()) for head in heads]
    assert counts == [1_278_275_584, 1_278_406_656, 245_237_888]


def test_loss_of_equal_embeddings_is_the_logarithm_of_the_number_of_passages():
    same = torch.ones(5, 8)
    torch.testing.assert_close(contrastive_loss(same, same, same), torch.tensor(math.log(10)))
    torch.testing.assert_close(contrastive_loss(same, same), torch.tensor(math.log(5)))
    with pytest.raises(ValueError, match="5 queries and 4 positives"):
        contrastive_loss(same, same[:4])


BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralModel(MistralConfig(**SIZES, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.mark.parametrize("base", BASES)
def test_from_base_has_the_states_of_the_base(base):
    set_seed(0)
    base = BASES[base]().eval()
    ids = texts()[0][None]
    for design in DESIGNS:
        model = PoolingAttentionModel.from_base(base, design=design, **HEAD)
        assert all(name.startswith("head.") for name in model.base_report.new)
        assert (model.head is None) == (design == 1)
    model = PoolingAttentionModel.from_base(base, design=1)
    decoder = getattr(base, "model", base)
    with torch.no_grad():
        states = decoder(ids).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(ids).pooler_output, normalize(states[:, -1], dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("design", [3, 5])
def test_the_lowest_layers_of_a_base_are_a_base(design):
    set_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_hidden_layers": 4}))
    model = PoolingAttentionModel.from_base(base, design=design, num_hidden_layers=3, **HEAD)
    assert len(model.config.layer_types) == len(model.model.layers) == len(model.head.layer_embeddings) == 3
    assert {name.split(".")[2] for name in model.base_report.dropped if "layers." in name} == {"3"}
    torch.testing.assert_close(model.model.layers[2].state_dict(), base.model.layers[2].state_dict(), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"layers\.4"):
        PoolingAttentionModel.from_base(base, design=5, num_hidden_layers=5, **HEAD)


def test_bidirectional_states_are_those_of_transformers_without_causality():
    set_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    model = PoolingAttentionModel.from_base(base, design=4, **HEAD)
    base.config.is_causal = False
    with torch.no_grad():
        expected = base.model(**padded("left")).last_hidden_state
        found = model(**padded("left")).last_hidden_state
    valid = padded("left")["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-5)


def test_another_design_from_a_model_of_this_family():
    first = make(5)
    second = PoolingAttentionModel.from_base(first, design=1)
    assert second.head is None
    assert torch.equal(second.model.norm.weight, first.model.norm.weight)


def test_an_unknown_base_and_bad_configurations_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16))
    with pytest.raises(ValueError, match="gpt2"):
        PoolingAttentionModel.from_base(gpt2)
    with pytest.raises(StrictDataclassError, match="design=6 is out of range"):
        PoolingAttentionConfig(design=6)
    with pytest.raises(StrictDataclassError, match="no attention windows"):
        PoolingAttentionConfig(design=5, sliding_window=8)
    with pytest.raises(StrictDataclassError, match="needs a pad_token_id"):
        PoolingAttentionConfig(mean_over="pad_token_id")


def test_input_without_tokens_is_refused():
    model = make(5)
    with pytest.raises(ValueError, match="no token to embed"):
        model(torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="no token to embed"):
        model(torch.zeros(2, 0, dtype=torch.long))
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"Rows \[1\] of attention_mask have no token"):
        model(torch.ones(2, 2, dtype=torch.long), attention_mask=mask)
    with pytest.raises(ValueError, match=r"must have the shape \(batch, length\)"):
        model(torch.ones(2, 2, dtype=torch.long), attention_mask=torch.ones(2, 1, 2, 2))


def test_the_official_rule_leaves_padding_tokens_out_of_the_mean():
    model = make(5, pad_token_id=9, mean_over="pad_token_id")
    ours = make(5, pad_token_id=9)
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain, special = torch.tensor([[4, 5, 6]]), torch.tensor([[4, 9, 6]])
        assert torch.equal(model(plain).pooler_output, ours(plain).pooler_output)
        assert not torch.allclose(model(special).pooler_output, ours(special).pooler_output, atol=1e-4)


def test_a_tokenizer_without_special_tokens_is_refused_and_a_cut_text_keeps_its_end():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="no padding token"):
        embedding_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    ours = embedding_tokenizer(tokenizer)
    batch = ours(["ab", "", "abcdefgh"], padding=True, truncation=True, max_length=5)
    end = tokenizer.eos_token_id
    assert all(row[-1] == end for row in batch["input_ids"])
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1] * 5]
    assert tokenizer("ab")["input_ids"] == ours("ab")["input_ids"][:-1]
    assert embedding_tokenizer(ours)("ab") == ours("ab")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        embedding_tokenizer(tokenizer)


def official_head(width=32, latents=3, inner=16, layers=0):
    shapes = {
        "latents": (latents, width),
        "cross_attend_blocks.0.norm.weight": (width,),
        "cross_attend_blocks.0.norm.bias": (width,),
        "cross_attend_blocks.0.norm_context.weight": (width,),
        "cross_attend_blocks.0.norm_context.bias": (width,),
        "cross_attend_blocks.0.fn.to_q.weight": (inner, width),
        "cross_attend_blocks.0.fn.to_kv.weight": (2 * inner, width),
        "cross_attend_blocks.0.fn.to_out.weight": (width, inner),
        "cross_attend_blocks.1.norm.weight": (width,),
        "cross_attend_blocks.1.norm.bias": (width,),
        "cross_attend_blocks.1.fn.net.0.weight": (8 * width, width),
        "cross_attend_blocks.1.fn.net.0.bias": (8 * width,),
        "cross_attend_blocks.1.fn.net.2.weight": (width, 4 * width),
        "cross_attend_blocks.1.fn.net.2.bias": (width,),
    } | ({"pos_emb.weight": (layers, width)} if layers else {})
    set_seed(0)
    return {name: torch.randn(shape) / 4 for name, shape in shapes.items()}


@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_of_the_official_training_loads(tmp_path, beside):
    from peft import LoraConfig, get_peft_model

    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    base.model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModel.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    weights = official_head(layers=2)
    torch.save(weights, tmp_path / "adapterattn_pool.pt" if beside else folder / "attn_pool.pt")

    model = load_official_adapter(folder, design=3, num_cross_heads=2)
    ids = texts()[0][None]
    with torch.no_grad():
        expected = adapted(ids).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.head.latents, weights["latents"])
    with pytest.raises(ConversionError, match="multi-layer head"):
        load_official_adapter(folder, design=2, num_cross_heads=2)
    with pytest.raises(ConversionError, match="not a multiple of 3 attention heads"):
        load_official_adapter(folder, design=3, num_cross_heads=3)


def test_official_arguments_that_contradict_the_weights_are_refused():
    with pytest.raises(ConversionError, match="equal widths"):
        from_official("pooling_attention", official_head(), {"num_cross_heads": 2, "latent_dim": 16})
    with pytest.raises(ConversionError, match="cross_dim_head"):
        from_official("pooling_attention", official_head(), {"num_cross_heads": 2, "cross_dim_head": 4})
    with pytest.raises(ConversionError, match="num_cross_head"):
        from_official("pooling_attention", official_head(), {"num_cross_head": 2})
