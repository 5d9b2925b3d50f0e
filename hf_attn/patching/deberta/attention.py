"""The attention modules of transformers' DeBERTa, with a faster computation of the same function.

They are subclasses with the same parameters: a module changes its class in place, so that hooks, adapters and references
to it stay, and a saved model is an ordinary DeBERTa.
"""

import torch
from torch import nn
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

from hf_attn.attention.disentangled import DISENTANGLED, TAKES_WHOLE_TABLE
from hf_attn.kernels.disentangled.call import DisentangledCall

from .positions import rows_by_distance, rows_of_length, rows_of_pairs
from .projections import PositionProjections, is_capturing_graph


NO_TOKENS = "The texts of this batch have length 0; every text needs at least one token."


class FastSelfAttention(nn.Module):
    """Fast attention of all versions; mixed into transformers' `DisentangledSelfAttention`.

    Attributes:
        implementation: `"auto"` or a name of `DISENTANGLED`.
        hf_compat: distances beyond the table as in transformers, not as in the official code.
        position_projections: cache of the projected positions.
    """

    def make_fast(self, hf_compat: bool) -> None:
        """Set the attributes that a module of transformers lacks after its class was changed to this one."""
        self.hf_compat = hf_compat
        self.position_projections = PositionProjections()
        # Here and not in `forward`: a graph that is captured there cannot look into a cache.
        self._rows_by_distance = rows_by_distance(*self._table_arguments) if self.relative_attention else None

    def make_plain(self) -> None:
        """Remove these attributes, before the class of the module is changed back."""
        for name in ("implementation", "hf_compat", "position_projections", "_rows_by_distance"):
            delattr(self, name)

    @property
    def span(self) -> int:
        """Half of the rows of the table."""
        return self.buckets if self.buckets > 0 else self.max_relative_positions

    @property
    def buckets(self) -> int:
        return getattr(self, "position_buckets", -1)

    @property
    def _table_arguments(self) -> tuple[int, int, int, bool]:
        return self.span, self.buckets, self.max_relative_positions, self.hf_compat

    def project(self, hidden_states: torch.Tensor, query_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each `(batch, heads, length, head_dim)`."""
        raise NotImplementedError

    def position_projection(self, term: str) -> nn.Module:
        """The map of the positions that meet the content's queries (`"c2p"`) or keys (`"p2c"`)."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; the arguments are those of transformers.

        Args:
            hidden_states: source of keys and values, `(batch, length, hidden_size)`.
            attention_mask: true where a key may be seen, `(batch, 1, 1 or q_len, length)`; none for all.
            output_attentions: return the weights, which only the eager implementation has.
            query_states: source of the queries, `(batch, q_len, hidden_size)`; hidden_states if none.
            relative_pos: bucket of the distance of each pair, `(q_len, length)` or with a batch dimension; none for
                queries and keys at positions 0, 1, ...
            rel_embeddings: the table of relative positions, `(2 * span, hidden_size)`.

        Returns:
            Output `(batch, q_len, hidden_size)`, and weights `(batch, heads, q_len, length)` or none.

        Raises:
            ValueError: for texts of length 0; if there are not as many queries as keys and no `relative_pos`; or if the
                requested implementation does not support the call.
        """
        if hidden_states.shape[1] == 0:
            raise ValueError(NO_TOKENS)
        if query_states is None:
            query_states = hidden_states
        query, key, value = self.project(hidden_states, query_states)
        positions = self._positions(query, key, relative_pos, rel_embeddings)
        call = DisentangledCall(
            query,
            key,
            value,
            attention_mask=_boolean_mask(attention_mask),
            scaling=(query.shape[-1] * (1 + len(self.pos_att_type))) ** -0.5,
            dropout=self.dropout.p if self.training else 0.0,
            buckets=self.buckets,
            max_distance=getattr(self, "max_relative_positions", 0),
            hf_compat=self.hf_compat,
            **positions,
        )
        output, weights = DISENTANGLED(call, "eager" if output_attentions else self.implementation)
        output = output.transpose(1, 2)
        if torch.compiler.is_exporting():
            # What SDPA is decomposed into has other strides than its kernel, which the graph was made with.
            output = output.clone(memory_format=torch.contiguous_format)
        return output.flatten(2), weights if output_attentions else None

    def _positions(self, query, key, relative_pos, rel_embeddings) -> dict:
        length = key.shape[2]
        if not self.relative_attention or rel_embeddings is None or not self.pos_att_type:
            zeros = query.new_zeros(1, 1, dtype=torch.long)
            return {
                "position_key": None,
                "position_query": None,
                "rows": None,
                "index": lambda: zeros.expand(query.shape[2], length),
            }
        first, count, rows, index = 0, 2 * self.span, None, None
        if relative_pos is not None:
            index = self._given_index(relative_pos, query.device)
        elif query.shape[2] != length:
            raise ValueError(
                f"{query.shape[2]} queries and {length} keys need relative_pos, the distances of their pairs."
            )
        elif is_capturing_graph():

            def index():
                tokens = torch.arange(length, device=query.device)
                return rows_of_pairs(tokens[:, None] - tokens, self._rows_by_distance)
        else:
            found_first, found_count, rows = rows_of_length(length, *self._table_arguments, query.device)
            if self.implementation != TAKES_WHOLE_TABLE:
                first, count = found_first, found_count
            else:
                rows = rows + found_first
        table = self.pos_dropout(rel_embeddings[: 2 * self.span])
        heads = {}
        for term in ("c2p", "p2c"):
            heads[term] = None
            if term in self.pos_att_type:
                linear = self.position_projection(term)
                projected = self.position_projections.get(term, linear, table, first, count)
                heads[term] = projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(0, 1).to(query.dtype)
        return {"position_key": heads["c2p"], "position_query": heads["p2c"], "rows": rows, "index": index}

    def _given_index(self, relative_pos: torch.Tensor, device: torch.device):
        if relative_pos.ndim not in (2, 3, 4):
            raise ValueError(f"relative_pos has 2 to 4 dimensions, got {relative_pos.ndim}.")
        pairs = relative_pos[:, 0] if relative_pos.ndim == 4 else relative_pos
        return lambda: (pairs.to(device).long() + self.span).clamp(0, 2 * self.span - 1)

    def buckets_of(self, distance: torch.Tensor) -> torch.Tensor:
        """`relative_pos` for distances, query position minus key position, of any shape."""
        return rows_of_pairs(distance, self._rows_by_distance) - self.span

    # The cache checks its validity itself; the following only frees its memory early.

    def train(self, mode: bool = True):
        self.position_projections.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.position_projections.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.position_projections.clear()
        return super()._load_from_state_dict(*args, **kwargs)


def _boolean_mask(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """`(batch, 1, 1 or q_len, length)`, true where a key may be seen; none where all may."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if mask.ndim < 4:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    # Elsewhere than on a CPU the question would wait for the device.
    if mask.device.type == "cpu" and not is_capturing_graph() and bool(mask.all()):
        return None
    return mask


def _split_heads(hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
    return hidden_states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class FastDebertaV2SelfAttention(FastSelfAttention, v2.DisentangledSelfAttention):
    """Attention of DeBERTa v2 and v3."""

    def project(self, hidden_states, query_states):
        return (
            _split_heads(self.query_proj(query_states), self.num_attention_heads),
            _split_heads(self.key_proj(hidden_states), self.num_attention_heads),
            _split_heads(self.value_proj(hidden_states), self.num_attention_heads),
        )

    def position_projection(self, term):
        if self.share_att_key:
            return self.key_proj if term == "c2p" else self.query_proj
        return self.pos_key_proj if term == "c2p" else self.pos_query_proj


class FastDebertaSelfAttention(FastSelfAttention, v1.DisentangledSelfAttention):
    """Attention of DeBERTa v1, whose queries, keys and values are one map, laid out by heads."""

    def project(self, hidden_states, query_states):
        query, key, value = _split_heads(self.in_proj(hidden_states), self.num_attention_heads).chunk(3, dim=-1)
        if query_states is not hidden_states:
            query = _split_heads(self.in_proj(query_states), self.num_attention_heads).chunk(3, dim=-1)[0]
        query_bias, value_bias = (
            bias.unflatten(0, (self.num_attention_heads, 1, -1)) for bias in (self.q_bias, self.v_bias)
        )
        return query + query_bias, key, value + value_bias

    def position_projection(self, term):
        return self.pos_proj if term == "c2p" else self.pos_q_proj


class FastEncoder(nn.Module):
    """Mixed into transformers' encoders: masks and distances of all pairs, which no fast attention needs, are not made."""

    def get_attention_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(batch, 1, 1, length)` of a mask of tokens, `(batch, 1, q_len, length)` of a mask of pairs."""
        return (
            attention_mask[:, None, None] if attention_mask.ndim <= 2 else super().get_attention_mask(attention_mask)
        )

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None):
        """`relative_pos` if given; otherwise the attention computes the distances itself."""
        return relative_pos


class FastDebertaV2Encoder(FastEncoder, v2.DebertaV2Encoder):
    """Encoder of DeBERTa v2 and v3."""


class FastDebertaEncoder(FastEncoder, v1.DebertaEncoder):
    """Encoder of DeBERTa v1."""


#: class of transformers -> ours
FAST_ENCODERS: dict[type[nn.Module], type[nn.Module]] = {
    v1.DebertaEncoder: FastDebertaEncoder,
    v2.DebertaV2Encoder: FastDebertaV2Encoder,
}
FAST_ATTENTION: dict[type[nn.Module], type[FastSelfAttention]] = {
    v1.DisentangledSelfAttention: FastDebertaSelfAttention,
    v2.DisentangledSelfAttention: FastDebertaV2SelfAttention,
}
