"""`hf-attn plan`: the placement of a batch of sequences by Zeppelin, and the predicted time of a step."""

import argparse
import json
from pathlib import Path

from ._command import CommandError, formatter, positive


#: share of the capacity that a batch of a named distribution fills
_FILLED = 0.8


def add_parser(commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="distribute sequences of different lengths over GPUs, and predict the step time",
        description="Partition a batch of sequences over the GPUs of a cluster with Zeppelin. Prints the assignment, "
        "its balance, and the predicted step time of this and other placements.",
        epilog="example: hf-attn plan mid --nodes 2 --gpus 8 --capacity 5120 --model 7b --hardware a800 --plot plan.png",
        formatter_class=formatter,
    )
    plan.add_argument(
        "lengths",
        metavar="LENGTHS",
        help="a file with one length per line or a JSON list, a folder of `datasets` with a column input_ids or "
        "length, or a distribution: short, mid, long, web",
    )
    plan.add_argument("--nodes", metavar="N", type=positive, default=1, help="nodes (%(default)s)")
    plan.add_argument("--gpus", metavar="N", type=positive, default=8, help="GPUs per node (%(default)s)")
    plan.add_argument(
        "--capacity",
        metavar="N",
        type=positive,
        help="capacity of a GPU in tokens (default: 15%% more than the batch needs)",
    )
    plan.add_argument(
        "--model",
        metavar="NAME",
        default="7b",
        help="3b, 7b, 13b, 30b, or a folder or Hub id of a Llama-like model (%(default)s)",
    )
    plan.add_argument(
        "--hardware",
        metavar="NAME",
        default="a800",
        help="a800, h800, h200, or a JSON file of constants (%(default)s)",
    )
    plan.add_argument("--sequences", metavar="N", type=positive, help="use the first N sequences of a file or dataset")
    plan.add_argument("--tokens", metavar="N", type=positive, help="tokens of a batch drawn from a distribution")
    plan.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the random lengths (%(default)s)")
    plan.add_argument("--output", metavar="FILE", type=Path, help="write the plan and the predictions to a JSON file")
    plan.add_argument("--plot", metavar="FILE", type=Path, help="plot the assignment of sequences to ranks")
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..distributed.zeppelin.partition import default_capacity, partition
    from ..distributed.zeppelin.simulate import simulate

    model, hardware = _model(options.model), _hardware(options.hardware)
    lengths = _lengths(options)
    ranks = options.nodes * options.gpus
    capacity = options.capacity or default_capacity(lengths, ranks)
    plan = partition(lengths, options.nodes, options.gpus, capacity)
    seconds = simulate(plan, model, hardware)
    for target in (options.output, options.plot):
        if target is not None and not target.parent.is_dir():
            raise CommandError(f"The folder {target.parent} does not exist.")
    _print(plan, model, hardware, seconds, options)
    if options.output is not None:
        content = {
            "plan": asdict(plan),
            "tokens_per_rank": plan.tokens_per_rank,
            "predicted_seconds": seconds,
            "model": asdict(model),
            "hardware": asdict(hardware),
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"\nThe plan was written to {options.output}.")
    if options.plot is not None:
        from ..distributed.zeppelin.plot import plot_plan

        try:
            plot_plan(plan, model, hardware, seconds, options.plot)
        except ImportError as error:
            raise CommandError(str(error)) from error
        print(f"The plot was written to {options.plot}.")


def _lengths(options: argparse.Namespace) -> list[int]:
    from ..distributed.zeppelin.lengths import DISTRIBUTIONS, read_lengths, sample_lengths

    if options.lengths not in DISTRIBUTIONS:
        if options.tokens is not None:
            raise CommandError(
                f"--tokens is for a distribution, but {options.lengths} is a file or folder; use --sequences."
            )
        try:
            return read_lengths(options.lengths, options.sequences)
        except ImportError as error:
            raise CommandError(str(error)) from error
    if options.sequences is not None:
        raise CommandError(
            "--sequences is for a file or a dataset; use --tokens to set the size of a batch drawn from a "
            "distribution."
        )
    ranks = options.nodes * options.gpus
    tokens = options.tokens or int(_FILLED * ranks * (options.capacity or 5120))
    return sample_lengths(options.lengths, tokens, options.seed)


def _model(name: str):
    from ..distributed.zeppelin.cost import MODELS, ModelShape

    if name in MODELS:
        return MODELS[name]
    from transformers import AutoConfig

    try:
        return ModelShape.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError, AttributeError) as error:
        raise CommandError(
            f"--model {name} is not one of {', '.join(MODELS)}, and cannot be used as a configuration: {error}"
        ) from error


def _hardware(name: str):
    from dataclasses import fields

    from ..distributed.zeppelin.cost import HARDWARE, Hardware

    if name in HARDWARE:
        return HARDWARE[name]
    names = [field.name for field in fields(Hardware)]
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        return Hardware(**content)
    except FileNotFoundError as error:
        raise CommandError(
            f"--hardware {name} is not one of {', '.join(HARDWARE)}, and there is no such file."
        ) from error
    except (TypeError, ValueError) as error:
        raise CommandError(f"--hardware {name} must be a JSON object with {', '.join(names)}: {error}") from error


def _print(plan, model, hardware, seconds, options) -> None:
    from ..distributed.zeppelin.cost import FORWARD, crossover
    from ..distributed.zeppelin.partition import ZONES
    from ..distributed.zeppelin.remap import plan_remap
    from ..distributed.zeppelin.simulate import attention_seconds_per_rank

    ranks, total = plan.num_ranks, sum(plan.lengths)
    print(
        f"{len(plan.lengths)} sequences, {total:,} tokens, on {plan.nodes} x {plan.gpus_per_node} GPUs with a "
        f"capacity of {plan.capacity:,} tokens each ({total / ranks / plan.capacity:.0%} filled)"
    )
    print(f"\n{'zone':<8}{'sequences':>10}{'tokens':>12}{'longest':>10}{'ranks of a ring':>18}")
    for zone in ZONES:
        members = [i for i, z in enumerate(plan.zones) if z == zone]
        sizes = [len(plan.shares[i]) for i in members]
        lengths = [plan.lengths[i] for i in members]
        ring = "-" if not sizes else f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        print(f"{zone:<8}{len(members):>10}{sum(lengths):>12,}{max(lengths, default=0):>10,}{ring:>18}")
    remap = plan_remap(plan.tokens_per_rank, plan.gpus_per_node)
    tokens, busy = plan.tokens_per_rank, attention_seconds_per_rank(plan, model, hardware, FORWARD)
    print(
        f"\nTokens of a rank in attention: {min(tokens):,} to {max(tokens):,}; after remapping, {min(remap.target):,} "
        f"to {max(remap.target):,}; moves {sum(n for *_, n in remap.moves):,} tokens"
    )
    print(f"\nPrediction for {options.model} on {options.hardware}, with these constants")
    print(
        f"  {hardware.flops_attn:.3g} FLOP/s in attention, {hardware.flops_linear:.3g} in linear layers; {hardware.bw_intra:.3g} B/s "
        f"inside a node, {hardware.nics} network cards of {hardware.bw_nic:.3g} B/s"
    )
    print(f"  ranks are idle for {1 - sum(busy) / ranks / max(busy):.0%} of the attention time on average")
    if plan.gpus_per_node > 1:
        print(
            "  a ring within a node hides its communication from "
            f"{crossover(model, hardware, plan.gpus_per_node, False):,.0f} tokens on"
        )
    if plan.nodes > 1:
        print(f"  a ring over all ranks from {crossover(model, hardware, ranks, True):,.0f} tokens on")
    print(f"\n{'method':<22}{'seconds per step':>15}{'against te_cp':>15}")
    for name, time in seconds.items():
        print(f"{name:<22}{time:>15.4g}{seconds['te_cp'] / time:>14.2f}x")
