"""ComplexFormer against a Llama of transformers of the same shape: the loss on held-out text.

Shown in small if it is lower for every seed and by more than its spread, contradicted if it is higher in the same sense.
"""

from ..language import LanguageContest, test_losses
from ..result import Conclusion, Figure, agreement


OWN, PEER = "ComplexFormer", "Llama of transformers"
_contest = LanguageContest({OWN: "complexformer", PEER: "llama"})
measure, draw = _contest.measure, _contest.draw


def conclude(data: dict) -> Conclusion:
    own, peer = (test_losses(data["runs"][name]) for name in (OWN, PEER))
    size = data["parameters"]
    figures = (
        Figure.of("loss on held-out text", "bits/character", own, PEER, peer),
        Figure.of("parameters", "thousand", size[OWN] / 1e3, PEER, size[PEER] / 1e3),
    )
    order = agreement(peer, own)
    verdict = {1: "shown in small", 0: "not shown here", -1: "contradicted here"}[order]
    words = {1: "lower", 0: "not clearly different", -1: "higher"}[order]
    return Conclusion(figures, verdict, f"After {data['steps']} steps its loss is {words} over {len(own)} seeds.")
