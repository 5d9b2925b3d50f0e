"""Random-feature attention: features, fits, kernels, targets, saving, training, the estimator, bad input."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, Trainer, TrainingArguments

from hf_attn import (
    RandomFeatureAttentionConfig,
    RandomFeatureAttentionModel,
    RandomFeatureMLPConfig,
    RandomFeatureMLPModel,
    from_official,
    infinite_head_kernel,
)
from hf_attn.checkpoints.files import ConversionError
from hf_attn.modeling.random_feature_attention.features import attention_features, attention_features_eager
from hf_attn.modeling.random_feature_attention.kernels import relu_product_mean
from hf_attn.modeling.random_feature_attention.ridge import gram_matrix, ridge_values
from hf_attn.modeling.random_feature_attention.targets import sphere, target_function


def inputs(samples=40, keys=3, dim=4, seed=0):
    return sphere(samples, keys + 1, dim, generator=torch.Generator().manual_seed(seed))


def attention(**fields):
    config = RandomFeatureAttentionConfig.from_variant("tiny", dtype="float64", **fields)
    model = RandomFeatureAttentionModel._from_config(config).eval()
    torch.nn.init.normal_(model.value_weight, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize(("samples", "keys"), [(0, 3), (1, 1), (70, 3)])
def test_features_are_those_of_the_equation(samples, keys):
    x, weight = inputs(samples, keys).requires_grad_(), attention().qk_weight
    features, expected = attention_features(x, weight), attention_features_eager(x, weight)
    assert_close(features, expected)
    assert_close(attention_features(x.detach(), weight, block=16), expected)
    cotangent = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad((y * cotangent).sum(), x)[0] for y in (features, expected)))


def test_the_output_is_the_sum_over_heads_and_does_not_see_the_order_of_keys():
    model, x = attention(biased=True), inputs()
    tokens = torch.nn.functional.pad(x, (0, 1), value=1.0)
    direct = sum(
        (torch.einsum("a,ac,c->", row[0], weight, key).relu() * (value @ key) / 3).item()
        for weight, value in zip(model.qk_weight, model.value_weight, strict=True)
        for row in tokens[:1]
        for key in row[1:]
    )
    output = model(x).logits
    assert output[0].item() == pytest.approx(direct)
    assert_close(model(x[:, [0, 3, 1, 2]]).logits, output, rtol=1e-12, atol=1e-12)
    twice = attention(biased=True, num_keys=6)(torch.cat([x, x[:, 1:]], 1)).logits
    assert_close(twice, output, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.qk_weight *= 3
    assert_close(model(x).logits, 3 * output)


def test_the_bias_is_the_identity_without_the_last_coordinate():
    difference = attention(biased=True).qk_weight - attention().qk_weight
    assert_close(difference, torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)).expand(8, 5, 5))


@pytest.mark.parametrize("model_class", [RandomFeatureAttentionModel, RandomFeatureMLPModel])
def test_the_draw_is_saved_frozen_and_that_of_the_seed(model_class, tmp_path):
    config = model_class.config_class.from_variant("tiny", seed=5)
    model = model_class(config)
    frozen = getattr(model, model.frozen_name)
    assert [name for name, _ in model.named_parameters()] == [model.value_name]
    assert_close(frozen, getattr(model_class(config), model.frozen_name), rtol=0, atol=0)
    other = model_class(model_class.config_class.from_variant("tiny", seed=6))
    assert not torch.equal(frozen, getattr(other, model.frozen_name))
    with torch.no_grad():
        frozen.mul_(1.5)
    model.fit_ridge(inputs(), torch.randn(40), 1e-3).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert_close(getattr(loaded, model.frozen_name), frozen, rtol=0, atol=0)
    assert_close(loaded.values, model.values, rtol=0, atol=0)


def test_published_sizes():
    for variant, trained, frozen in (("rfa", 17_000, 289_000), ("brfa_small", 1_800, 16_200)):
        model = RandomFeatureAttentionModel(RandomFeatureAttentionConfig.from_variant(variant))
        assert (model.value_weight.numel(), model.qk_weight.numel()) == (trained, frozen)
    config = RandomFeatureMLPConfig.matching(RandomFeatureAttentionConfig.from_variant("rfa_small"))
    assert config.num_units == 1800 == RandomFeatureMLPConfig.from_variant("rfmlp_small").num_units
    weight = RandomFeatureMLPModel(config).mlp_weight
    assert weight.shape == (1800, 73)
    assert weight.std().item() == pytest.approx(10**-0.5, rel=0.02)
    assert RandomFeatureMLPConfig().num_units * ((1 + 16) * 16 + 1) == 4_641_000


def test_primal_and_dual_agree_for_several_targets_and_minimise():
    features = torch.randn(30, 12, dtype=torch.float64)
    targets = torch.randn(30, 2, dtype=torch.float64)
    primal, dual = (ridge_values(features, targets, 1e-3, solver) for solver in ("primal", "dual"))
    assert_close(primal, dual, rtol=1e-7, atol=1e-9)
    assert_close(ridge_values(features, targets[:, 0], 1e-3), primal[:, 0])
    gradient = features.T @ (features @ primal - targets) / 30 + 1e-3 * primal
    assert gradient.abs().max() < 1e-10
    assert_close(gram_matrix(features), features @ features.T)
    exact = ridge_values(features, features @ primal, 0.0, "primal")
    assert_close(exact, primal)
    # A penalty below the rounding error of the Gram matrix.
    tiny = ridge_values(1e8 * torch.ones(3, 2), torch.ones(3), 1e-9)
    assert_close(1e8 * tiny.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_float32_model_is_fitted_in_float64():
    x = inputs()
    y = target_function(x, sphere(4), "key", 2)
    double = attention().fit_ridge(x, y, 1e-6)
    single = attention().float().fit_ridge(x, y, 1e-6)
    assert single.value_weight.dtype == torch.float32
    exact = attention().float().double().fit_ridge(x, y, 1e-6)
    assert_close(single.value_weight.double(), exact.value_weight, rtol=1e-6, atol=1e-6)
    assert (double(x).logits - y).square().mean() < 0.05 * y.var()


def test_trainer_reaches_the_loss_of_the_ridge_fit(tmp_path):
    x = inputs(64).float()
    y = target_function(x, sphere(4, dtype=torch.float32), "key", 1)
    data = [{"inputs_embeds": tokens, "labels": label} for tokens, label in zip(x, y, strict=True)]
    model = RandomFeatureAttentionModel(RandomFeatureAttentionConfig.from_variant("tiny"))
    before = model.qk_weight.clone()
    options = {"per_device_train_batch_size": 64, "max_steps": 300, "learning_rate": 0.05, "use_cpu": True}
    arguments = TrainingArguments(tmp_path, report_to="none", disable_tqdm=True, save_strategy="no", **options)
    Trainer(model, arguments, train_dataset=data).train()
    with torch.no_grad():
        trained = model(x, labels=y).loss
        fitted = model.fit_ridge(x, y, 1e-9)(x, labels=y).loss
    assert fitted <= trained < fitted + 0.02 * y.var()
    assert torch.equal(model.qk_weight, before)


@pytest.mark.parametrize("biased", [False, True])
def test_many_heads_approach_the_kernel(biased):
    x = inputs(6)
    model = attention(biased=biased, num_heads=20_000)
    features = model.features(x)
    kernel = infinite_head_kernel(x, biased=biased)
    assert (features @ features.T / 20_000 - kernel).abs().max() < 0.05 * kernel.max()
    assert_close(infinite_head_kernel(x[:2], x, biased), kernel[:2])
    assert torch.linalg.eigvalsh(kernel).min() > 0


def test_the_kernel_at_one_key_and_for_other_scales():
    one = infinite_head_kernel(inputs(keys=1))
    assert_close(one.diagonal(), torch.ones(40, dtype=torch.float64), rtol=1e-6, atol=0)
    x = 0.7 * inputs(5)
    model = attention(biased=True, num_heads=40_000, weight_std=0.3)
    features = model.features(x)
    kernel = infinite_head_kernel(x, biased=True, weight_std=0.3)
    assert (features @ features.T / 40_000 - kernel).abs().max() < 0.05 * kernel.max()


@pytest.mark.parametrize(
    ("correlation", "a", "b"), [(0.3, 0.2, -0.5), (0.99, 0.8, 0.3), (0.9999, 0.9, -0.9), (0.0, 1, 1)]
)
def test_the_biased_kernel_is_the_closed_form_of_the_card(correlation, a, b):
    stats = pytest.importorskip("scipy.stats")
    sine = math.sqrt(1 - correlation**2)
    joint = stats.multivariate_normal(cov=[[1, correlation], [correlation, 1]], allow_singular=True)
    expected = (
        (a * b + correlation) * joint.cdf([a, b])
        + a * stats.norm.pdf(b) * stats.norm.cdf((a - correlation * b) / sine)
        + b * stats.norm.pdf(a) * stats.norm.cdf((b - correlation * a) / sine)
        + (1 - correlation**2) * joint.pdf([a, b])
    )
    value = relu_product_mean(*(torch.tensor(float(number), dtype=torch.float64) for number in (correlation, a, b)))
    assert value.item() == pytest.approx(expected, abs=1e-7)


def test_targets():
    x, beta = inputs(5), sphere(4)
    query, keys = x[:, 0], x[:, 1:]
    assert_close(target_function(x, beta, "query", 3), (query @ beta) ** 3)
    assert_close(target_function(x, beta, "key", 2), ((keys @ beta) ** 2).mean(1))
    products = torch.stack([(query * keys[:, i]).sum(1) for i in range(3)], 1)
    assert_close(target_function(x, beta, "corr", 2), (products**2).mean(1))
    corr = target_function(x, beta, "corr", 3, 1)
    assert_close(corr, (products**3 * (keys @ beta)).mean(1))
    mixed = target_function(x, beta, "mixture", 3, 1, mixing=0.25, key_power=2)
    assert_close(mixed, 0.25 * corr + 0.75 * target_function(x, beta, "key", 2))


def test_the_estimator_passes_the_checks_of_scikit_learn_and_takes_sequences():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV
    from sklearn.utils.estimator_checks import check_estimator

    from hf_attn import RandomFeatureAttentionRegressor

    results = check_estimator(RandomFeatureAttentionRegressor(num_heads=20, input_dim=1, random_state=0), on_skip=None)
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"} and len(results) > 40
    x = inputs(200)
    y = target_function(x, sphere(4), "key", 2).numpy()
    search = GridSearchCV(RandomFeatureAttentionRegressor(60, random_state=0), {"penalty": [1e-6, 10.0]}, cv=3)
    search.fit(x[:150].numpy(), y[:150])
    assert search.best_params_ == {"penalty": 1e-6}
    assert search.score(x[150:].numpy(), y[150:]) > 0.8
    flat = RandomFeatureAttentionRegressor(60, input_dim=4, random_state=0).fit(x[:150].flatten(1).numpy(), y[:150])
    np.testing.assert_allclose(flat.predict(x.flatten(1).numpy()), search.predict(x.numpy()))
    for rows, message in (
        (x.flatten(1), "set input_dim"),
        (x[:, :1], "at least one key"),
        (x[..., None], "two axes with input_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomFeatureAttentionRegressor(5).fit(rows.numpy(), y)


def test_conversion_names_what_does_not_fit():
    weights = {"qk_weight": torch.zeros(6, 5, 5), "value_weight": torch.zeros(6, 5)}
    config = {"num_keys": 3}
    assert from_official("random_feature_attention", weights, config).config.num_heads == 6
    for change, message in (
        ({"activation": "softmax"}, "must be relu, got 'softmax'"),
        ({"num_heads": 7}, "num_heads=6, but the configuration says 7"),
        ({"bised": True}, "Did you mean biased"),
    ):
        with pytest.raises(ConversionError, match=message):
            from_official("random_feature_attention", weights, {**config, **change})
    with pytest.raises(ConversionError, match="mlp_weight"):
        from_official("random_feature_attention", weights | {"mlp_weight": torch.zeros(9, 17)}, config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention()(inputs(keys=4)), r"must have the shape \(batch, 4, 4\).*got \(40, 5, 4\)"),
        (lambda: attention()(), "inputs_embeds of shape .* is required"),
        (lambda: attention()(inputs(), labels=torch.ones(3)), r"labels must have the shape \(40,\).*got \(3,\)"),
        (lambda: attention().fit_ridge(inputs(), torch.ones(40), -1e-3), "at least 0, got -0.001"),
        (lambda: attention().fit_ridge(inputs(), torch.ones(40), math.nan), "at least 0, got nan"),
        (lambda: attention().fit_ridge(inputs(), torch.ones(39), 1e-3), r"labels must have the shape \(40,\)"),
        (lambda: attention().fit_ridge(inputs(0), torch.ones(0), 1e-3), "at least one sample, got none"),
        (lambda: attention().fit_ridge(inputs(), torch.full((40,), math.nan), 1e-3), "NaN or infinity"),
        (lambda: attention().fit_ridge(inputs(), torch.ones(40), 1.0, "qr"), "'dual', got 'qr'"),
        (lambda: ridge_values(torch.ones(3, 2), torch.ones(3), 0.0), "singular: use a lambda above 0"),
        (lambda: infinite_head_kernel(inputs()[:, :1]), "at least one key"),
        (lambda: infinite_head_kernel(inputs(), weight_std=0), "must be positive, got 0"),
        (lambda: target_function(inputs(), sphere(4), "keys"), "no target 'keys'. Targets: query, key"),
        (lambda: target_function(inputs(), sphere(5), "key"), r"beta must be \(4,\)"),
        (lambda: RandomFeatureAttentionConfig(num_heads=0), "num_heads=0 is out of range"),
        (lambda: RandomFeatureAttentionConfig(weight_std=0.0), "weight_std=0.0 is out of range"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(Exception, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError) or "Strict" in type(caught.value).__name__
