"""TNT: whole models of the official code and of timm."""

import torch

from hf_attn.checkpoints.official import from_official
from tests.goldens.case import Case
from tests.goldens.tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    results = {}
    model = from_official("tnt", case.weights, config=case.config)
    base = getattr(model, "tnt", model)
    last = len(base.layers) - 1
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        way = f"@{implementation}"
        pixel_values = case.input("pixel_values").clone().requires_grad_()
        modules = {"stem": base.embeddings.word_embeddings.projection, "final_norm": base.layernorm}
        words = {index: layer.words_to_sentence for index, layer in enumerate(base.layers)}
        with recorded(modules) as outputs, recorded(words, inputs=True) as word_states:
            output = model(pixel_values, output_hidden_states=True)
        logits = output.logits if "logits" in output else output.pooler_output
        (logits * case.input("proj")).sum().backward()
        found = {
            "logits": logits,
            "final_norm": outputs["final_norm"],
            "stem_words": outputs["stem"].flatten(2).transpose(1, 2),
            "last_inner": word_states[last],
            "last_outer": output.hidden_states[-1],
            "grad_pixel_values": pixel_values.grad,
        }
        grid_size = [side // model.config.patch_size for side in pixel_values.shape[2:]]
        for index, states in enumerate(output.hidden_states[1:]):
            found[f"block{index}_inner"], found[f"block{index}_outer"] = word_states[index], states
            found[f"feature_{index}"] = states[:, 1:].transpose(1, 2).unflatten(2, grid_size)
        results |= {f"{name}{way}": array for name, array in found.items()}
    return results
