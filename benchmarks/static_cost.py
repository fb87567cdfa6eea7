"""What the compiler made of every Triton kernel: registers, spills, instructions of the main loop.

    python -m benchmarks.static_cost      # compile for sm_80, sm_90 and sm_100, write the report

Needs no GPU: kernels are compiled ahead of time, at the launch configurations the library uses for
UniFormer's own shapes, and the machine code is counted. The report lies in
`benchmarks/results/static_cost.json`; a change that adds instructions says why.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.shapes import STAGES

RESULTS = Path(__file__).parent / "results" / "static_cost.json"
ARCHS = (80, 90, 100)
B = 8
SHAPES = tuple((s.C, s.T, s.H, s.W) for s in STAGES)
LOCAL = (*SHAPES[:2], (56, 8, 56, 56), (112, 8, 28, 28))  # and the light models' widths
# Tokens, heads and their channels: of the deep stages, the light models, and the widest served.
HEADS = (
    *((s.tokens, s.heads, s.C // s.heads) for s in STAGES[2:]),
    (1568, 8, 28), (1568, 8, 32), (1568, 4, 128),
)  # fmt: skip
# The DPE everywhere, the affinity in the local stages, and of the ablations in the first.
KERNELS = {3: SHAPES, 5: SHAPES[:2], 7: SHAPES[:1]}

# Machine instructions by what they are for; "integer" is all else: addresses, predicates, zeros.
PRODUCTS = {"FFMA": 1, "FHFMA": 1, "FFMA2": 2}  # the latter two are sm_100's
KINDS = {
    "mma": r"HMMA|HGMMA|UTC\w*MMA",  # on tensor cores: of sm_80, sm_90, sm_100
    "ffma": r"FFMA|FHFMA|FMUL|FADD",
    "load": r"LDG",
    "store": r"STG",
    "shared": r"LDS|STS|BAR",
    "spill": r"LDL|STL",
    "convert": r"PRMT|F2F|SHF\.L\.U32|IMAD\.U32",  # bf16 halves to the upper half of a register
    "branch": r"BRA|EXIT|WARPSYNC|BSSY|BSYNC|NOP",
}


Case = tuple[str, Any, dict[str, Any], dict[str, int]]


def cases(arch: int) -> Iterator[Case]:
    """For sm_`arch`, in the same order for each: label, kernel, its arguments (a dtype for a
    pointer, or a value), options of the launch."""
    yield from _dwconv3d_cases()
    yield from _dwconv3d_norm_cases()
    for C, T, H, W in LOCAL:
        yield from (*_pointwise_cases(B * T * H * W, C), *_ffn_cases(B * T * H * W, C))
    yield from _patch_embed_cases()
    for tokens, heads, channels in HEADS:
        yield from _attention_cases(tokens, heads, channels, wgmma=arch >= 90)


def _dwconv3d_cases() -> Iterator[Case]:
    """Backward, kernels that fit go in one pass; else dx is a forward."""
    from uniformer_kernels import dwconv3d_bwd_triton as bwd
    from uniformer_kernels import dwconv3d_triton as fwd

    for k, stages in KERNELS.items():
        for C, T, H, W in stages:
            kernel, shape = (k, k, k), (B, T, H, W, C)
            label = f"{k}x{k}x{k} C={C} {T}x{H}x{W} bf16"
            strides = dict(zip("bth", (T * H * W * C, H * W * C, W * C), strict=True))
            strides = {f"stride_{t}{axis}": n for t in ("dy", "x") for axis, n in strides.items()}
            pointers: dict[str, Any] = dict.fromkeys(("DY", "X", "Y", "DX"), "bf16")
            pointers |= dict.fromkeys(("Weight", "Bias", "Partial"), "fp32") | {"Stats": None}
            arguments = pointers | strides | {"MIRROR": False, "RESIDUAL": k == 3}
            config = fwd.fwd_config(shape, C, kernel)
            yield (
                f"dwconv3d_fwd {label}", fwd._dwconv3d_fwd_kernel,
                arguments | config.arguments, {"num_warps": config.warps},
            )  # fmt: skip
            if bwd.in_one_pass(kernel, W):
                config = bwd.bwd_config(shape, C, C, kernel, multiprocessors=132)
                name, run = "bwd", bwd._dwconv3d_bwd_kernel
            elif bwd.walks(kernel, W):
                config = bwd.bwd_config(shape, C, C, kernel, multiprocessors=132, with_dx=False)
                name, run = "bwd_weight", bwd._dwconv3d_bwd_kernel
                arguments |= {"DX": None, "Weight": None}
            else:
                config = bwd.tiles_config(shape, C, C, kernel, multiprocessors=132)
                name, run = "bwd_weight", bwd._dwconv3d_bwd_tiles_kernel
            yield (
                f"dwconv3d_{name} {label}", run,
                arguments | config.arguments, {"num_warps": config.warps},
            )  # fmt: skip


def _dwconv3d_norm_cases() -> Iterator[Case]:
    """The DPE of the global blocks, under autocast: the stream in fp32, its norm in bf16."""
    from uniformer_kernels import dwconv3d_norm_triton as op

    for C, T, H, W in SHAPES[2:]:
        strides = dict(zip("bth", (T * H * W * C, H * W * C, W * C), strict=True))
        arguments: dict[str, Any] = {f"stride_x{axis}": n for axis, n in strides.items()}
        arguments |= dict.fromkeys(("X", "Y", "Weight", "Bias", "Gamma", "Beta"), "fp32")
        arguments |= {"Normed": "bf16", "eps": 1e-6, "RESIDUAL": True} | NORM
        config = op.fwd_config((B, T, H, W, C), C, (3, 3, 3))
        yield (
            f"dwconv3d_norm_fwd 3x3x3 C={C} {T}x{H}x{W} bf16", op._dwconv3d_norm_fwd_kernel,
            arguments | config.arguments, {"num_warps": config.warps},
        )  # fmt: skip


NORM = {"Mean": "fp32", "Rstd": "fp32"}
THROUGH = {"Shift": "fp32", "Slope": "fp32"}  # a norm, backward


def _pointwise_cases(M: int, C: int) -> Iterator[Case]:
    """Under autocast: the stream in fp32, products in bf16. conv1 has the norm, conv2 the rest."""
    from uniformer_kernels import pointwise_triton as op

    rows = {"M": M, "R": M // B}
    plain = dict.fromkeys((*NORM, "Scale", "Residual", "Stats"))
    config = op.fwd_config(M, C, C)
    for name, more in (
        ("norm", {"X": "fp32", "Y": "bf16"} | NORM),
        (
            "residual",
            {"X": "bf16", "Y": "fp32", "Scale": "fp32", "Residual": "fp32", "Stats": "fp32"},
        ),
    ):
        arguments = {"Weight": "bf16", "Bias": "fp32"} | plain | more | rows | config.arguments
        label = f"pointwise_fwd {name} bf16 rows C={C}"
        yield label, op._pointwise_fwd_kernel, arguments, options(config)
    config = op.bwd_weight_config(M, C, C, multiprocessors=132)
    pointers = {"DY": "bf16", "X": "fp32", "Scale": None, "Partial": "fp32", "PartialBias": "fp32"}
    arguments = pointers | NORM | rows | config.arguments | {"DTYPE": tl_bf16()}
    yield (
        f"pointwise_bwd_weight bf16 rows C={C}",
        op._pointwise_bwd_weight_kernel,
        arguments,
        options(config),
    )
    config = op.bwd_input_config(M, C, C)
    pointers = {"DY": "bf16", "Weight": "bf16", "X": "fp32", "Scale": None, "More": "fp32"}
    pointers |= {"DX": "fp32"}
    arguments = pointers | NORM | THROUGH | rows | config.arguments
    yield (
        f"pointwise_bwd_input bf16 rows C={C}",
        op._pointwise_bwd_input_kernel,
        arguments,
        options(config),
    )


def _ffn_cases(M: int, C: int) -> Iterator[Case]:
    from uniformer_kernels import ffn_triton as op

    F = 3 * C if C in (56, 112) else 4 * C
    pointers: dict[str, Any] = {
        "X": "fp32",
        "W1": "bf16",
        "B1": "fp32",
        "W2": "bf16",
        "B2": "fp32",
    } | NORM
    pointers |= {"Scale": "fp32", "DY": "fp32", "Y": "fp32", "DX": "fp32"} | THROUGH
    pointers |= dict.fromkeys(("Partial1", "Partial2", "PartialBias1", "PartialBias2"), "fp32")
    pointers |= {"M": M, "R": M // B, "RESIDUAL": True}
    for name, config in (
        ("fwd", op.fwd_config(M, C, F)),
        ("bwd_weight", op.bwd_weight_config(M, C, F, multiprocessors=132, shared=op.ROOMY)),
        ("bwd_input", op.bwd_input_config(M, C, F)),
    ):
        kernel = getattr(op, f"_ffn_{name}_kernel")
        yield f"ffn_{name} bf16 rows C={C}", kernel, pointers | config.arguments, options(config)


def _attention_cases(N: int, H: int, D: int, wgmma: bool) -> Iterator[Case]:
    from uniformer_kernels import attention_triton as op

    packed = {"b": N * 3 * H * D, "n": 3 * H * D, "h": D}
    strides = {f"stride_{t}{axis}": n for t in "qkd" for axis, n in packed.items()}
    pointers = dict.fromkeys(("Q", "K", "V", "Out", "DOut", "DQ", "DK", "DV"), "bf16")
    pointers |= {"Lse": "fp32", "Delta": "fp32"}
    for name, config in (
        ("fwd", op.fwd_config(B, N, N, H, D, 2)),
        ("bwd_queries", op.bwd_queries_config(B, N, N, H, D, 2, wgmma)),
        ("bwd_keys", op.bwd_keys_config(B, N, N, H, D, 2, wgmma)),
    ):
        kernel = getattr(op, f"_attention_{name}_kernel")
        sizes = {"N": N, "M": N, "H": H, "scale": 0.125}
        arguments = pointers | strides | sizes | config.arguments
        yield f"attention_{name} bf16 N={N} H={H} D={D}", kernel, arguments, options(config)


EMBEDDINGS: dict[str, Any] = {  # x's dtype and sizes, channels out, kernel, stride, padding
    "stem": ("bf16", (16, 224, 224, 3), 64, (3, 4, 4), (2, 4, 4), (1, 0, 0)),
    "stem of pixels": ("u8", (16, 224, 224, 3), 64, (3, 4, 4), (2, 4, 4), (1, 0, 0)),
    **{
        f"to C={next_.C}": ("fp32", (s.T, s.H, s.W, s.C), next_.C, (1, 2, 2), (1, 2, 2), (0, 0, 0))
        for s, next_ in pairwise(STAGES)
    },
}


def _patch_embed_cases() -> Iterator[Case]:
    """Clips in NCTHW, feature maps in channels-last memory."""
    from uniformer_kernels import patch_embed_triton as op

    for label, (dtype, (T, H, W, C), N, kernel, stride, padding) in EMBEDDINGS.items():
        out = tuple(
            (size + 2 * p - k) // s + 1
            for size, k, s, p in zip((T, H, W), kernel, stride, padding, strict=True)
        )
        K = C * math.prod(kernel)
        nct = "stem" in label
        strides = (C * T * H * W, H * W, W, 1, T * H * W) if nct else (T * H * W * C, H * W * C,
                                                                      W * C, C, 1)  # fmt: skip
        config = op.fwd_config(B * math.prod(out), K, N, 2)
        pointers = {"X": dtype, "Weight": "bf16", "Y": "fp32"}
        pointers |= dict.fromkeys(("Bias", "Gamma", "Beta"), "fp32")
        sizes = dict(zip(("T", "H", "W", "TO", "HO", "WO"), (T, H, W, *out), strict=True))
        sizes |= {f"stride_x{axis}": n for axis, n in zip("bthwc", strides, strict=True)}
        numbers = dict.fromkeys(
            ["eps", *(f"{n}{i}" for n in ("scale", "shift") for i in "012")], 0.5
        )
        constants = dict(zip(("KT", "KH", "KW", "ST", "SH", "SW", "PT", "PH", "PW"),
                             (*kernel, *stride, *padding), strict=True))  # fmt: skip
        constants |= {"C": C, "N": N, "COLUMNS_LAST": nct, "PIXELS": dtype == "u8"}
        arguments = pointers | sizes | {"M": B * math.prod(out)} | numbers | constants
        yield (
            f"patch_embed_fwd bf16 {label}", op._patch_embed_fwd_kernel,
            arguments | config.arguments, options(config),
        )  # fmt: skip


def options(config: Any) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def tl_bf16() -> Any:
    import triton.language as tl

    return tl.bfloat16


def compile_for(
    arch: int, kernel: Any, arguments: dict[str, Any], options: dict[str, int]
) -> dict[str, Any]:
    """Registers, shared memory, spills and instructions of a kernel on sm_`arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, float):
            signature[name] = "fp32"
        elif value is None:
            signature[name], values[name] = "constexpr", None
        elif isinstance(value, str):
            signature[name], attributes[(i,)] = f"*{value}", [["tt.divisibility", 16]]
        elif name in constexprs or value == 1:  # as a launch specialises
            signature[name], values[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["LOCAL"] + usage["STACK"],
        "shared_bytes": compiled.metadata.shared,
        "warps": options["num_warps"],
        "instructions": len(sass),
        "tensor_cores": _mix([i for _, i in sass])["mma"],
        "instruction": _tensor_core_instruction(sass),
        "loop": _mix(_main_loop(sass)),
    }


def _disassemble(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """What cuobjdump says of resources, and (address, instruction)."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run(
                [tools / "cuobjdump", flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)
    resources = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return resources, [(int(address, 16), instruction.strip()) for address, instruction in found]


def _tensor_core_instruction(sass: list[tuple[int, str]]) -> str | None:
    """HMMA on sm_80, HGMMA (wgmma) on sm_90, UTC*MMA on sm_100, where the compiler found a way."""
    names = Counter(re.findall(rf"\b({KINDS['mma']})", "\n".join(i for _, i in sass)))
    return names.most_common(1)[0][0] if names else None


def _main_loop(sass: list[tuple[int, str]]) -> list[str]:
    """The loop with the most products: from the target of a backward branch to the branch."""
    loops = [[i for _, i in sass]]
    for address, instruction in sass:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            start = int(target[1], 16)
            loops.append([i for a, i in sass if start <= a <= address])

    def products(loop: list[str]) -> tuple[int, int]:
        mix = _mix(loop)
        return mix["mma"], mix["ffma"]

    inner = [loop for loop in loops[1:] if any(products(loop))]
    return max(inner, key=products) if inner else loops[0]


def _mix(instructions: list[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    products = 0
    for instruction in instructions:
        opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
        kind = next((k for k, pattern in KINDS.items() if re.match(pattern, opcode)), "integer")
        counts[kind] += 1
        products += PRODUCTS.get(opcode.partition(".")[0], 0)
    return {"all": len(instructions), "products": products} | {
        k: counts[k] for k in (*KINDS, "integer")
    }


def report(archs: tuple[int, ...] = ARCHS, match: str = "") -> list[dict[str, Any]]:
    """A row for each kernel and shape whose label contains `match`, and architecture."""
    return [
        {"kernel": label, "arch": f"sm_{arch}"} | compile_for(arch, kernel, arguments, options)
        for same in zip(*(cases(arch) for arch in archs), strict=True)
        for arch, (label, kernel, arguments, options) in zip(archs, same, strict=True)
        if match in label
    ]


def main() -> None:
    if os.environ.pop("TRITON_INTERPRET", None):
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    import triton

    archs = tuple(map(int, sys.argv[1:])) or ARCHS
    rows = report(archs)
    for row in rows:
        loop = row["loop"]
        print(
            f"{row['kernel']:<48}{row['arch']:<8}{row['registers']:>4} regs "
            f"{row['spilled_bytes']:>4} spilled {row['shared_bytes']:>6} shared  "
            f"loop {loop['all']:>5}: mma {loop['mma']:>3} products {loop['products']:>4} "
            f"load {loop['load']:>3} "
            f"convert {loop['convert']:>3} integer {loop['integer']:>4}"
        )
    if archs == ARCHS:
        content = {"environment": {"triton": triton.__version__}, "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
