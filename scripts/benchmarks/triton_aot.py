"""Compile the Triton kernels of a mechanism ahead of time, without a GPU, and report the resources that they need.

    python scripts/benchmarks/triton_aot.py sigmoid --json aot.json
    python scripts/benchmarks/triton_aot.py landmark --block-size 64

Prints shared memory and, for NVIDIA targets, registers and spills as cuobjdump reads them from the binary. Nothing is
run, so the numbers show whether a kernel fits its target, not how fast it is.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from _common import print_table, write_json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_attn.kernels.landmark import triton as landmark
from hf_attn.kernels.sigmoid import triton as sigmoid
from hf_attn.kernels.triton_tiles import dimension_constants


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes per block
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OPERANDS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
STATISTICS = ("head_bias", "slopes", "normalisers", "corrections")
MECHANISMS = {"sigmoid": sigmoid, "landmark": landmark}


def sigmoid_options(kernel: str, target: str, head_dim: int, dtype: str, mask: str, has_alibi: bool = False):
    """Constants and launch parameters."""
    options = sigmoid.launch_options(kernel, head_dim, DTYPES[dtype], is_hip=TARGETS[target].backend == "hip")
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    return {"MASK": mask, "HAS_HEAD_BIAS": False, "HAS_ALIBI": has_alibi, **options}, launch


def landmark_options(kernel: str, target: str, head_dim: int, dtype: str, mask: str, block_size: int = 64):
    """Constants and launch parameters."""
    return {"HAS_MASK": mask != "none", "BLOCK": block_size}, landmark.launch_options(block_size, head_dim)


def compile_kernel(mechanism: str, kernel: str, target: str, head_dim: int, dtype: str, mask: str = "none", **options):
    """Compile one kernel as its launch would; the result's `metadata.shared` is in bytes.

    Args:
        options: `has_alibi` of sigmoid attention, `block_size` of landmark attention.
    """
    function = MECHANISMS[mechanism].KERNELS[kernel]
    options_of = {"sigmoid": sigmoid_options, "landmark": landmark_options}[mechanism]
    constants, launch = options_of(kernel, target, head_dim, dtype, mask, **options)
    constants |= dimension_constants(head_dim, head_dim)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in OPERANDS:
            signature[name] = f"*{dtype}"
        elif name == "mask":
            signature[name] = {"boolean": "*u8", "additive": f"*{dtype}", "none": f"*{dtype}"}[mask]
        elif name in STATISTICS:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("scaling", "bias", "masked_at") else "i32"
        if signature[name].startswith("*") or (name.startswith("stride_") and "mask" not in name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=launch)


def registers_and_spills(compiled) -> tuple[int, int] | None:
    """Registers of a thread and bytes that it spills, from a CUDA binary; `None` for other targets."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if "cubin" not in compiled.asm or not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"REG:(\d+)", usage.stdout)[1]), int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mechanism", choices=MECHANISMS)
    parser.add_argument("--kernels", nargs="+", choices=sigmoid.KERNELS, default=list(sigmoid.KERNELS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16"])
    parser.add_argument("--mask", choices=("none", "boolean", "additive"), default="none")
    parser.add_argument("--alibi", action="store_true", help="of sigmoid attention")
    parser.add_argument("--block-size", type=int, default=64, help="of landmark attention")
    parser.add_argument("--json", type=Path, help="output file")
    arguments = parser.parse_args()
    if arguments.mechanism == "landmark" and arguments.mask == "additive":
        parser.error("the kernels of landmark attention support only boolean masks")

    options = {"sigmoid": {"has_alibi": arguments.alibi}, "landmark": {"block_size": arguments.block_size}}
    rows = []
    for target in arguments.targets:
        for head_dim in arguments.head_dims:
            for dtype in arguments.dtypes:
                for kernel in arguments.kernels:
                    compiled = compile_kernel(
                        arguments.mechanism,
                        kernel,
                        target,
                        head_dim,
                        dtype,
                        arguments.mask,
                        **options[arguments.mechanism],
                    )
                    registers, spills = registers_and_spills(compiled) or (None, None)
                    rows.append(
                        {
                            "target": target,
                            "kernel": kernel,
                            "head_dim": head_dim,
                            "dtype": dtype,
                            "shared": compiled.metadata.shared,
                            "shared_limit": SHARED_MEMORY[target],
                            "registers": registers,
                            "stack": spills,
                        }
                    )
    print_table(rows)
    write_json(arguments.json, {"triton": triton.__version__, "rows": rows})


if __name__ == "__main__":
    main()
