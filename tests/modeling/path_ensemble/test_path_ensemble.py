"""Path ensemble: equivalence with its bases, pruning, scaling, self-distillation, and bad input."""

from functools import partial

import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError
from hf_attn.modeling.path_ensemble.configuration_path_ensemble import PathEnsembleConfig
from hf_attn.modeling.path_ensemble.modeling_path_ensemble import (
    PathEnsembleForImageClassification,
    path_distance,
    path_divergence,
)
from tests.batteries.imaging import ImageFamilyTests, randomize


tiny_config = partial(PathEnsembleConfig.from_variant, "tiny", pruned_paths=[], ensemble_scale=None)


class TestPathEnsemble(ImageFamilyTests):
    def get_config(self, **overrides):
        return tiny_config(**{"pruned_paths": [0], "ensemble_scale": "channel", **overrides})

    def test_unknown_variant_lists_the_known_ones(self):
        """The paper publishes no sizes of its own."""
        assert not PathEnsembleConfig.variants

    test_variant_takes_labels_by_name = test_unknown_variant_lists_the_known_ones
    test_image_processor_of_the_published_variants = test_unknown_variant_lists_the_known_ones
    test_published_variants_know_the_classes_of_imagenet = test_unknown_variant_lists_the_known_ones
    test_parameters_of_the_published_variants = test_unknown_variant_lists_the_known_ones


# --- bases ------------------------------------------------------------------------------------------------------------


SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_labels": 5,
}
TIMM_SIZES = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def timm_model(**arguments) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.models.VisionTransformer(**TIMM_SIZES, **arguments))


def timm_wrapper() -> nn.Module:
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args={"img_size": 32, "depth": 2}, num_labels=5
    )
    return TimmWrapperForImageClassification(config)


BASES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES)),
    "vit_without_qkv_bias": lambda: ViTForImageClassification(ViTConfig(**SIZES, qkv_bias=False)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SIZES)),
    "deit_with_teacher": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES)),
    "timm_token": lambda: timm_model(),
    "timm_mean_layer_scale": lambda: timm_model(global_pool="avg", init_values=0.1),
    "timm_mean_norm_first": lambda: timm_model(global_pool="avg", fc_norm=False),
    "timm_distilled": lambda: timm.models.deit.VisionTransformerDistilled(**TIMM_SIZES),
    "timm_wrapper": timm_wrapper,
}


def logits_of(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(pixel_values)
    return output if isinstance(output, torch.Tensor) else output.logits


def images_for(model: PathEnsembleForImageClassification) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, model.config.image_size, model.config.image_size, generator=generator)


@pytest.mark.parametrize("granularity", ["layer", "branch"])
@pytest.mark.parametrize("base", BASES)
def test_equals_its_base_before_pruning(base, granularity):
    base = randomize(BASES[base]())
    model = PathEnsembleForImageClassification.from_base(base, granularity=granularity)
    pixel_values = images_for(model)
    expected = logits_of(base, pixel_values)
    torch.testing.assert_close(logits_of(model, pixel_values), expected, rtol=0, atol=1e-5)
    assert model.base_report.new == () and model.base_report.dropped == ()
    assert model.base_report.kept_parameters == model.num_parameters()

    scaled = PathEnsembleForImageClassification.from_base(base, granularity=granularity, ensemble_scale="channel")
    assert scaled.base_report.new == ("vit.ensemble_scale",)
    assert scaled.base_report.new_parameters == scaled.config.num_paths * scaled.config.hidden_size
    torch.testing.assert_close(logits_of(scaled, pixel_values), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["vit", "deit", "deit_with_teacher", "timm_wrapper"])
def test_from_a_saved_base(base, tmp_path):
    base = randomize(BASES[base]())
    base.save_pretrained(tmp_path)
    model = PathEnsembleForImageClassification.from_base(tmp_path, pruned_paths=[0, 1])
    assert model.config.pruned_paths == [0, 1] and model.config.num_labels == 5
    model.prune([])
    pixel_values = images_for(model)
    torch.testing.assert_close(logits_of(model, pixel_values), logits_of(base, pixel_values), rtol=0, atol=1e-5)


def test_labels_of_the_base_are_kept():
    names = {0: "ant", 1: "bee", 2: "cat"}
    base = ViTForImageClassification(ViTConfig(**{**SIZES, "num_labels": 3}, id2label=names))
    assert PathEnsembleForImageClassification.from_base(base).config.id2label == names


@pytest.mark.parametrize(("hidden_size", "layers", "parameters"), [(384, 12, 4992), (192, 12, 2496), (768, 12, 9984)])
def test_parameters_of_ensemble_scale(hidden_size, layers, parameters):
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers}
    with torch.device("meta"):
        plain = PathEnsembleForImageClassification(PathEnsembleConfig(**sizes))
        scaled = PathEnsembleForImageClassification(PathEnsembleConfig(**sizes, ensemble_scale="channel"))
        single = PathEnsembleForImageClassification(PathEnsembleConfig(**sizes, ensemble_scale="scalar"))
        base = ViTForImageClassification(ViTConfig(**sizes))
    assert plain.num_parameters() == base.num_parameters()
    assert scaled.num_parameters() - plain.num_parameters() == parameters
    assert single.num_parameters() - plain.num_parameters() == layers + 1


# --- paths ------------------------------------------------------------------------------------------------------------


def tiny_model(**overrides) -> PathEnsembleForImageClassification:
    return randomize(PathEnsembleForImageClassification(tiny_config(num_hidden_layers=3, num_labels=4, **overrides)))


@pytest.mark.parametrize(("granularity", "num_paths"), [("layer", 4), ("branch", 7)])
def test_paths_sum_to_the_output(granularity, num_paths):
    model = tiny_model(granularity=granularity)
    outputs = model(images_for(model), output_paths=True, output_hidden_states=True)
    assert len(outputs.paths) == num_paths == model.config.num_paths == len(model.config.path_names)
    torch.testing.assert_close(sum(outputs.paths), outputs.hidden_states[-1])
    step = 1 if granularity == "layer" else 2
    for layer in range(3):
        partial = sum(outputs.paths[: step * (layer + 1) + 1])
        torch.testing.assert_close(partial, outputs.hidden_states[layer + 1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_dropping_the_first_paths_leaves_a_difference(count):
    model = tiny_model()
    pixel_values = images_for(model)
    before = model.vit(pixel_values, output_hidden_states=True)
    model.prune(range(count))
    after = model.vit(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(after.ensemble, before.hidden_states[-1] - before.hidden_states[count - 1])
    for pruned, whole in zip(after.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(pruned, whole)


def test_pruning_is_saved_and_undone(tmp_path):
    model = tiny_model()
    pixel_values = images_for(model)
    whole = logits_of(model, pixel_values)
    model.prune([0, 2])
    pruned = logits_of(model, pixel_values)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, pixel_values), pruned) and not torch.allclose(pruned, whole)
    model.prune([])
    assert torch.equal(logits_of(model, pixel_values), whole)


def test_scales_do_not_reach_the_chain_and_pruned_ones_learn_nothing():
    model = tiny_model(ensemble_scale="channel", pruned_paths=[1])
    pixel_values = images_for(model)
    hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
    with torch.no_grad():
        model.vit.ensemble_scale.copy_(torch.rand_like(model.vit.ensemble_scale) + 0.5)
    outputs = model(pixel_values, output_hidden_states=True)
    for scaled, whole in zip(outputs.hidden_states, hidden_states, strict=True):
        assert torch.equal(scaled, whole)
    outputs.logits.square().sum().backward()
    gradient = model.vit.ensemble_scale.grad
    assert (gradient[1] == 0).all()
    assert all(gradient[index].abs().max() > 0 for index in (0, 2, 3))


def test_one_scale_for_all_paths_changes_nothing():
    model = tiny_model(ensemble_scale="scalar")
    pixel_values = images_for(model)
    with torch.no_grad():
        model.vit.ensemble_scale.fill_(1.0)
        one = model(pixel_values).logits
        model.vit.ensemble_scale.fill_(3.0)
        three = model(pixel_values).logits
    # the epsilon of the final norm
    torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-5)


def test_path_logits_are_those_of_pruned_models():
    model = tiny_model(ensemble_scale="channel", granularity="branch", pruned_paths=[3])
    pixel_values = images_for(model)
    with torch.no_grad():
        logits = model.path_logits(pixel_values)
    torch.testing.assert_close(logits.ensemble, logits_of(model, pixel_values))
    torch.testing.assert_close(logits.without[3], logits.ensemble)
    for path in (0, 2, 6):
        model.prune([3, path])
        torch.testing.assert_close(logits.without[path], logits_of(model, pixel_values))
    with torch.no_grad():
        model.vit.ensemble_scale.fill_(1.0)
        model.prune([index for index in range(7) if index != 4])
    torch.testing.assert_close(logits.alone[4], logits_of(model, pixel_values))


# --- self-distillation ------------------------------------------------------------------------------------------------


def test_losses_vanish_for_the_teacher_itself_and_spare_the_teacher():
    teacher_logits, logits = torch.randn(5, 4, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    assert path_divergence(teacher_logits[None], teacher_logits, 3.0).abs().max() < 1e-6
    divergence = path_divergence(logits, teacher_logits, 3.0)
    expected = nn.functional.kl_div(
        (logits[1] / 3).log_softmax(-1), (teacher_logits / 3).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(divergence[1], 9 * expected)
    divergence.sum().backward()
    assert teacher_logits.grad is None and logits.grad.abs().max() > 0

    teacher, path = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    assert path_distance([teacher], teacher).item() == 0
    torch.testing.assert_close(path_distance([path], teacher)[0], (path - teacher).square().mean())
    path_distance([path], teacher).sum().backward()
    assert teacher.grad is None and path.grad.abs().max() > 0


@pytest.mark.parametrize("teacher", ["longest", "ensemble"])
def test_losses_of_self_distillation(teacher):
    weights = {"distillation_logits_weight": 0.5, "distillation_hidden_weight": 0.25}
    model = tiny_model(**weights, distillation_teacher=teacher, distillation_temperature=2.0, pruned_paths=[0])
    pixel_values, labels = images_for(model), torch.tensor([1, 3])
    outputs = model(pixel_values, labels=labels)
    paths = model.vit(pixel_values, output_paths=True)
    longest = teacher == "longest"
    logits = model.classify(paths.paths[-1]) if longest else outputs.logits
    students = torch.stack([model.classify(path) for path in paths.paths[:-1]])
    divergence = path_divergence(students, logits, 2.0).mean()
    distance = path_distance(paths.paths[:-1], paths.paths[-1] if longest else paths.ensemble).mean()
    torch.testing.assert_close(outputs.distillation_logits_loss, divergence)
    torch.testing.assert_close(outputs.distillation_hidden_loss, distance)
    task = nn.functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, task + 0.5 * divergence + 0.25 * distance)
    assert outputs.paths is None


def test_only_the_students_that_are_named_learn():
    model = tiny_model(distillation_hidden_weight=1.0, distillation_students=[2])
    pixel_values = images_for(model)
    paths = model.vit(pixel_values, output_paths=True).paths
    outputs = model(pixel_values, labels=torch.tensor([0, 0]))
    torch.testing.assert_close(outputs.distillation_hidden_loss, path_distance([paths[2]], paths[3])[0])
    assert outputs.distillation_logits_loss is None


# --- bad input --------------------------------------------------------------------------------------------------------


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"pruned_paths": [0, 1, 2]}, r"All paths are pruned.*Keep at least one"),
            ({"pruned_paths": [3]}, r"between 0 and 2 .*got \[3\]"),
            ({"pruned_paths": [1, 1]}, r"must not repeat"),
            ({"distillation_students": [5]}, r"distillation_students must be between 0 and 2"),
            ({"distillation_students": []}, r"distillation_students is empty"),
            ({"distillation_temperature": 0}, r"distillation_temperature=0 is out of range: it must be above 0"),
            ({"distillation_head": True}, r"needs distillation_token"),
        ],
    )
    def test_configuration(self, overrides, message):
        with pytest.raises(StrictDataclassError, match=message):
            tiny_config(**overrides)

    def test_pruning(self):
        model = tiny_model()
        model.prune([1])
        for paths, message in (([0, 1, 2, 3], "All paths are pruned"), ([4], "between 0 and 3")):
            with pytest.raises(ValueError, match=message):
                model.prune(paths)
        assert model.config.pruned_paths == [1]

    def test_base_of_another_architecture(self):
        base = AutoModelForImageClassification.from_config(
            Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=14)
        )
        with pytest.raises(ValueError, match=r"model of type 'dinov2'.*ViT, DeiT"):
            PathEnsembleForImageClassification.from_base(base)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"class_token": False, "global_pool": "avg"}, "no class token"),
            ({"reg_tokens": 2}, "register tokens"),
            ({"pre_norm": True}, "norm before the blocks"),
            ({"qk_norm": True}, "normalised queries and keys"),
        ],
    )
    def test_timm_model_with_other_parts(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PathEnsembleForImageClassification.from_base(timm.models.VisionTransformer(**TIMM_SIZES, **arguments))

    def test_timm_architecture_that_is_no_vision_transformer(self):
        base = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=3))
        with pytest.raises(ValueError, match="'resnet10t', which is a ResNet"):
            PathEnsembleForImageClassification.from_base(base)

    def test_weights_of_something_else(self):
        with pytest.raises(ConversionError, match="not weights of a supported vision transformer"):
            from_official("path_ensemble", {"conv.weight": torch.zeros(1)})

    def test_leftover_weights(self):
        base = timm_model()
        weights = {**base.state_dict(), "norm_pre.weight": torch.zeros(24)}
        config = {**TIMM_SIZES, "qkv_bias": True}
        with pytest.raises(ConversionError, match="norm_pre"):
            from_official("path_ensemble", weights, config=config)
