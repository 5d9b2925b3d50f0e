"""`hf-attn check-gpu`: whether the GPU kernels compute the right thing on this machine."""

import argparse
import sys

from ._command import CommandError, formatter, positive


#: share of the time limit for the comparisons; the rest is for measuring the speed
SHARE_OF_COMPARISONS = 0.75


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "check-gpu",
        help="compare every GPU kernel with its reference implementation on this machine's GPU",
        description="Compare every Triton kernel and every FlexAttention implementation with the reference implementation "
        "on this machine's GPU, forward and backward, in float32, float16 and bfloat16. Automatic names such as "
        'attn_implementation="sigmoid" use a GPU kernel only after it has passed this check; the result is stored in the cache '
        "for this GPU and the installed versions of torch and triton.",
        formatter_class=formatter,
    )
    parser.add_argument("--device", metavar="N", type=int, default=0, help="index of the GPU (%(default)s)")
    parser.add_argument(
        "--seconds",
        metavar="N",
        type=positive,
        default=230,
        help="time limit in seconds; kernels that are not finished by then count as not passed (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        raise CommandError(
            "check-gpu needs a GPU that the installed PyTorch can use, but found none. Nothing was recorded. Without "
            "a GPU, the automatic names use the CPU implementations."
        )
    if options.device not in range(torch.cuda.device_count()):
        raise CommandError(
            f"There is no GPU {options.device}. Number of GPUs: {torch.cuda.device_count()}, counted from 0."
        )
    if not check(torch.device("cuda", options.device), torch.cuda.get_device_name(options.device), options.seconds):
        sys.exit(1)


def check(device, device_name: str, seconds: float, **choice) -> bool:
    """Run the kernels on a device, print the table and write the record; the rest goes to `check_kernels`.

    Returns:
        Whether no kernel was wrong.
    """
    import time

    from ..attention.gpu_check import check_kernels, measure_speed, record_of, table
    from ..kernels.gpu_record import environment_key, write_record

    print(environment_key(device_name))
    start = time.monotonic()
    results = check_kernels(device, SHARE_OF_COMPARISONS * seconds, progress=_progress, **choice)
    for result in results:
        if result.passed and time.monotonic() - start < seconds:
            _progress(f"{result.kernel} {result.dtype} speed")
            measure_speed(result, device)
    _progress("")
    print(table(results))
    file = write_record(device_name, record_of(results))
    passed = sum(result.passed for result in results)
    print(f"\n{passed} of {len(results)} passed in {time.monotonic() - start:.0f} s; recorded in {file}")
    return not any(result.faults for result in results)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
