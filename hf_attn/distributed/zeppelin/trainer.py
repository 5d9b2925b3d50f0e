"""Trainer on batches of uneven documents, each with a plan of its own.

class UnevenTrainer(ZeppelinTrainerMixin, Trainer): ...

model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="distributed_zeppelin")
UnevenTrainer(model=model, data_collator=ZeppelinCollator(), train_dataset=documents, ...).train()
"""

from collections.abc import Sequence
from typing import Any

from transformers import DataCollatorWithFlattening

from ..trainer import SequenceParallelTrainerMixin
from .parallel import Cluster
from .partition import PlanError


class ZeppelinCollator(DataCollatorWithFlattening):
    """Packs documents into one row with the bounds of the documents; they are assigned to ranks in the training step.

    Args:
        cluster: if given, a batch that it does not take is refused here, with the capacity that would do.
    """

    def __init__(self, cluster: Cluster | None = None, **kwargs):
        super().__init__(return_flash_attn_kwargs=True, **kwargs)
        self.cluster = cluster

    def __call__(self, features: Sequence[dict[str, Any]], return_tensors=None, separator_id=None) -> dict[str, Any]:
        """Collate features with `input_ids` and, if there are any, `labels` of any length.

        Raises:
            PlanError: for a document without tokens, or more tokens than the cluster takes.
        """
        lengths = [len(feature["input_ids"]) for feature in features]
        if 0 in lengths:
            raise PlanError(
                f"Every document needs at least one token; number {lengths.index(0)} of the batch has none."
            )
        if self.cluster is not None:
            self.cluster.plan(lengths)
        return super().__call__(features, return_tensors, separator_id)


class ZeppelinTrainerMixin(SequenceParallelTrainerMixin):
    """:class:`~hf_attn.distributed.trainer.SequenceParallelTrainerMixin` for a model with `attn_implementation="distributed_zeppelin"`.

    `per_device_train_batch_size` is the number of documents of all processes together. The layers work on equally many tokens in
    each process, attention on the shares of the plan, and the loss is the sum over tokens divided by the number of those of all
    processes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.sequence_context.layout != "zeppelin":
            raise ValueError(
                "ZeppelinTrainerMixin trains a model with attn_implementation='distributed_zeppelin'; call "
                '`model.set_attn_implementation("distributed_zeppelin")` first.'
            )

    @property
    def last_plan(self):
        """The plan of the batch that was trained on last."""
        return self.sequence_context.plan
