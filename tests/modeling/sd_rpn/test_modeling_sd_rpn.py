"""The region proposal network: its parameters, its map and its loss."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, CLIPVisionConfig, LlavaConfig, MistralConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_attn.modeling.sd_rpn.configuration_sd_rpn import SdRpnConfig
from hf_attn.modeling.sd_rpn.first_pass import run_first_pass
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel, roi_loss

from .tiny import BASES, BRANCH, LAYERS, tiny_base, tiny_rpn


#: variant -> stored parameters, and parameters that affect the map (table of the paper)
PARAMETERS = {
    "llava_v1.5_7b": (607_154_176, 438_329_344),
    "llava_v1.5_13b": (951_618_560, 686_848_000),
    "qwen2_5_vl_3b": (231_233_024, 158_876_928),
    "qwen2_5_vl_7b": (699_176_960, 480_803_328),
}


def small_config(**fields) -> SdRpnConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SdRpnConfig(**{"base_num_hidden_layers": 6, "branch_layer": 2, "num_hidden_layers": 3, **sizes, **fields})


def small_model(**fields) -> SdRpnModel:
    torch.manual_seed(0)
    model = SdRpnModel(small_config(initializer_range=0.2, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def inputs_for(config: SdRpnConfig, batch=2, sequence=9, image=slice(1, 6)) -> dict:
    generator = torch.Generator().manual_seed(1)
    angles = torch.arange(sequence)[:, None] * torch.logspace(0, -2, config.head_dim // 2).repeat(2)
    image_mask = torch.zeros(batch, sequence, dtype=torch.bool)
    image_mask[:, image] = True
    return {
        "hidden_states": torch.randn(batch, sequence, config.hidden_size, generator=generator),
        "position_embeddings": (angles.cos()[None], angles.sin()[None]),
        "image_mask": image_mask,
    }


@pytest.mark.parametrize("variant", PARAMETERS)
def test_the_published_networks_have_the_published_sizes(variant):
    with torch.device("meta"):
        model = SdRpnModel(SdRpnConfig.from_variant(variant))
    assert (model.num_parameters(), model.num_parameters(only_trainable=True)) == PARAMETERS[variant]


def test_thresholds_go_by_task():
    llava, qwen = SdRpnConfig.from_variant("llava_v1.5_7b"), SdRpnConfig.from_variant("qwen2_5_vl_3b")
    assert (llava.threshold("TextVQA"), llava.threshold("docvqa"), llava.threshold("ocrbench")) == (0.15, 0.1, 0.05)
    assert (qwen.threshold("textvqa"), qwen.threshold("vstar"), qwen.threshold()) == (0.15, 0.175, 0.1)
    assert SdRpnConfig.from_variant("qwen2_5_vl_7b").threshold("vstar") == 0.075
    with pytest.raises(ValueError, match=r"no threshold for the task 'mmmu'.*textvqa"):
        llava.threshold("mmmu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branch_layer": 4}, "branch_layer must be between 1 and 3"),
        ({"branch_layer": 0}, "branch_layer=0 is out of range: it must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is out of range: it must be at least 1"),
        ({"base_model_type": "blip"}, "base_model_type must be"),
        ({"thresholds": {"docvqa": 0.1}}, "entry 'default'"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        small_config(**fields)


@pytest.mark.parametrize("kind", BASES)
def test_fresh_layers_continue_as_the_base_does(kind):
    """Before training, the network repeats layers K .. K+T-2 of the base exactly."""
    base = tiny_base(kind)
    rpn = SdRpnModel.from_base(base, branch_layer=BRANCH, num_hidden_layers=LAYERS)
    input_ids = torch.tensor([[1, 50, 60, 70, 80], [0, 1, 55, 65, 75]])
    mask = (input_ids != 0).long()
    expected = base(input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[BRANCH + LAYERS - 1]
    first = run_first_pass(base, BRANCH, input_ids, attention_mask=mask)
    states = []
    rpn.layers[-2].register_forward_hook(lambda module, arguments, output: states.append(output))
    rpn(**first.rpn_inputs())
    assert torch.equal(states[0][mask.bool()], expected[mask.bool()])
    assert rpn.base_report.new == ()


@pytest.mark.parametrize("multi_head", [True, False])
@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("use_norm", [True, False])
def test_the_map_is_its_definition(use_rope, use_norm, multi_head):
    model = small_model(use_rope=use_rope, use_norm=use_norm, multi_head=multi_head)
    inputs = inputs_for(model.config)
    states = []
    model.layers[-2].register_forward_hook(lambda module, arguments, output: states.append(output))
    logits = model(**inputs).logits

    h = model.norm(states[0]) if use_norm else states[0]
    last = model.layers[-1]
    h = last.input_layernorm(h)
    q = last.self_attn.q_proj(h).view(2, 9, 4, 8).transpose(1, 2)
    k = last.self_attn.k_proj(h).view(2, 9, 2, 8).transpose(1, 2)
    if use_rope:
        q, k = apply_rotary_pos_emb(q, k, *inputs["position_embeddings"])
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2))[:, :, -1, 1:6]
    expected = (scores / 8**0.5).mean(dim=1) if multi_head else scores.sum(dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_single_layer_has_a_map_too():
    model = small_model(num_hidden_layers=1, use_norm=False)
    inputs = inputs_for(model.config)
    last = model.layers[0]
    h = last.input_layernorm(inputs["hidden_states"])
    q, k = (projection(h) for projection in (last.self_attn.q_proj, last.self_attn.k_proj))
    q, k = apply_rotary_pos_emb(
        q.view(2, 9, 4, 8).transpose(1, 2), k.view(2, 9, 2, 8).transpose(1, 2), *inputs["position_embeddings"]
    )
    expected = (q[:, :, -1:] * k.repeat_interleave(2, dim=1)).sum(-1).mean(1)[:, 1:6] / 8**0.5
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_what_comes_after_the_query_does_not_matter(kind):
    """Neither right padding nor an answer behind the prompt changes the map."""
    model = tiny_rpn(kind)
    inputs = inputs_for(model.config)
    plain = model(**inputs).logits
    longer = inputs_for(model.config, sequence=13)
    longer["hidden_states"][:, :9] = inputs["hidden_states"]
    answered = model(**longer, query_positions=torch.tensor([8, 8])).logits
    torch.testing.assert_close(answered, plain, atol=1e-5, rtol=1e-5)
    mask = torch.ones(2, 13).long()
    mask[:, 9:] = 0
    torch.testing.assert_close(model(**longer, attention_mask=mask).logits, plain, atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_are_independent_and_filled_up():
    model = small_model()
    inputs = inputs_for(model.config, batch=3)
    inputs["image_mask"][1, 3:] = False
    inputs["image_mask"][2] = False
    logits = model(**inputs).logits
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    assert torch.isneginf(logits[1, 2:]).all() and torch.isneginf(logits[2]).all()
    alone = model(
        hidden_states=inputs["hidden_states"][1:2],
        position_embeddings=inputs["position_embeddings"],
        image_mask=inputs["image_mask"][1:2],
    ).logits
    torch.testing.assert_close(logits[1:2, :2], alone, atol=1e-5, rtol=1e-5)


def test_left_padding_does_not_matter():
    model = small_model()
    inputs = inputs_for(model.config, batch=1)
    padded = {
        "hidden_states": torch.nn.functional.pad(inputs["hidden_states"], (0, 0, 4, 0), value=3.0),
        "position_embeddings": tuple(
            torch.nn.functional.pad(table, (0, 0, 4, 0)) for table in inputs["position_embeddings"]
        ),
        "image_mask": torch.nn.functional.pad(inputs["image_mask"], (4, 0)),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 9]),
    }
    torch.testing.assert_close(model(**padded).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_several_queries_have_the_maps_they_have_alone():
    model = small_model()
    inputs = inputs_for(model.config)
    inputs["image_mask"][1, 3:] = False
    positions = torch.tensor([[6, 8, 7], [4, 5, 4]])
    with torch.no_grad():
        together = model(**inputs, query_positions=positions).logits
        alone = [model(**inputs, query_positions=column).logits for column in positions.unbind(1)]
    assert together.shape == (2, 3, 5)
    torch.testing.assert_close(together, torch.stack(alone, 1))
    with pytest.raises(ValueError, match=r"labels the map of one query"):
        model(**inputs, query_positions=positions, roi_target_map=torch.zeros(2, 5))


def test_eager_and_sdpa_agree():
    model = small_model()
    inputs = inputs_for(model.config)
    inputs["attention_mask"] = torch.tensor([[1] * 9, [0] + [1] * 8])
    model.set_attn_implementation("sdpa")
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, sdpa, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_close():
    model = small_model()
    inputs = inputs_for(model.config)
    expected = model(**inputs).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    inputs["position_embeddings"] = tuple(table.bfloat16() for table in inputs["position_embeddings"])
    logits = half(**inputs).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


# --- loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_cells_of_the_batch_that_count():
    model = small_model()
    inputs = inputs_for(model.config)
    labels = torch.tensor([[1, 0, -100, -100, -100], [1, 1, 0, 0, -100]])
    output = model(**inputs, roi_target_map=labels)
    valid = labels != -100
    p = output.logits[valid].sigmoid()
    y = labels[valid]
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, expected)


def test_labels_of_maps_of_different_shapes():
    model = small_model()
    inputs = inputs_for(model.config, image=slice(1, 7))
    inputs["image_mask"][1, 5:] = False
    maps = [torch.tensor([[1, 0, 0], [-100, 1, 1]]), torch.tensor([[0, 1], [1, -100]])]
    padded = torch.tensor([[1, 0, 0, -100, 1, 1], [0, 1, 1, -100, -100, -100]])
    assert torch.equal(model(**inputs, roi_target_map=maps).loss, model(**inputs, roi_target_map=padded).loss)


def test_without_a_cell_that_counts_the_loss_is_zero_and_so_are_the_gradients():
    model = small_model()
    loss = model(**inputs_for(model.config), roi_target_map=torch.full((2, 5), -100)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_labels_that_do_not_fit_are_refused():
    model = small_model()
    inputs = inputs_for(model.config)
    with pytest.raises(ValueError, match="prompt 0 has 4 labels, but the prompt has 5 image tokens"):
        model(**inputs, roi_target_map=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="prompt 0 has 6 labels, but the prompt has 5 image tokens"):
        model(**inputs, roi_target_map=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="1 maps for a batch of 2 prompts"):
        model(**inputs, roi_target_map=torch.zeros(1, 5))


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_what_the_map_depends_on_gets_gradients_and_nothing_else(kind, tmp_path):
    tiny_rpn(kind).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    model.train()
    model(**inputs_for(model.config), roi_target_map=torch.ones(2, 5)).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    last = f"layers.{LAYERS - 1}."
    expected = {name for name, _ in model.named_parameters() if name.startswith((f"{last}mlp", f"{last}post"))}
    expected |= {
        name for name, _ in model.named_parameters() if name.startswith((f"{last}self_attn.v", f"{last}self_attn.o"))
    }
    if kind == "qwen2_5_vl":
        expected.add("norm.weight")
    assert unused == expected
    assert unused == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_no_gradient_reaches_the_base():
    base = tiny_base("llava")
    first = run_first_pass(base, BRANCH, torch.tensor([[1, 50, 60]]))
    assert not first.hidden_states.requires_grad
    assert all(parameter.grad is None for parameter in base.parameters())


def test_it_learns_a_region():
    model = small_model()
    model.train()
    inputs = inputs_for(model.config, batch=4)
    labels = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, -100], [0, 0, 1, 0, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(**inputs, roi_target_map=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_gradient_checkpointing_changes_nothing():
    model = small_model().train()
    inputs, labels = inputs_for(model.config), torch.ones(2, 5)
    model(**inputs, roi_target_map=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**inputs, roi_target_map=labels).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


def test_lora_without_target_modules():
    model = small_model()
    adapted = get_peft_model(model, LoraConfig())
    adapted(**inputs_for(model.config), roi_target_map=torch.ones(2, 5)).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)


# --- from a base ---------------------------------------------------------------------------------------------------


def test_the_paper_s_choices_are_taken_for_bases_of_its_sizes():
    text = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    base_config = LlavaConfig(text_config={"model_type": "llama", **text})
    config = SdRpnModel.config_from_base(base_config)
    published = SdRpnConfig.from_variant("llava_v1.5_13b", base_model_name_or_path=None)
    different = {
        name
        for name in ("branch_layer", "num_hidden_layers", "hidden_size", "thresholds", "use_norm", "use_rope")
        if getattr(config, name) != getattr(published, name)
    }
    assert not different
    assert SdRpnModel.config_from_base(base_config, branch_layer=20).branch_layer == 20


def test_bases_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match=r"'clip_vision_model'.*Supported bases: llava"):
        SdRpnModel.config_from_base(CLIPVisionConfig())
    with pytest.raises(ValueError, match=r"no published SD-RPN for a llava with 7 layers of width 32.*branch_layer"):
        SdRpnModel.from_base(tiny_base("llava"))
    with pytest.raises(ValueError, match="does not support the language model 'gpt2'"):
        SdRpnModel.config_from_base(LlavaConfig(text_config={"model_type": "gpt2"}), branch_layer=2)
    windowed = LlavaConfig(text_config=MistralConfig(sliding_window=8))
    with pytest.raises(ValueError, match="does not support a base with sliding-window attention"):
        SdRpnModel.config_from_base(windowed, branch_layer=2)


def test_the_loss_over_nothing():
    assert roi_loss(torch.zeros(3), torch.full((3,), -100)).item() == 0
