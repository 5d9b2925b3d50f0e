"""The runner detects every kind of failure, and two adapters support cases that are not in the repository.

The additional cases are computed here, in NumPy and from the papers' equations, not by the code under test.
"""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from .__main__ import main
from .case import Case, find_cases
from .runner import run_case


HERE = Path(__file__).parent
ACTIVATIONS = HERE / "sigmoid_attention" / "activations"


@pytest.fixture
def case_folder(tmp_path) -> Path:
    """A copy of a small case that passes."""
    return Path(shutil.copytree(ACTIVATIONS, tmp_path / "sigmoid_attention" / "activations"))


def edit(folder: Path, **changes) -> None:
    """Change entries of `case.json`."""
    path = folder / "case.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_array(folder: Path, name: str, function) -> None:
    """Apply a function to an array of the case."""
    arrays = load_file(folder / "io.safetensors")
    arrays[name] = function(arrays[name]).contiguous()
    save_file(arrays, folder / "io.safetensors")


# --- what makes a case fail ------------------------------------------------------------------------------------------


def test_a_case_passes_and_says_how_closely(case_folder, capsys):
    assert main([str(case_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pass  sigmoid_attention/activations: 3 arrays compared, worst error 0.0")
    assert lines[-1] == "1 of 1 cases passed"


def test_error_is_measured_as_a_fraction_of_the_tolerance(case_folder):
    edit(case_folder, tolerance={"atol": 0.02, "rtol": 0.0})
    edit_array(case_folder, "sigmoid", lambda array: array + 0.01)
    result = run_case(Case(case_folder))
    assert result.passed
    assert result.compared["sigmoid"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda array: array + torch.eye(7) * 1e-3, "beyond tolerance .atol 1e-06, rtol 1e-05.; the worst, at"),
        (lambda array: array[:1], r"shape \(2, 3, 7, 7\) instead of \(1, 3, 7, 7\)"),
        (lambda array: (array * 10).long(), "torch.float32 instead of torch.int64"),
        (lambda array: array.masked_fill(array > 0.9, float("nan")), "instead of nan"),
        (lambda array: array.masked_fill(array > 0.9, float("inf")), "instead of inf"),
    ],
    ids=["value", "shape", "dtype", "nan", "infinity"],
)
def test_differences_fail(case_folder, spoil, problem, capsys):
    edit_array(case_folder, "sigmoid", spoil)
    assert main([str(case_folder)]) == 1
    output = capsys.readouterr().out
    assert output.startswith("FAIL  sigmoid_attention/activations")
    assert re.search(f"sigmoid: .*{problem}", output)


def test_an_expected_array_that_is_not_computed_fails(case_folder):
    arrays = load_file(case_folder / "io.safetensors")
    save_file(arrays | {"softplus": torch.zeros(2)}, case_folder / "io.safetensors")
    assert run_case(Case(case_folder)).problems == ["softplus: expected array not computed"]


def test_an_input_that_is_not_used_fails(case_folder):
    """An option of the case that an adapter overlooks."""
    arrays = load_file(case_folder / "io.safetensors")
    save_file(arrays | {"key_mask": torch.ones(2)}, case_folder / "io.safetensors")
    edit(case_folder, inputs={"logits": "", "key_mask": ""})
    assert run_case(Case(case_folder)).problems == ["key_mask: input not used"]


def test_a_case_that_compares_nothing_fails(case_folder):
    save_file({"logits": load_file(case_folder / "io.safetensors")["logits"]}, case_folder / "io.safetensors")
    assert run_case(Case(case_folder)).problems == ["nothing was compared"]


def test_an_output_cannot_pass_as_an_input(case_folder):
    edit(case_folder, outputs={"logits": "", "sigmoid": ""}, inputs={})
    assert "takes 'logits' as an input, but it is an output" in run_case(Case(case_folder)).problems[0]


def test_cases_that_cannot_be_run_fail(case_folder):
    edit(case_folder, paper="no_such_paper")
    assert "add tests/goldens/adapters/no_such_paper.py" in run_case(Case(case_folder)).problems[0]
    edit(case_folder, paper="sigmoid_attention", entry="no_such_entry")
    assert "KeyError: 'no_such_entry'" in run_case(Case(case_folder)).problems[0]
    (case_folder / "case.json").write_text("{")
    assert "cannot be read" in run_case(Case(case_folder)).problems[0]


def test_a_folder_without_cases_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert f"There is no case.json in or below {tmp_path}" in capsys.readouterr().err


def test_cases_are_found_at_any_depth():
    everything = [case.folder for case in find_cases(HERE)]
    assert [case.folder for case in find_cases(ACTIVATIONS)] == [ACTIVATIONS]
    assert len(find_cases(HERE / "sigmoid_attention")) == 7
    assert ACTIVATIONS in everything and len(everything) == len(set(everything))


def test_tolerances(case_folder):
    edit(
        case_folder,
        tolerance={"atol": 1.0, "rtol": 0.1},
        tolerance_grad={"atol_relative_to_max": 0.5},
        tolerance_overrides={"log*": {"atol": 3.0, "rtol": 0.3}, "grad_b": {"atol": 4.0, "rtol": 0.4}},
    )
    case = Case(case_folder)
    case.arrays["grad_a"] = torch.tensor([-8.0, 2.0])
    assert case.tolerance("sigmoid") == (1.0, 0.1)
    assert case.tolerance("logits") == (3.0, 0.3)
    assert case.tolerance("grad_a") == (4.0, 0.0)
    assert case.tolerance("grad_b") == (4.0, 0.4)


# --- further cases ---------------------------------------------------------------------------------------------------


def write_case(
    folder: Path, entry: str, config: dict, inputs: dict, outputs: dict, weights: dict | None = None
) -> Case:
    folder.mkdir(parents=True)
    description = {
        "paper": "sigmoid_attention",
        "entry": entry,
        "config": config,
        "inputs": dict.fromkeys(inputs, ""),
        "outputs": dict.fromkeys(outputs, ""),
        "tolerance": {"atol": 2e-5, "rtol": 2e-4},
    }
    (folder / "case.json").write_text(json.dumps(description))

    def as_tensors(arrays: dict) -> dict[str, torch.Tensor]:
        return {
            name: torch.as_tensor(array, dtype=torch.int64 if array.dtype.kind in "iu" else torch.float32).contiguous()
            for name, array in arrays.items()
        }

    save_file(as_tensors(inputs | outputs), folder / "io.safetensors")
    save_file(as_tensors(weights or {"_none": np.zeros(1)}), folder / "weights.safetensors")
    return Case(folder)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("causal", "window", "alibi", "masked", "sizes"),
    [
        (False, (-1, -1), True, True, (7, 11, 6, 2)),
        (True, (3, -1), False, True, (9, 9, 4, 4)),
        (True, (3, 0), True, False, (1, 13, 4, 1)),
        (False, (2, 2), True, True, (13, 13, 3, 3)),
        (False, (4, 1), False, True, (8, 12, 4, 2)),
        (False, (-1, 2), True, False, (5, 5, 2, 1)),
        (True, (-1, -1), False, True, (17, 5, 2, 2)),
    ],
)
def test_attention_with_other_options(tmp_path, causal, window, alibi, masked, sizes):
    rng = np.random.default_rng(0)
    q_len, kv_len, heads, kv_heads = sizes
    query, upstream = rng.standard_normal((2, 2, q_len, heads, 8))
    key, value = rng.standard_normal((2, 2, kv_len, kv_heads, 8))
    key_mask = np.ones((2, kv_len), dtype=int)
    key_mask[1, : kv_len // 2] = 0
    slopes = rng.uniform(0.1, 0.8, (2, heads))

    ahead = np.arange(kv_len) - (np.arange(q_len)[:, None] + kv_len - q_len)
    allowed = np.ones((2, 1, q_len, kv_len), dtype=bool)
    if causal:
        allowed &= ahead <= 0
    if window[0] >= 0:
        allowed &= ahead >= -window[0]
    if window[1] >= 0:
        allowed &= ahead <= window[1]
    if masked:
        allowed = allowed & key_mask[:, None, None, :].astype(bool)
    groups = heads // kv_heads
    wide_key, wide_value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    logits = np.einsum("bihd,bjhd->bhij", query, wide_key) / math.sqrt(8) - 1.3
    if alibi:
        logits = logits - slopes[:, :, None, None] * np.abs(ahead)
    weights = sigmoid(logits) * allowed
    grad_logits = np.einsum("bihd,bjhd->bhij", upstream, wide_value) * weights * (1 - weights)
    outputs = {
        "attn": weights,
        "out": np.einsum("bhij,bjhd->bihd", weights, wide_value),
        "dq": np.einsum("bhij,bjhd->bihd", grad_logits, wide_key) / math.sqrt(8),
        "dk": np.einsum("bhij,bihd->bjhd", grad_logits, query).reshape(2, kv_len, kv_heads, groups, 8).sum(3)
        / math.sqrt(8),
        "dv": np.einsum("bhij,bihd->bjhd", weights, upstream).reshape(2, kv_len, kv_heads, groups, 8).sum(3),
    }
    inputs = {"q": query, "k": key, "v": value, "dout": upstream}
    inputs |= ({"alibi_slopes": slopes} if alibi else {}) | ({"key_mask": key_mask} if masked else {})
    config = {
        "B": 2,
        "Tq": q_len,
        "Tk": kv_len,
        "H": heads,
        "Hkv": kv_heads,
        "D": 8,
        "causal": causal,
        "window": list(window),
        "alibi": alibi,
        "sigmoid_bias": -1.3,
    }
    result = run_case(write_case(tmp_path / "case", "attention_ref", config, inputs, outputs))
    assert result.passed, f"\n{result}"
    assert {"out@eager", "out@torch", "dk@torch", "attn@eager"} <= set(result.compared)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def rotate(x: np.ndarray) -> np.ndarray:
    """Rotary embedding of `(batch, length, heads, dim)` with interleaved pairs."""
    length, dim = x.shape[1], x.shape[-1]
    angles = np.arange(length)[:, None, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = np.stack(
        (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)), -1
    )
    return rotated.reshape(x.shape)


def slopes_of(heads: int) -> np.ndarray:
    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / count) for i in range(count)]

    power = 2 ** int(math.log2(heads))
    return np.array((geometric(power) + geometric(2 * power)[::2])[:heads])


def causal_sigmoid(query, key, value, bias: float, slopes=None, allowed=True, temperature: float = 0.0) -> np.ndarray:
    """`(batch, length, heads * dim)`."""
    batch, length, heads, dim = query.shape
    distance = np.arange(length)[:, None] - np.arange(length)
    logits = np.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(dim)
    if slopes is not None:
        logits = logits - slopes[:, None, None] * distance
    weights = sigmoid(logits * math.exp(temperature) + bias) * ((distance >= 0) & allowed)
    return np.einsum("bhij,bjhd->bihd", weights, value).reshape(batch, length, heads * dim)


@pytest.mark.parametrize(
    ("position", "qk_norm", "bias", "layerscale", "heads", "attn_bias", "attn_temp"),
    [
        ("alibi", True, False, False, 4, None, None),
        ("alibi", False, True, True, 3, -3.0, 0.3),
        ("rope", False, True, False, 2, -2.0, None),
        ("rope", True, True, True, 6, None, -0.2),
        ("sincos", True, False, True, 4, -2.5, None),
    ],
)
def test_simulator_with_other_options(tmp_path, position, qk_norm, bias, layerscale, heads, attn_bias, attn_temp):
    """The simulator's language model, left and right padding, odd lengths."""
    rng = np.random.default_rng(1)
    width, hidden, vocab, blocks, length = 8 * heads, 20, 23, 2, 9
    config = {
        "vocab_size": vocab,
        "dim": width,
        "num_heads": heads,
        "num_blocks": blocks,
        "mlp_hidden": hidden,
        "bias": bias,
        "qk_norm": qk_norm,
        "position": position,
        "attn_bias": attn_bias,
        "attn_temp": attn_temp,
        "layerscale": layerscale,
    }

    def draw(*shape, scale=None):
        return rng.standard_normal(shape) * (scale or shape[-1] ** -0.5)

    def norm(name, size):
        return {f"{name}.weight": 1 + draw(size, scale=0.2), f"{name}.bias": draw(size, scale=0.2)}

    weights = {
        "input_embedding.weight": draw(vocab, width, scale=1.0),
        "output_embedding.linear.weight": draw(vocab, width),
    }
    weights |= norm("output_embedding.norm", width)
    for i in range(blocks):
        block = f"blocks.{i}."
        weights |= norm(f"{block}norm1", width) | norm(f"{block}norm2", width)
        shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        weights |= {f"{block}{name}.weight": draw(*shape) for name, shape in shapes.items()}
        weights |= {f"{block}mlp.fc1.weight": draw(hidden, width), f"{block}mlp.fc2.weight": draw(width, hidden)}
        if bias:
            weights |= {f"{block}{name}.bias": draw(shape[0], scale=0.3) for name, shape in shapes.items()}
        if qk_norm:
            weights |= norm(f"{block}attn.q_norm", 8) | norm(f"{block}attn.k_norm", 8)
        if layerscale:
            weights |= {f"{block}ls{n}.gamma": draw(width, scale=0.5) for n in (1, 2)}
        weights |= {
            f"{block}attn.attn_bias": np.array([attn_bias or 0.0]),
            f"{block}attn.attn_temp": np.array([attn_temp or 0.0]),
        }

    input_ids = rng.integers(1, vocab, (3, length))
    mask = np.ones((3, length), dtype=int)
    mask[1, :3], mask[2, -2:] = 0, 0

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def apply_norm(x, name, eps=1e-5):
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    hidden_states = weights["input_embedding.weight"][input_ids]
    if position == "sincos":
        angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
        hidden_states = hidden_states + np.stack((np.sin(angles), np.cos(angles)), -1).reshape(length, width)
    outputs = {}
    for i in range(blocks):
        block = f"blocks.{i}."
        qkv = linear(apply_norm(hidden_states, f"{block}norm1"), f"{block}attn.qkv")
        query, key, value = np.moveaxis(qkv.reshape(3, length, 3, heads, 8), 2, 0)
        if qk_norm:
            query, key = apply_norm(query, f"{block}attn.q_norm"), apply_norm(key, f"{block}attn.k_norm")
        if position == "rope":
            query, key = rotate(query), rotate(key)
        merged = causal_sigmoid(
            query,
            key,
            value,
            bias=attn_bias or 0.0,
            slopes=slopes_of(heads) if position == "alibi" else None,
            allowed=mask[:, None, None, :].astype(bool),
            temperature=attn_temp or 0.0,
        )
        outputs[f"block{i}_attn_times_v"] = merged
        hidden_states = hidden_states + linear(merged, f"{block}attn.proj") * weights.get(f"{block}ls1.gamma", 1.0)
        mlp = linear(gelu(linear(apply_norm(hidden_states, f"{block}norm2"), f"{block}mlp.fc1")), f"{block}mlp.fc2")
        hidden_states = hidden_states + mlp * weights.get(f"{block}ls2.gamma", 1.0)
        outputs[f"block{i}_output"] = hidden_states
    outputs["logits"] = (
        apply_norm(hidden_states, "output_embedding.norm", 1e-6) @ weights["output_embedding.linear.weight"].T
    )
    inputs = {"input_ids": input_ids, "attention_mask": mask, "proj": draw(3, length, vocab)}
    case = write_case(tmp_path / "case", "CausalBlockContainer", config, inputs, outputs, weights)
    result = run_case(case)
    assert result.passed, f"\n{result}"
    assert {"logits", "logits@sigmoid", "block1_output", "block1_attn_times_v@sigmoid"} <= set(result.compared)


@pytest.mark.parametrize(
    ("norm_structure", "position", "subtract", "heads"),
    [
        ("prenorm", "rope", True, 4),
        ("prenorm", "alibi", False, 3),
        ("hybridnorm", "rope", True, 2),
        ("hybridnorm", "alibi", True, 6),
    ],
)
def test_gala_with_other_options(tmp_path, norm_structure, position, subtract, heads):
    """AXLearn's model, with a run of padding at the end of a row and a padding token inside another."""
    rng = np.random.default_rng(2)
    layers, width, hidden, vocab, length, seq_len, dim = 2, 6 * heads, 20, 31, 11, 24, 6
    config = {
        "num_layers": layers,
        "hidden_dim": width,
        "num_heads": heads,
        "vocab_size": vocab,
        "ffn_dim": hidden,
        "norm_structure": norm_structure,
        "position_encoding": position,
        "seq_len": seq_len,
        "subtract_seq_len_bias": subtract,
    }

    def draw(*shape, fan_in):
        return rng.standard_normal(shape) / math.sqrt(fan_in)

    def scale(*shape):
        return 1 + 0.2 * rng.standard_normal(shape)

    attention = "self_attention/attention/"
    stacked = {
        f"{attention}{'i_proj/' if position == 'rope' else ''}i_proj/qkv_proj/weight": draw(
            layers, 3, width, heads, dim, fan_in=width
        ),
        f"{attention}o_proj/weight": draw(layers, width, heads, dim, fan_in=width),
        f"{attention}scale_query/norm/scale": scale(layers, dim),
        f"{attention}scale_key/norm/scale": scale(layers, dim),
        "feed_forward/linear1_0/weight": draw(layers, width, hidden, fan_in=width),
        "feed_forward/linear1_1/weight": draw(layers, width, hidden, fan_in=width),
        "feed_forward/linear2/weight": draw(layers, hidden, width, fan_in=hidden),
    }
    norms = ("prenorm", "postnorm") if norm_structure == "hybridnorm" else ("norm",)
    stacked |= {
        f"{part}/{norm}/scale": scale(layers, width) for part in ("self_attention", "feed_forward") for norm in norms
    }
    prefix = "decoder/transformer/repeat/layer/"
    embedding, output_norm = draw(vocab, width, fan_in=1), scale(width)
    weights = {f"{prefix}{name}": tensor for name, tensor in stacked.items()}
    weights |= {"decoder/emb/token_emb/weight": embedding, "decoder/output_norm/scale": output_norm}

    input_ids = rng.integers(1, vocab, (3, length))
    input_ids[1, -4:] = 0
    input_ids[2, 3] = 0
    trailing = np.cumsum(input_ids[:, ::-1] != 0, axis=1)[:, ::-1] == 0
    # Only models with ALiBi have the layer that distinguishes segments.
    same_segment = (trailing[:, :, None] == trailing[:, None, :])[:, None] | (position != "alibi")

    hidden_states = embedding[input_ids]
    for layer in range(layers):
        w = {name: tensor[layer] for name, tensor in stacked.items()}
        qkv = next(tensor for name, tensor in w.items() if name.endswith("qkv_proj/weight"))

        def branch(x, part, function, w=w):
            normed = rms_norm(x, w[f"{part}/{norms[0]}/scale"])
            result = function(normed)
            return x + (rms_norm(result, w[f"{part}/postnorm/scale"]) if norm_structure == "hybridnorm" else result)

        def attend(x, w=w, qkv=qkv):
            query, key, value = (np.einsum("btd,dhe->bthe", x, weight) for weight in qkv)
            if position == "rope":
                query, key = rotate(query), rotate(key)
            query = rms_norm(query, w[f"{attention}scale_query/norm/scale"])
            key = rms_norm(key, w[f"{attention}scale_key/norm/scale"])
            merged = causal_sigmoid(
                query,
                key,
                value,
                bias=-math.log(seq_len) if subtract else 0.0,
                slopes=slopes_of(heads) if position == "alibi" else None,
                allowed=same_segment,
            )
            return np.einsum("bthe,dhe->btd", merged.reshape(3, length, heads, dim), w[f"{attention}o_proj/weight"])

        def feed_forward(x, w=w):
            gate = x @ w["feed_forward/linear1_0/weight"]
            return (gate * sigmoid(gate) * (x @ w["feed_forward/linear1_1/weight"])) @ w["feed_forward/linear2/weight"]

        hidden_states = branch(hidden_states, "self_attention", attend)
        hidden_states = branch(hidden_states, "feed_forward", feed_forward)
    hidden_states = rms_norm(hidden_states, output_norm)
    outputs = {"hidden_states": hidden_states, "logits": hidden_states @ embedding.T}
    inputs = {"input_ids": input_ids, "proj": draw(3, length, vocab, fan_in=1)}
    case = write_case(tmp_path / "case", "causal_lm.Model(extract_logits)", config, inputs, outputs, weights)
    result = run_case(case)
    assert result.passed, f"\n{result}"
    assert {"logits", "logits@sigmoid", "hidden_states"} <= set(result.compared)
