"""OAT: the network with teacher forcing, its greedy scanpaths, and the metrics."""

import numpy as np
import torch

from hf_attn.analysis.scanpaths import (
    behaviour,
    behavioural_distance,
    edit_distance,
    multimatch,
    object_similarity,
    sequence_score,
)
from hf_attn.checkpoints.official import from_official

from ..case import Case
from ..tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    return _metrics(case) if case.entry == "metrics" else _network(case)


def _network(case: Case) -> dict[str, torch.Tensor]:
    table = case.optional_input("pe_table")
    model = from_official("oat", case.weights, config=case.config | ({} if table is None else {"pe_table": table}))
    crops = (case.input("crops_u8").float() / 255).permute(0, 1, 4, 2, 3)
    batch_size, num_objects = crops.shape[:2]
    target = case.input("targets").long()
    ids = case.input("tgt_ids").long()
    for name in ("src_ids", "src_coords", "tgt_coords"):  # inputs that the model derives itself
        case.used.add(name)
    valid = ids[:, 1:] != num_objects + 1
    labels = ids[:, 1:].masked_fill(~valid, -100)

    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        encoder, decoder = model.oat.encoder, model.oat.decoder
        with recorded({"encoder": encoder.layers[0], "decoder": decoder.layers[0]}, inputs=True) as embeddings:
            output = model(crops, target, labels=labels, output_hidden_states=True)
        images = embeddings["encoder"]
        # The gradient at the encoder's tokens excludes the images in the decoder.
        gradient = torch.autograd.grad(output.loss, images)[0][..., : model.config.hidden_size // 2]
        crop_index = torch.cat([torch.arange(num_objects).expand(batch_size, -1), target[:, None]], dim=1)
        shown = crops.take_along_dim(crop_index[..., None, None, None], dim=1).flatten(0, 1).requires_grad_()
        encoder.object_encoder(shown).backward(gradient.flatten(0, 1))
        generated = model.generate(crops, target_index=target, max_new_tokens=case.config["max_len"])
        found = {
            "loss": output.loss[None],
            "logits_valid": output.logits[valid],
            "generated_greedy": _strip(generated, num_objects, case.arrays["generated_greedy"].shape[1]),
            "grad_src_images_sum": shown.grad.sum((2, 3)).view(batch_size, num_objects + 1, -1),
            "inter_encoder_embeddings": images,
            "inter_encoder_out": output.encoder_last_hidden_state,
            "inter_decoder_embeddings_valid": embeddings["decoder"][valid],
            "inter_decoder_out_valid": output.decoder_hidden_states[-1][valid],
        }
        results |= {f"{name}@{implementation}": array for name, array in found.items()}
    return results


def _strip(generated: torch.Tensor, num_objects: int, length: int) -> torch.Tensor:
    """Without BOS, EOS and PAD, and filled up with -1 to the length of the longest."""
    scanpaths = generated[:, 1:].masked_fill(generated[:, 1:] >= num_objects, -1).int()
    longest = (scanpaths >= 0).sum(1).max().item()
    scanpaths = scanpaths[:, :longest]
    return torch.nn.functional.pad(scanpaths, (0, max(0, length - longest)), value=-1)


def _metrics(case: Case) -> dict[str, torch.Tensor]:
    pairs = {name: [row[row >= 0].tolist() for row in case.input(name)] for name in ("pred", "truth")}
    pairs = list(zip(pairs["pred"], pairs["truth"], strict=True))
    targets = case.input("target").tolist()
    points = zip(case.input("pred_xy").numpy(), case.input("truth_xy").numpy(), pairs, strict=True)
    screen = tuple(case.config["screen"])
    similarities = [multimatch(a[: len(pred)], b[: len(truth)], screen) for a, b, (pred, truth) in points]
    model, people = (
        [behaviour(pair[index], target) for pair, target in zip(pairs, targets, strict=True)] for index in (0, 1)
    )
    found = {
        "sequence_score": [sequence_score(*pair) for pair in pairs],
        "edit_distance": [float(edit_distance(*pair)) for pair in pairs],
        "behaviour_pred": np.array(model),
        "behaviour_truth": np.array(people),
        "delta": [behavioural_distance(model, people)],
        "multimatch": np.array(similarities),
        "sim": [object_similarity(case.input("probabilities").numpy(), case.input("next_object").numpy())],
    }
    return {name: torch.as_tensor(np.asarray(values)).float() for name, values in found.items()}
