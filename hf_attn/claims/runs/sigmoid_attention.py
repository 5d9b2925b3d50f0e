"""Sigmoid attention against softmax in language models of one shape, with the paper's bias and norms, and without them.

Shown in small if, with bias and norms, the loss on held-out text is at most 1 % above that of a Llama of transformers in the
mean over seeds; contradicted if it is more than 5 % above for every seed. What happens without bias and norms is reported.
"""

from statistics import fmean

from ..language import LanguageContest, test_losses
from ..result import Conclusion, Figure


OWN, WITHOUT, PEER = "sigmoid", "sigmoid, no bias, no norms", "softmax (Llama of transformers)"
_contest = LanguageContest(
    {
        OWN: "sigmoid_attention",
        WITHOUT: "sigmoid_attention:sigmoid_bias=0;qk_norm=false;norm_structure=prenorm",
        PEER: "llama",
    }
)
measure, draw = _contest.measure, _contest.draw


def conclude(data: dict) -> Conclusion:
    own, without, peer = (test_losses(data["runs"][name]) for name in (OWN, WITHOUT, PEER))
    figures = (
        Figure.of("loss on held-out text", "bits/character", own, PEER, peer),
        Figure.of("the same without bias and norms", "bits/character", without, PEER, peer),
    )
    excess, excess_without = (100 * (fmean(losses) / fmean(peer) - 1) for losses in (own, without))
    why = (
        f"After {data['steps']} steps the loss with bias and norms differs by {excess:+.1f} % from that of softmax, and without them by "
        f"{excess_without:+.1f} %."
    )
    verdict = "shown in small" if excess <= 1 else "not shown here"
    if all(a > 1.05 * b for a, b in zip(own, peer, strict=True)):
        verdict = "contradicted here"
    return Conclusion(figures, verdict, why)
