"""Runs of a model that begin in the middle: at the outputs of a layer's heads, which were computed before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .gating import prefix_queries
from .hops import Grid
from .layout import Outcome, ViTLayout


class _HeadsReached(Exception):
    """Ends a layer as soon as the outputs of its heads are known."""

    def __init__(self, heads: torch.Tensor):
        self.heads = heads


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace the `forward` of a module within a `with` block."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class BatchRestart:
    """One batch of images, and runs in which the heads of one layer differ.

    The inputs of the layers are held, and the outputs of the heads of one layer at a time. Where nothing but the prefix tokens
    reaches the classifier, which is found out, the last layer works on them alone.

    Args:
        layout: the model, in eval mode.
        pixel_values: `(images, channels, height, width)`.
        grid: tokens of the images.
    """

    def __init__(self, layout: ViTLayout, pixel_values: torch.Tensor, grid: Grid):
        self.layout, self.pixel_values, self.grid = layout, pixel_values, grid
        self.calls: list[tuple[torch.Tensor, tuple, dict]] = []
        self.forwards = [layer.forward for layer in layout.layers]
        seen: dict[str, torch.Tensor] = {}

        def keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.calls.append((args[0], args[1:], kwargs))

        def keep_output(name: str) -> Callable:
            return lambda module, args, output: seen.update({name: output})

        with ExitStack() as hooks:
            for layer in layout.layers:
                hooks.callback(layer.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            hooks.callback(layout.layers[-1].register_forward_hook(keep_output("last")).remove)
            hooks.callback(layout.patch_embedding.register_forward_hook(keep_output("patches")).remove)
            self.full = self._run()
        self.patches = seen["patches"]
        prefix = grid.num_prefix_tokens
        self.trim = prefix if layout.trims and prefix and self._same_with(seen["last"][:, :prefix]) else 0

    def _run(self) -> Outcome:
        return self.layout.run(self.pixel_values, self.grid.num_prefix_tokens > 0)

    def layers(self) -> Iterator["LayerRestart"]:
        """The layers in order, each with its input and the outputs of its heads."""
        for index, (hidden_states, _, _) in enumerate(self.calls):
            yield LayerRestart(self, index, hidden_states, self._heads(index, hidden_states))

    def _call(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        _, args, kwargs = self.calls[index]
        return self.forwards[index](hidden_states, *args, **kwargs)

    def _heads(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        def hook(module: nn.Module, args: tuple):
            raise _HeadsReached(args[0])

        # Last, so that a gate on the projection comes before it.
        handle = self.layout.projections[index].register_forward_pre_hook(hook)
        try:
            self._call(index, hidden_states)
        except _HeadsReached as reached:
            return reached.heads
        finally:
            handle.remove()
        raise RuntimeError(f"Layer {index} does not call its output projection.")

    def _finish(self, index: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """The output of a layer, of its input and the outputs of its heads."""
        projection = self.layout.projections[index]

        def attention(*args, **kwargs):
            output = projection(heads)
            return output if self.layout.is_timm else (output, None)

        with _replaced(self.layout.attentions[index], attention):
            return self._call(index, hidden_states)

    def _finish_last(self, index: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        if self.trim and index == self.layout.num_layers - 1:
            hidden_states, heads = hidden_states[:, : self.trim], heads[:, : self.trim]
        return self._finish(index, hidden_states, heads)

    def run_from(self, index: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> Outcome:
        """Run the model from the outputs of the heads of a layer on."""
        return self._run_after(index, self._finish_last(index, hidden_states, heads))

    def _run_after(self, index: int, output: torch.Tensor) -> Outcome:
        """Run the model from the output of a layer on."""
        last = self.layout.num_layers - 1
        with ExitStack() as replaced:
            replaced.enter_context(_replaced(self.layout.patch_embedding, lambda *args, **kwargs: self.patches))
            for layer in self.layout.layers[:index]:
                replaced.enter_context(_replaced(layer, lambda states, *args, **kwargs: states))
            replaced.enter_context(_replaced(self.layout.layers[index], lambda *args, **kwargs: output))
            if self.trim and index < last:
                replaced.enter_context(_replaced(self.layout.layers[last], self._trimmed_last_layer))
            return self._run()

    def _trimmed_last_layer(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        last = self.layout.num_layers - 1
        with prefix_queries(self.layout, last, self.trim):
            heads = self._heads(last, hidden_states)
        return self._finish_last(last, hidden_states, heads)

    def _same_with(self, prefix: torch.Tensor) -> bool:
        """Whether the predictions are the same if the last layer returns only its prefix tokens."""
        self.trim = 0
        found = self._run_after(self.layout.num_layers - 1, prefix)
        pairs = [(found.representation, self.full.representation)]
        if self.full.logits is not None:
            pairs.append((found.logits, self.full.logits))
        tolerance = 64 * torch.finfo(self.full.representation.dtype).eps
        return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


class LayerRestart:
    """A layer of a batch, ready to be run with other heads.

    Attributes:
        index: the layer.
        heads: `(images, tokens, heads * head_dim)`, outputs of its heads.
    """

    def __init__(self, batch: BatchRestart, index: int, hidden_states: torch.Tensor, heads: torch.Tensor):
        self.batch, self.index, self.hidden_states, self.heads = batch, index, hidden_states, heads

    def keeping(self, kept: list[int]) -> Outcome:
        """Predictions with only these heads of the layer."""
        num_heads = self.batch.layout.num_heads
        mask = self.heads.new_zeros(num_heads, 1)
        mask[kept] = 1
        heads = (self.heads.unflatten(-1, (num_heads, -1)) * mask).flatten(-2)
        return self.batch.run_from(self.index, self.hidden_states, heads)

    def without(self, removed: list[int]) -> Outcome:
        """Predictions without these heads of the layer."""
        return self.keeping([head for head in range(self.batch.layout.num_heads) if head not in removed])
