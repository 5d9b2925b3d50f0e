# Copyright 2026 The hf_attn authors. Licensed under the Apache License, Version 2.0.
"""Training data with landmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .configuration_landmark import LandmarkConfig


IGNORED = -100


@dataclass
class LandmarkDataCollator:
    """Inserts a landmark after every `mem_freq` tokens of each sequence, except at its very end, and pads on the right.

    With `config.include_landmark_in_loss` landmarks are targets as all tokens are. Without, they are not: the target of the
    token before a landmark is the token after it, and the landmark itself has none. (Models shift the labels: the label at
    a position is the target of the position before it.)

    Args:
        config: configuration of the model.
        pad_token_id: what sequences are padded with.
        no_loss_after: tokens that predict nothing, such as the end of a text in a sequence of several; only without
            `include_landmark_in_loss`.
    """

    config: LandmarkConfig
    pad_token_id: int = 0
    no_loss_after: Sequence[int] = ()

    def __post_init__(self):
        if self.no_loss_after and self.config.include_landmark_in_loss:
            raise ValueError("no_loss_after is only for training without landmarks in the loss.")

    def __call__(self, features: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            features: each with `input_ids`, without padding or landmarks, and optionally `labels`, one for each token, -100
                where there is no loss.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each `(batch, longest sequence with its landmarks)`.

        Raises:
            ValueError: for a sequence with landmarks, or labels of another length.
        """
        rows = [self._with_landmarks(feature) for feature in features]
        longest = max(len(ids) for ids, _ in rows)

        def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([sequence + [fill] * (longest - len(sequence)) for sequence in sequences])

        return {
            "input_ids": padded([ids for ids, _ in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": padded([labels for _, labels in rows], IGNORED),
        }

    def _with_landmarks(self, feature: Mapping) -> tuple[list[int], list[int]]:
        landmark, mem_freq = self.config.landmark_token_id, self.config.mem_freq
        ids = [int(token) for token in feature["input_ids"]]
        labels = [int(label) for label in feature.get("labels", ids)]
        if len(labels) != len(ids):
            raise ValueError(f"Got {len(labels)} labels for {len(ids)} tokens.")
        if landmark in ids:
            raise ValueError(
                f"The sequence already contains landmarks (token {landmark}). Remove them: the collator "
                "inserts landmarks."
            )
        labels = [
            IGNORED if place > 0 and ids[place - 1] in self.no_loss_after else label
            for place, label in enumerate(labels)
        ]
        new_ids, new_labels = [], []
        for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if place > 0 and place % mem_freq == 0:
                new_ids.append(landmark)
                if not self.config.include_landmark_in_loss:
                    new_labels.append(label)
                    label = IGNORED
                else:
                    new_labels.append(landmark if labels[place - 1] != IGNORED else IGNORED)
            new_ids.append(token)
            new_labels.append(label)
        return new_ids, new_labels


__all__ = ["LandmarkDataCollator"]
