"""The calls on which every fused kernel of sigmoid attention is compared with the reference implementation."""

from dataclasses import dataclass, field

import torch

from hf_attn.attention.sigmoid import SigmoidCall, alibi_slopes, sigmoid_attention_eager


@dataclass(frozen=True)
class Case:
    """Shapes and arguments of one call; the mask is made by name."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 37
    kv_len: int = 37
    head_dim: int = 16
    value_dim: int = 16
    mask: str | None = None
    alibi: bool = False
    head_bias: bool = False
    arguments: dict = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        query = torch.randn(self.batch, self.heads, self.q_len, self.head_dim)
        key = torch.randn(self.batch, self.kv_heads, self.kv_len, self.head_dim)
        value = torch.randn(self.batch, self.kv_heads, self.kv_len, self.value_dim)
        return tuple(tensor.to(dtype).requires_grad_() for tensor in (query, key, value))

    def keywords(self) -> dict:
        torch.manual_seed(1)
        bias = torch.randn(self.heads) if self.head_bias else -2.0
        slopes = alibi_slopes(self.heads) if self.alibi else None
        mask = None if self.mask is None else getattr(self, f"_{self.mask}_mask")()
        return {
            "scaling": self.head_dim**-0.5,
            "bias": bias,
            "attention_mask": mask,
            "alibi_slopes": slopes,
            **self.arguments,
        }

    def _padding_mask(self) -> torch.Tensor:
        mask = torch.ones(self.batch, 1, 1, self.kv_len, dtype=torch.bool)
        mask[0, ..., : self.kv_len // 4] = False
        mask[-1, ..., -self.kv_len // 3 :] = False
        return mask

    def _expanded_padding_mask(self) -> torch.Tensor:
        return self._padding_mask().expand(self.batch, 1, self.q_len, self.kv_len)

    def _additive_padding_mask(self) -> torch.Tensor:
        return torch.where(self._padding_mask(), 0.0, torch.finfo(torch.float32).min)

    def _boolean_mask(self) -> torch.Tensor:
        mask = torch.rand(self.batch, 1, self.q_len, self.kv_len) > 0.3
        mask[..., self.kv_len // 2 :] = False  # whole blocks
        mask[:, :, self.q_len // 2] = False  # a row without keys
        return mask

    def _head_mask(self) -> torch.Tensor:
        return torch.rand(1, self.heads, self.q_len, self.kv_len) > 0.3

    def _additive_mask(self) -> torch.Tensor:
        return torch.where(self._boolean_mask(), torch.randn(self.q_len, self.kv_len), torch.finfo(torch.float32).min)


CASES = {
    "plain": Case(),
    "causal": Case(arguments={"is_causal": True}),
    "cache": Case(q_len=5, kv_len=45, arguments={"is_causal": True}),
    "decode": Case(q_len=1, kv_len=41),
    "decode_padding": Case(q_len=1, kv_len=41, mask="padding"),
    "one_kv_head": Case(batch=1, heads=3, kv_heads=1, q_len=40, kv_len=25),
    "no_groups": Case(batch=3, heads=2, kv_heads=2, q_len=50, kv_len=70, arguments={"is_causal": True}),
    "more_queries": Case(q_len=40, kv_len=25, arguments={"is_causal": True}),
    "offset": Case(q_len=20, kv_len=50, arguments={"is_causal": True, "query_offset": 7}),
    "window": Case(q_len=50, kv_len=50, arguments={"is_causal": True, "sliding_window": 9}),
    "two_sided_window": Case(q_len=50, kv_len=50, arguments={"sliding_window": 9}),
    "window_cache": Case(q_len=9, kv_len=50, arguments={"is_causal": True, "sliding_window": 20}),
    "alibi": Case(alibi=True, arguments={"is_causal": True}),
    "two_sided_alibi": Case(alibi=True, head_bias=True, q_len=20, kv_len=45),
    "head_bias": Case(head_bias=True),
    "no_bias": Case(arguments={"bias": 0.0}),
    "padding": Case(mask="padding", arguments={"is_causal": True}),
    "expanded_padding": Case(mask="expanded_padding", head_bias=True),
    "additive_padding": Case(mask="additive_padding"),
    "boolean": Case(mask="boolean"),
    "boolean_causal_alibi": Case(mask="boolean", alibi=True, arguments={"is_causal": True}),
    "head_mask": Case(mask="head", arguments={"is_causal": True}),
    "additive": Case(mask="additive", head_bias=True),
    "odd_dims": Case(head_dim=24, value_dim=40),
}


def output_and_gradients(function, case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value for a fixed gradient of the output."""
    inputs = case.inputs(dtype)
    output = function(SigmoidCall(*inputs, **case.keywords()))
    output = output[0] if isinstance(output, tuple) else output
    torch.manual_seed(2)
    grad_output = torch.randn(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]


def assert_equals_eager(function, case: Case) -> None:
    """Output and gradients equal those of the specification in float32."""
    results = output_and_gradients(function, case)
    expected = output_and_gradients(sigmoid_attention_eager, case)
    for name, result, reference in zip(("output", "query", "key", "value"), results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")


def assert_within_low_precision_budget(function, case: Case, dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of the specification in the same dtype, plus one rounding."""
    oracle = output_and_gradients(sigmoid_attention_eager, _in_float64(case, dtype), torch.float64)
    results = output_and_gradients(function, case, dtype)
    eager = output_and_gradients(sigmoid_attention_eager, case, dtype)
    for name, exact, result, reference in zip(
        ("output", "query", "key", "value"), oracle, results, eager, strict=True
    ):
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().max()
        error = (result.double() - exact).abs().max()
        budget = 2 * (reference.double() - exact).abs().max() + rounding
        assert error <= budget, f"{name}: error {error:.2e} exceeds the budget {budget:.2e}"


def _in_float64(case: Case, dtype: torch.dtype) -> Case:
    """The values of `case` in `dtype`, converted to float64."""

    class Rounded(Case):
        def inputs(self, _dtype):
            return tuple(tensor.detach().double().requires_grad_() for tensor in case.inputs(dtype))

    return Rounded(**{name: getattr(case, name) for name in case.__dataclass_fields__})
