"""Token mixers: definitions against fast forms, causality, padding, continued sequences, properties from the paper."""

import pytest
import torch
from torch.testing import assert_close

from hf_attn import TokenMixer
from hf_attn.mixers import MIXERS, causal_mixers


LENGTH, WIDTH = 23, 6
CASES = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'full'}")
    for name in MIXERS
    for causal in (False, True)
    if not causal or name in causal_mixers()
]


def make(name, causal=False, **options):
    torch.manual_seed(0)
    sizes = {"head_dim": 4, "max_length": 40, "rank": 5, "num_landmarks": 3, "window": 2, "mixing_size": 7}
    return TokenMixer.from_name(name, WIDTH, **{**sizes, **options}, causal=causal, dtype=torch.float64)


def inputs(length=LENGTH, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def test_the_registry_is_that_of_the_card():
    assert set(MIXERS) == {
        *("softmax", "linear_elu", "performer", "linformer", "window", "nystrom_pinv", "fourier", "mlp_mixer"),
        *("spatial_gating", "synthesizer_random", "aft_full", "long_conv", "gram_smoother", "pooling"),
    }
    assert set(MIXERS) - set(causal_mixers()) == {"linformer", "nystrom_pinv", "fourier", "mlp_mixer"}


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_the_fast_form_is_the_definition(name, causal):
    mixer = make(name, causal)
    for length in (1, 2, LENGTH):
        x = inputs(length).requires_grad_()
        try:
            expected = mixer.matrix(x) @ mixer.values(x)
        except NotImplementedError:
            assert name in ("fourier", "mlp_mixer", "spatial_gating", "aft_full", "long_conv")
            return
        mixed = mixer(x)
        assert_close(mixed, expected)
        cotangent = torch.randn_like(mixed)
        assert_close(*(torch.autograd.grad((y * cotangent).sum(), x)[0] for y in (mixed, expected)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("window", 0),
        ("window", 2),
        ("window", 70),
        ("pooling", 0),
        ("pooling", 70),
        ("linear_elu", 1),
        ("performer", 1),
    ],
)
def test_blocks_meet(name, window, causal):
    mixer, x = make(name, causal, window=window), inputs(150)
    assert_close(mixer(x), mixer.matrix(x) @ mixer.values(x))
    assert_close(mixer(x, start=131), mixer(x)[:, 131:])


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_later_tokens_are_seen_unless_causal(name, causal):
    mixer, x = make(name, causal), inputs()
    changed = x.clone()
    changed[:, 12:] += 1
    same = torch.isclose(mixer(x), mixer(changed)).all(-1)
    assert not same[:, 12:].all()
    if causal or name == "long_conv":
        assert same[:, :12].all()
    else:
        assert not same[:, :12].all()


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_padding_on_either_side_changes_nothing(name, causal):
    mixer, x = make(name, causal), inputs(12, batch=4)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, 9:], mask[1, :5], mask[3] = 0, 0, 0
    mixed = mixer(x, mask)
    assert_close(mixed[0, :9], mixer(x[:1, :9])[0])
    assert_close(mixed[1, 5:], mixer(x[1:2, 5:])[0])
    assert_close(mixed[2], mixer(x[2:3])[0])
    assert (mixed[0, 9:] == 0).all() and (mixed[1, :5] == 0).all() and (mixed[3] == 0).all()
    assert_close(mixer(x, mask, start=7), mixed[:, 7:])
    assert_close(mixer(x, start=7), mixer(x)[:, 7:])
    assert mixer(x[:0]).shape[0] == 0


@pytest.mark.parametrize(
    "name", ["softmax", "linear_elu", "performer", "window", "synthesizer_random", "gram_smoother"]
)
def test_rows_sum_to_one(name):
    rows = make(name).matrix(inputs()).sum(-1)
    assert_close(rows, torch.ones_like(rows))


def test_what_equals_softmax():
    x = inputs()
    softmax = make("softmax")

    def like_softmax(name, **options):
        mixer = make(name, **options)
        mixer.load_state_dict(softmax.state_dict(), strict=False)
        return mixer

    expected = softmax(x)
    assert_close(like_softmax("window", window=LENGTH - 1)(x), expected)
    assert_close(like_softmax("nystrom_pinv", num_landmarks=LENGTH)(x), expected)
    linformer = like_softmax("linformer", rank=LENGTH, max_length=LENGTH)
    for projection in (linformer.e, linformer.f):
        torch.nn.init.eye_(projection)
    assert_close(linformer(x), expected)
    errors = [(like_softmax("performer", rank=rank)(x) - expected).abs().mean() for rank in (10, 40_000)]
    assert errors[1] < errors[0] / 10


def test_the_iterative_inverse_is_near_the_exact_one():
    exact, iterative = make("nystrom_pinv"), make("nystrom_pinv", pseudo_inverse="iterative")
    assert not torch.allclose(exact(inputs()), iterative(inputs()), atol=1e-3)
    iterative.iterations = 30
    assert_close(exact(inputs()), iterative(inputs()))


def test_fourier_of_a_constant_and_convolution_with_a_delta():
    constant = torch.ones(1, LENGTH, WIDTH, dtype=torch.float64)
    assert_close(make("fourier")(constant)[:, 1:], torch.zeros(1, LENGTH - 1, WIDTH, dtype=torch.float64))
    delta = make("long_conv")
    with torch.no_grad():
        delta.kernel.zero_()[0] = 1
    assert_close(delta(inputs()), inputs())


# The inverse in nystrom_pinv is nearly singular for such small weights, and amplifies rounding without bound.
@pytest.mark.parametrize("name", [name for name in MIXERS if name != "nystrom_pinv"])
def test_half_precision_stays_near(name):
    mixer, x = make(name), inputs()
    mixed = mixer.bfloat16()(x.bfloat16())
    expected = mixer.double()(x.bfloat16().double())
    assert mixed.dtype == torch.bfloat16
    # 8 bits of mantissa and a few roundings
    assert (mixed.double() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenMixer.from_name("sofmax", 4), "no token mixer 'sofmax'. Mixers: softmax"),
        (lambda: TokenMixer.from_name("fourier", 4, causal=True), "'fourier' has no causal form.*long_conv"),
        (lambda: TokenMixer.from_name("softmax", 0), "hidden_size must be at least 1, got 0"),
        (lambda: TokenMixer.from_name("pooling", 4, window=-1), "window must be at least 0, got -1"),
        (lambda: TokenMixer.from_name("spatial_gating", 5), "hidden_size must be even, got 5"),
        (lambda: TokenMixer.from_name("nystrom_pinv", 4, pseudo_inverse="fast"), "'exact' or 'iterative', got 'fast'"),
        (lambda: make("aft_full")(inputs(41)), "40 positions, but got 41 tokens"),
        (lambda: make("softmax")(inputs()[..., :3]), r"must have the shape \(batch, length, 6\), got \(2, 23, 3\)"),
        (lambda: make("softmax")(inputs(), torch.ones(2, 3)), r"\(2, 23\), got shape \(2, 3\)"),
        (lambda: make("fourier").matrix(inputs()), "'fourier' is not a matrix over tokens"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call()
