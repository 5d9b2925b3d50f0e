"""ComplexFormer against the Llama of the same shape: a step of training, and a step of decoding with a cache.

    python scripts/benchmarks/complexformer.py --json complexformer.json

A ratio is the time of ComplexFormer over that of the Llama, minimum of alternating repeats.
"""

import argparse
from pathlib import Path

import torch
from _common import alternating_times, print_table, write_json
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_attn.architectures.decoder import CACHE
from hf_attn.modeling.complexformer.modeling_complexformer import ComplexFormerForCausalLM


def make_models(arguments: argparse.Namespace) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.hidden_size * 8 // 3,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden_size // 64,
            max_position_embeddings=4096,
        )
    )
    return {"llama": llama, "complexformer": ComplexFormerForCausalLM.from_base(llama)}


def check(models: dict[str, torch.nn.Module], ids: torch.Tensor) -> None:
    """Check that an untrained model computes the same as its base before measuring."""
    with torch.no_grad():
        expected, found = (model.eval()(ids).logits for model in models.values())
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def training_step(model: torch.nn.Module, ids: torch.Tensor):
    def step():
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    return step


def decoding_step(model: torch.nn.Module, ids: torch.Tensor):
    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})

    @torch.no_grad()
    def step():
        model.eval()
        model(ids[:, -1:], **{CACHE: cache})
        cache.crop(-1)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="output file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, rows = make_models(arguments), []
    for length in arguments.lengths:
        ids = torch.randint(8192, (1, length))
        check(models, ids)
        for what, make, repeats in (("training", training_step, 1), ("decoding", decoding_step, 5)):
            seconds = alternating_times(
                {name: make(model, ids) for name, model in models.items()}, arguments.repeats * repeats, warmup=2
            )
            best = {name: min(values) for name, values in seconds.items()}
            rows.append(
                {
                    "step": what,
                    "length": length,
                    "llama_ms": 1000 * best["llama"],
                    "complexformer_ms": 1000 * best["complexformer"],
                    "ratio": best["complexformer"] / best["llama"],
                }
            )
    print_table(rows)
    write_json(arguments.json, {"hidden_size": arguments.hidden_size, "layers": arguments.layers, "rows": rows})


if __name__ == "__main__":
    main()
