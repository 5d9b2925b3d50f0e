"""OAT: properties of the official network, generation, and bad input."""

import subprocess
import sys

import pytest
import torch
from transformers import set_seed

from hf_attn import AutoModelForScanpathPrediction, OATConfig, OATForScanpathPrediction, OATModel
from hf_attn.modeling.oat.position_table import gaussian_table, sinusoid_table
from tests.batteries.generation import spread_weights


TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SIZE = (3, 24, 20)


@pytest.fixture
def model():
    set_seed(0)
    return spread_weights(OATForScanpathPrediction(OATConfig.from_variant("tiny"))).eval()


@pytest.fixture
def scenes():
    set_seed(1)
    return {"pixel_values": torch.rand(2, 6, *SIZE), "target_index": torch.tensor([1, 4])}


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("amazon", 18_255_843),
        ("yogurt", 18_255_843),
        ("wine", 18_255_843),
        ("amazon_spp2", 17_928_163),
        ("amazon_spp3", 18_059_235),
        ("amazon_spp4", 18_583_523),
    ],
)
def test_published_sizes(variant, parameters):
    with torch.device("meta"):
        model = OATForScanpathPrediction(OATConfig.from_variant(variant))
    assert model.num_parameters() == parameters


def test_position_table_has_gaussian_cosines_and_equal_norms():
    table = gaussian_table(14, 86, sigma=2.0)
    cosines = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    distances = torch.arange(14.0)[:, None] - torch.arange(14.0)
    torch.testing.assert_close(cosines, torch.exp(-(distances**2) / 8), atol=1e-5, rtol=0)
    norms = table.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(14), rtol=1e-5, atol=0)


def test_sinusoid_table_has_the_frequencies_of_its_kind():
    table = sinusoid_table(5, 6, "exp2", alpha=2.0)
    angles = torch.arange(5.0)[:, None] * (torch.tensor([0.0, 2.0, 4.0]) / 6) ** 2
    torch.testing.assert_close(table[:, 0::2], angles.sin())
    torch.testing.assert_close(table[:, 1::2], angles.cos())


def test_permuting_objects_with_their_positions_permutes_the_logits(model, scenes):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    place = order.argsort()
    ids = torch.tensor([[8, 2, 5, 1], [8, 0, 4, 6]])
    positions = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], dim=1).expand(2, -1, -1)
    with torch.no_grad():
        plain = model(**scenes, decoder_input_ids=ids).logits
        renumbered = torch.where(ids < 6, place[ids.clamp(max=5)], ids)
        permuted = model(
            scenes["pixel_values"][:, order],
            place[scenes["target_index"]],
            positions[:, order],
            decoder_input_ids=renumbered,
        ).logits
    torch.testing.assert_close(permuted[..., :6], plain[..., order], **TOLERANCE)
    torch.testing.assert_close(permuted[..., 6:], plain[..., 6:], **TOLERANCE)


def test_later_fixations_do_not_matter_and_pad_has_a_constant_score(model, scenes):
    ids = torch.tensor([[8, 2, 5, 1], [8, 0, 4, 3]])
    changed = ids.clone()
    changed[:, 3] = 0
    with torch.no_grad():
        before, after = (model(**scenes, decoder_input_ids=some).logits for some in (ids, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3], **TOLERANCE)
    assert not torch.allclose(before[:, 3], after[:, 3])
    torch.testing.assert_close(before[..., 7], model.head.readout.bias.expand(2, 4).detach())


def test_scenes_of_different_size_in_a_batch(model):
    set_seed(2)
    small, large = torch.rand(1, 4, *SIZE), torch.rand(1, 6, *SIZE)
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])[None]
    grid = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], dim=1)[None]
    pad = torch.nn.functional.pad
    both = {
        "pixel_values": torch.cat([pad(small, (0,) * 7 + (2,)), large]),
        "object_positions": torch.cat([pad(places, (0, 0, 0, 2)), grid]),
        "target_index": torch.tensor([2, 5]),
        "object_mask": torch.tensor([[True] * 4 + [False] * 2, [True] * 6]),
    }
    alone = {"pixel_values": small, "object_positions": places, "target_index": torch.tensor([2])}
    with torch.no_grad():
        batch = model(**both, labels=torch.tensor([[1, 3, 6], [0, 5, 6]]))
        single = model(**alone, labels=torch.tensor([[1, 3, 4]]))
        large_only = model(large, torch.tensor([5]), labels=torch.tensor([[0, 5, 6]]))
    assert (batch.logits[0, :, 4:6] == -torch.inf).all()
    torch.testing.assert_close(batch.logits[0, :, [0, 1, 2, 3, 6, 7]], single.logits[0], **TOLERANCE)
    torch.testing.assert_close(batch.logits[1], large_only.logits[0], **TOLERANCE)
    torch.testing.assert_close(batch.loss, (single.loss + large_only.loss) / 2, **TOLERANCE)
    ids = model.generate(**both)
    first = [index for index in model.generate(**alone)[0].tolist() if index < 4]
    assert [index for index in ids[0].tolist() if index < 6] == first


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_cache_does_not_change_the_scanpaths(model, scenes, settings, cache_implementation):
    cached = model.generate(**scenes, **settings, cache_implementation=cache_implementation)
    torch.testing.assert_close(cached, model.generate(**scenes, **settings, use_cache=False))


@pytest.mark.parametrize("heads", [1, 2])
def test_scores_of_sampled_steps_do_not_depend_on_what_is_kept(scenes, heads):
    set_seed(0)
    model = OATForScanpathPrediction(OATConfig.from_variant("tiny", num_pointer_heads=heads)).eval()
    settings = {"do_sample": True, "num_return_sequences": 4, "min_new_tokens": 4, "max_new_tokens": 4}
    rows, outputs = [], []
    for use_cache in (True, False):
        hook = model.oat.decoder.layers[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        set_seed(0)
        outputs.append(
            model.generate(**scenes, **settings, use_cache=use_cache, output_logits=True, return_dict_in_generate=True)
        )
        hook.remove()
    # With a cache, the first step (BOS for all scanpaths of a scene) is decoded once per scene.
    assert rows == [2, 8, 8, 8, 8, 8, 8, 8]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits), **TOLERANCE)


def test_samples_of_a_scene_share_its_encoding(model, scenes):
    encodings, keys = [], []
    encoder, projection = model.oat.encoder, model.oat.decoder.layers[0].encoder_attn.k_proj
    encoder.object_encoder.register_forward_hook(lambda module, inputs, output: encodings.append(len(output)))
    projection.register_forward_hook(lambda module, inputs, output: keys.append(tuple(output.shape[:2])))
    ids = model.generate(**scenes, do_sample=True, num_return_sequences=5, min_new_tokens=4, max_new_tokens=4)
    assert ids.shape == (10, 5)
    assert (ids[:, 1:] < 6).all()
    assert encodings == [13]  # twelve objects, and the white image for BOS, EOS and PAD
    assert keys == [(2, 7)]


def test_several_scanpaths_of_a_scene_are_those_of_repeated_scenes(model, scenes):
    labels = torch.tensor([[1, 2, 6], [3, 6, -100], [0, 4, 6], [4, 6, -100]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shared = model(**scenes, labels=labels, output_attentions=True)
        repeated = model(
            **{name: tensor.repeat_interleave(2, dim=0) for name, tensor in scenes.items()},
            labels=labels,
            output_attentions=True,
        )
    torch.testing.assert_close(shared.logits, repeated.logits, **TOLERANCE)
    torch.testing.assert_close(shared.loss, repeated.loss, **TOLERANCE)
    torch.testing.assert_close(shared.cross_attentions, repeated.cross_attentions, **TOLERANCE)


def test_eager_and_sdpa_agree_with_a_mask_and_in_backward(model, scenes):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    results = []
    model.double()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.oat.decoder.config._attn_implementation == implementation
        model.zero_grad()
        output = model(**scenes, object_mask=mask, labels=torch.tensor([[1, 2, 6], [3, 6, -100]]))
        output.loss.backward()
        results.append((output.logits.detach(), model.oat.encoder.object_encoder.conv1.weight.grad.clone()))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_accumulated_gradients_are_those_of_one_batch(model, scenes):
    labels = torch.tensor([[1, 2, 3, 6], [3, 6, -100, -100]])
    model(**scenes, labels=labels).loss.backward()
    whole = model.head.query_proj.weight.grad.clone()
    model.zero_grad()
    for row in range(2):
        scene = {name: tensor[row : row + 1] for name, tensor in scenes.items()}
        model(**scene, labels=labels[row : row + 1], num_items_in_batch=torch.tensor(6)).loss.backward()
    torch.testing.assert_close(model.head.query_proj.weight.grad, whole, **TOLERANCE)


def test_linear_head_is_an_ablation(scenes):
    model = OATForScanpathPrediction(OATConfig.from_variant("tiny", scanpath_head="linear")).eval()
    assert model(**scenes).logits.shape == (2, 1, 8)
    with pytest.raises(ValueError, match="classes for 6 objects"):
        model(scenes["pixel_values"][:, :5], torch.tensor([1, 2]), torch.zeros(2, 5, 2, dtype=torch.long))


def test_a_fresh_process_loads_what_was_saved(model, scenes, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForScanpathPrediction.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    torch.save({**scenes, "logits": model(**scenes).logits.detach()}, tmp_path / "expected.pt")
    script = (
        "import sys, torch, hf_attn; d = sys.argv[1]; e = torch.load(d + '/expected.pt'); logits = e.pop('logits');"
        "m = hf_attn.AutoModelForScanpathPrediction.from_pretrained(d); torch.testing.assert_close(m(**e).logits, logits)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_half_precision(model, scenes):
    exact = model(**scenes).logits
    half = model.bfloat16()(**scenes).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()


POSITIONS = torch.zeros(2, 6, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_index": None}, "target_index"),
        ({"target_index": torch.tensor([1, 6])}, "target_index 6 is out of range"),
        ({"target_index": torch.tensor([1])}, r"must have the shape \(2,\)"),
        ({"pixel_values": torch.rand(2, 5, *SIZE)}, "grid of the configuration has 2 x 3"),
        ({"pixel_values": torch.rand(2, 6, 1, 24, 20)}, "batch, objects, 3"),
        ({"pixel_values": torch.rand(2, 6, 3, 12, 20)}, "at least 19 x 19"),
        ({"object_positions": POSITIONS[:, :5]}, r"must have the shape \(2, 6, 2\)"),
        ({"object_positions": POSITIONS + 3}, "position table of this model covers 0 to 2"),
        ({"object_mask": torch.zeros(2, 6, dtype=torch.bool)}, "target 1 of a scene is masked out"),
        ({"labels": torch.tensor([[7, 6], [0, 6]])}, "Label 7"),
        ({"labels": torch.tensor([[-1, 6], [0, 6]])}, "Label -1"),
    ],
)
def test_bad_input(model, scenes, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**scenes, **change})


def test_label_of_an_absent_object(model, scenes):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 0] = False
    with pytest.raises(ValueError, match="Label 0"):
        model(**scenes, object_mask=mask, labels=torch.tensor([[0, 6], [0, 6]]))


def test_fixed_pooling_takes_images_of_one_size_only():
    model = OATForScanpathPrediction(OATConfig.from_variant("tiny", pyramid_levels=0, crop_height=30, crop_width=29))
    with pytest.raises(ValueError, match="takes 30 x 29"):
        model(torch.rand(1, 6, 3, 40, 40), torch.tensor([0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pyramid_levels": 1}, "pyramid_levels"),
        ({"scanpath_head": "mlp"}, "scanpath_head"),
        ({"position_encoding": "learned"}, "position_encoding"),
        ({"num_positions": 2}, "must cover the grid"),
        ({"hidden_size": 25}, "hidden_size"),
        ({"crop_height": 10}, "too small"),
        ({"position_sigma": 0}, "position_sigma"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(Exception, match=message):
        OATConfig.from_variant("tiny", **fields)


def test_generate_refuses_other_ids(model, scenes):
    with pytest.raises(ValueError, match="eos_token_id must be 6"):
        model.generate(**scenes, eos_token_id=3)
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(target_index=torch.tensor([1]))


def test_base_model_has_no_head(scenes):
    model = OATModel(OATConfig.from_variant("tiny")).eval()
    output = model(**scenes)
    assert output.last_hidden_state.shape == (2, 1, 24)
    assert output.encoder_last_hidden_state.shape == (2, 7, 24)
