"""An optimiser for models with memory layers (arXiv 2411.12992), whose tables want another one than the rest."""

from typing import Any

import torch
from torch import nn

from ..architectures.memory_layer import MemoryLayer


class TableOptimizer(torch.optim.Optimizer):
    """AdamW for a model, with a learning rate of their own and without weight decay for tables, and SparseAdam for tables with
    sparse gradients.

    A step of SparseAdam touches the rows that the batch has used, and their moments, only. Both are one optimiser for Trainer
    and for schedulers:

        optimizer = TableOptimizer(model, lr=1e-3)
        trainer = Trainer(model, TrainingArguments(..., max_grad_norm=0), optimizers=(optimizer, None), ...)

    Gradients cannot be clipped with sparse ones among them, hence `max_grad_norm=0`.

    Args:
        model: a model with memory layers.
        lr: learning rate.
        table_lr: that of tables, `3 * lr` if not given: a row is updated rarely.
        betas, eps, weight_decay: of AdamW; the first two of both.

    Raises:
        ValueError: if the model has no memory layers.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        table_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        layers = [module for module in model.modules() if isinstance(module, MemoryLayer)]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no memory layers; use torch.optim.AdamW.")
        table_lr = 3 * lr if table_lr is None else table_lr
        sparse = [layer.tables for layer in layers if layer.sparse_gradients and layer.tables.requires_grad]
        dense = [layer.tables for layer in layers if not layer.sparse_gradients and layer.tables.requires_grad]
        tables = {id(layer.tables) for layer in layers}
        others = [
            parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in tables
        ]
        groups = [
            {"params": [parameter for parameter in others if parameter.dim() > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in others if parameter.dim() <= 1], "weight_decay": 0.0},
            {"params": dense, "lr": table_lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if groups:
            self.parts["dense"] = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        if sparse:
            self.parts["sparse"] = torch.optim.SparseAdam(sparse, lr=table_lr, betas=betas, eps=eps)
        super().__init__([parameter for group in self._groups() for parameter in group["params"]], {"lr": lr})
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.keys() != self.parts.keys():
            raise ValueError(
                f"The state has the parts {', '.join(state_dict)}, but this optimiser has {', '.join(self.parts)}. "
                "Was sparse_gradients changed?"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = self._groups()
