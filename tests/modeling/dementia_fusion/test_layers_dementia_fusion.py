"""The layers behind the encoders against loops over the card's equations, through the converter."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_attn.architectures.transport import entropic_plan, squared_distances, transported
from hf_attn.checkpoints.official import ConversionError, from_official
from hf_attn.modeling.dementia_fusion.configuration_dementia_fusion import DementiaFusionConfig
from hf_attn.modeling.dementia_fusion.layers import ContextAttention


WIDTH, HEADS, LAYERS = 12, 3, 3
CONTEXT_WIDTHS = {"global": 1, "deep": LAYERS - 1, "deep-global": LAYERS}
HEAD = {"num_heads": HEADS, "label_smoothing": 0.2, "ot_iters": 30}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def attention_weights(kind: str, generator, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random weights under the official names."""
    width = WIDTH // HEADS
    shapes = {f"{name}.weight": (WIDTH, WIDTH) for name in ("query", "key", "value")}
    shapes |= {f"{name}.bias": (WIDTH,) for name in ("query", "key", "value")}
    if kind in CONTEXT_WIDTHS:
        for side in ("query", "key"):
            shapes[f"context_{side}.weight"] = (WIDTH, CONTEXT_WIDTHS[kind] * WIDTH)
            shapes |= {f"gate_{side}_{what}.weight": (1, WIDTH) for what in ("hidden", "context")}
    else:
        out = {"channel": 2 * width, "scalar": 2}[kind]
        shapes |= {"gate_q.weight": (width, width), "gate_q.bias": (width,), "gate_out.weight": (out, width)}
        shapes |= {"gate_k.weight": (width, width), "gate_k.bias": (width,), "gate_out.bias": (out,)}
    return {prefix + name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T.numpy() + (
        weights[f"{name}.bias"].numpy() if f"{name}.bias" in weights else 0
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def attend(weights: dict, kind: str, states: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`states` `(layers, length, width)` -> `(length, width)`, token by token."""
    hidden, size = states[-1], WIDTH // HEADS
    sides = {side: linear(weights, side, hidden) for side in ("query", "key", "value")}
    if kind in CONTEXT_WIDTHS:
        context = {
            "global": np.tile(hidden[valid].mean(0), (len(hidden), 1)),
            "deep": np.concatenate(states[:-1], axis=-1),
            "deep-global": np.tile(np.concatenate([layer[valid].mean(0) for layer in states]), (len(hidden), 1)),
        }[kind]
        for side in ("query", "key"):
            around = linear(weights, f"context_{side}", context)
            share = linear(weights, f"gate_{side}_hidden", sides[side]) + linear(
                weights, f"gate_{side}_context", around
            )
            sides[side] = (1 - sigmoid(share)) * sides[side] + sigmoid(share) * around
    output = np.zeros_like(hidden)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        query, key, value = (sides[side][:, part] for side in ("query", "key", "value"))
        if kind not in CONTEXT_WIDTHS:
            gate = sigmoid(
                linear(weights, "gate_out", linear(weights, "gate_q", query) * linear(weights, "gate_k", key))
            )
            half = gate.shape[1] // 2
            query, key = query * gate[:, :half], key * gate[:, half:]
        for i in range(len(hidden)):
            scores = np.exp(query[i] @ key[valid].T / np.sqrt(size))
            output[i, part] = scores @ value[valid] / scores.sum()
    return output


def arguments(kind: str) -> dict:
    return {"context": kind} if kind in CONTEXT_WIDTHS else {"intra": "gate", "gate": kind}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["global", "deep", "deep-global", "channel", "scalar"])
def test_attention_within_a_modality(kind, implementation, generator):
    weights = attention_weights(kind, generator)
    layer = from_official("dementia_fusion", weights, config={"num_heads": HEADS, **arguments(kind)})
    layer.config._attn_implementation = implementation
    states = torch.randn(LAYERS, 7, WIDTH, generator=generator)
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 0]).bool()
    output, _ = layer(list(states[:, None]), valid[None])
    expected = attend(weights, kind, states.double().numpy(), valid.numpy())
    np.testing.assert_allclose(output[0].detach().numpy(), expected, atol=2e-6)


def head_weights(kind: str, fusion: str, streams: int, generator) -> dict[str, torch.Tensor]:
    weights = {}
    for prefix in ("text_attention.", "image_attention."):
        weights |= attention_weights(kind, generator, prefix)
    width = WIDTH if fusion == "attention" else streams * WIDTH
    shapes = {"fusion.proj.weight": (WIDTH, width), "fusion.proj.bias": (WIDTH,)}
    shapes |= {"classifier.weight": (3, WIDTH), "classifier.bias": (3,)}
    if fusion == "attention":
        shapes["fusion.score.weight"] = (1, WIDTH)
    return weights | {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def transport(source: np.ndarray, target: np.ndarray, cross: str) -> np.ndarray:
    ot = pytest.importorskip("ot")
    cost = np.array([[((s - t) ** 2).sum() for t in target] for s in source])
    cost /= cost.max()
    a, b = (np.full(size, 1 / size) for size in cost.shape)
    if cross == "emd":
        plan = ot.emd(a, b, cost)
    else:  # POT updates the columns first
        plan = ot.bregman.sinkhorn_log(b, a, cost.T.copy(), 0.1, numItermax=HEAD["ot_iters"], stopThr=0, warn=False).T
    return plan / plan.sum(1, keepdims=True) @ target


@pytest.mark.parametrize(
    ("kind", "cross", "fusion"),
    [
        ("global", "sinkhorn", "attention"),
        ("deep", "emd", "concat"),
        ("deep-global", "none", "attention"),
        ("channel", "sinkhorn", "concat"),
        ("scalar", "none", "concat"),
    ],
)
def test_the_whole_head(kind, cross, fusion, generator):
    weights = head_weights(kind, fusion, 2 if cross == "none" else 4, generator)
    head = from_official("dementia_fusion", weights, config={**HEAD, **arguments(kind), "cross": cross})
    text = torch.randn(2, LAYERS, 6, WIDTH, generator=generator)
    image = torch.randn(2, LAYERS, 5, WIDTH, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    labels = torch.tensor([2, 0])
    output = head(text.unbind(1), image.unbind(1), mask, labels)

    logits = []
    for sample in range(2):
        valid = mask[sample].bool().numpy()
        sides = {
            name: {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
            for name in ("text_attention.", "image_attention.")
        }
        own = attend(sides["text_attention."], kind, text[sample].double().numpy(), valid)[valid]
        other = attend(sides["image_attention."], kind, image[sample].double().numpy(), np.ones(5, dtype=bool))
        streams = [own.mean(0), other.mean(0)]
        if cross != "none":
            streams += [transport(own, other, cross).mean(0), transport(other, own, cross).mean(0)]
        streams = np.stack(streams)
        np.testing.assert_allclose(output.interaction.streams[sample].detach().numpy(), streams, atol=3e-6)
        if fusion == "attention":
            scores = np.exp(linear(weights, "fusion.score", np.tanh(linear(weights, "fusion.proj", streams))))[:, 0]
            fused = scores / scores.sum() @ streams
            np.testing.assert_allclose(
                output.fusion_weights[sample].detach().numpy(), scores / scores.sum(), atol=3e-6
            )
        else:
            fused = np.maximum(linear(weights, "fusion.proj", streams.reshape(-1)), 0)
        logits.append(linear(weights, "classifier", fused))
    np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-5)
    targets = 0.8 * F.one_hot(labels, 3) + 0.2 / 3
    expected = -(targets * torch.tensor(np.array(logits)).log_softmax(-1)).sum(-1).mean()
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_arguments_that_contradict_the_weights(generator):
    with pytest.raises(ConversionError, match="fusion=attention"):
        weights = head_weights("global", "attention", 4, generator)
        from_official("dementia_fusion", weights, config={**HEAD, "fusion": "concat"})
    with pytest.raises(ConversionError, match="intra=gate"):
        weights = attention_weights("channel", generator)
        from_official("dementia_fusion", weights, config={"num_heads": HEADS, "intra": "context"})
    with pytest.raises(ConversionError, match="num_heads"):
        from_official("dementia_fusion", attention_weights("deep", generator))
    with pytest.raises(ConversionError, match="ot_sweeps"):
        weights = head_weights("global", "attention", 4, generator)
        from_official("dementia_fusion", weights, config={**HEAD, "ot_sweeps": 5})


def tiny_layer(share: float) -> ContextAttention:
    config = DementiaFusionConfig.from_variant("tiny")
    config._attn_implementation = "eager"
    layer = ContextAttention(config, "text")
    for gate in (layer.query_gate, layer.key_gate):
        gate.forward = lambda hidden, context: torch.full_like(hidden[..., :1], share)
    return layer


def test_without_context_it_is_plain_attention(generator):
    layer = tiny_layer(0.0)
    states = torch.randn(2, 5, 16, generator=generator)
    query, key, value = (
        proj(states).view(2, 5, 2, 8).transpose(1, 2) for proj in (layer.query_proj, layer.key_proj, layer.value_proj)
    )
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer([states])[0], expected)


def test_with_nothing_but_context_all_rows_are_the_same(generator):
    output, _ = tiny_layer(1.0)([torch.randn(2, 5, 16, generator=generator)])
    torch.testing.assert_close(output, output[:, :1].expand_as(output))


def test_text_is_carried_into_the_hull_of_the_image(generator):
    source, target = torch.randn(1, 6, 4, generator=generator), torch.rand(1, 9, 4, generator=generator)
    moved = transported(entropic_plan(squared_distances(source, target), 0.1), target)
    assert (moved <= target.amax(1, keepdim=True) + 1e-6).all() and (
        moved >= target.amin(1, keepdim=True) - 1e-6
    ).all()
