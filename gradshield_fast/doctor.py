"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gradshield_fast.errors import BackendUnavailable, GradShieldError, InputError
from gradshield_fast.model_source import DEMO_MODEL, resolve

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "scikit-learn", "peft", "gguf", "triton")

_PRECISION = "precision"

Facts = list[tuple[str, str]]


def machine() -> Facts:
    """Describe the hardware.

    Returns:
        Names and values.
    """
    import torch

    flags = _cpu_flags()
    out = [
        ("processor", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"),
        ("instructions", ", ".join(flag for flag in _FLAGS if flag in flags) or "not known"),
        ("memory", _memory()),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            out.append((f"GPU {index}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"))
    elif torch.version.cuda is None and torch.version.hip is None:
        out.append(("GPU", "none: this build of torch is for the CPU"))
    else:
        out.append(("GPU", "none that torch can see"))
    return out


def software() -> Facts:
    """Describe what is installed, and what is missing for what.

    Returns:
        Names and values.
    """
    out: Facts = [("python", platform.python_version())]
    missing = {
        "peft": "missing: --adapter needs it (pip install peft)",
        "gguf": "missing: .gguf models and the demo need it (pip install gguf)",
        "triton": "missing: no Triton kernels",
    }
    for name in _PACKAGES:
        try:
            out.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            out.append((name, missing.get(name, "missing")))
    try:
        resolve(DEMO_MODEL)
        out.append(("demo model", "here"))
    except GradShieldError as error:
        out.append(("demo model", str(error)))
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    out.append(("C++ compiler", compiler or "none: the native CPU kernels cannot be built"))
    out.append(("native CPU kernels", _native()))
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    out.append(("nvcc", nvcc or "none: the native CUDA kernels cannot be built"))
    out.append(("native CUDA kernels", _native_cuda()))
    return out


def precisions() -> Facts:
    """Say how fast the device multiplies in each precision; measured once, and kept as the ops' measurements are.

    It is advice: a run takes the precision that it is asked for, whatever is faster.

    Returns:
        Names and values.
    """
    import torch

    from gradshield_fast.ops import measured

    cuda, n = torch.cuda.is_available(), 1024
    x = torch.ones(n, n, device="cuda" if cuda else "cpu")
    inputs = {"float32": x, "bfloat16": x.bfloat16(), **({"float16": x.half()} if cuda else {})}
    device, clock = measured.processor(), measured.cpu_milliseconds
    if cuda:
        device, clock = torch.cuda.get_device_name(), measured.gpu_milliseconds
    calls = {name: partial(torch.mm, y, y) for name, y in inputs.items()}
    measured.fastest(_PRECISION, device, [x], calls, clock)
    kept = (entry for key, entry in measured.measurements().items() if key.startswith(f"{_PRECISION} | {device} | "))
    times = next(kept, {}).get("milliseconds", {})
    rates = ", ".join(f"{name} {2e-6 * n**3 / ms:.0f}" for name, ms in times.items())
    return [("matrix products", f"{rates} GFLOP/s; --dtype chooses")]


def op_backends() -> Facts:
    """Say which backends each op has, and why not the others.

    Returns:
        Names and values.
    """
    import torch

    from gradshield_fast import ops  # noqa: F401 - fills the table of ops
    from gradshield_fast.ops import dispatch

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    out: Facts = []
    for op in dispatch.available():
        able, reasons = [], []
        for name in dispatch.KNOWN_BACKENDS:
            why = [_why_not(op, name, device) for device in devices]
            if None in why:
                able.append(name)
            else:
                reasons.append(f"{name}: {why[-1]}")
        out.append((op, "; ".join([", ".join(able), *reasons])))
    return out


def prefer_backends(choices: Sequence[str], *, clear: bool = False) -> None:
    """Keep what `auto` should take for an op, which attention or products a model runs with, and forget what was kept.

    Args:
        choices: "op=backend", "attention=name" or "linear=name" each.
        clear: forget every measurement and preference first.

    Raises:
        InputError: a choice is not of that form, or the cache folder cannot be written.
        BackendUnavailable: the op has no such backend.
    """
    from gradshield_fast import attention_race, products
    from gradshield_fast.ops import dispatch, measured

    ways = {attention_race.OP: attention_race.NAMES, products.OP: products.NAMES}
    pairs = [choice.partition("=")[::2] for choice in choices]
    for op, backend in pairs:
        if op in ways:
            if backend not in ways[op]:
                raise InputError(f"--prefer {op}=NAME takes {', '.join(ways[op])}: got {backend!r}")
        elif op in dispatch.available():
            dispatch.resolve(op, backend)
        else:
            known = ", ".join([*ways, *dispatch.available()])
            raise InputError(f"--prefer takes OP=BACKEND, OP one of {known}: got {op!r}")
    if clear:
        measured.clear()
    for op, backend in pairs:
        measured.prefer(op, backend)


def measured_backends() -> Facts:
    """Say what `auto` takes by measurement or by preference, which attention and whose products.

    Returns:
        Op, device and shapes -> the backend and the milliseconds of each; empty where nothing is kept.
    """
    from gradshield_fast.ops import measured

    out: Facts = []
    kept = {key: entry for key, entry in measured.measurements().items() if not key.startswith(f"{_PRECISION} | ")}
    for key, entry in sorted(kept.items()):
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in entry.get("milliseconds", {}).items())
        out.append((key, f"{entry['backend']} ({times or 'preferred'})"))
    return out


def _why_not(op: str, name: str, device: str) -> str | None:
    """Ask a backend about small float32 inputs, in the form that the op gives it."""
    import torch

    from gradshield_fast.ops import dispatch

    x = torch.zeros(16, 16, device=device)
    forms = {
        "embedding_dot": (x[0].long(), x, x[None]),
        "ghost_dot": (x, x, x[None]),
        "ghost_gram": (x, x, x, x),
        "ghost_norm_sq": (x, x, x, x),
        "ghost_project": (x, x, x, x),
        "linear_cross_entropy": (x, x, None, None, None),
        "scale_dot": (x, x, x),
    }
    try:
        return dispatch.why_not(op, name, *forms.get(op, (x, x)))
    except (BackendUnavailable, InputError) as error:
        return str(error).removeprefix(f"{op}: backend '{name}' is ").partition("; there is")[0]


def _native() -> str:
    from gradshield_fast.ops import native

    best = native.isa()
    if best is None:
        here = any(shutil.which(name) for name in _COMPILERS)
        first = "" if here else "install g++ or clang++, then "
        again = "pip install --force-reinstall --no-deps ., or make native, in the source folder"
        return f"missing: {native.missing}; {first}{again}"
    unused = {"portable": "AVX2", "avx2": "AVX-512", "avx512": "BF16", "avx512_bf16": "AMX"}.get(best)
    return f"built, {best} runs" + (f" (neither {unused} nor above on this machine)" if unused else "")


def _native_cuda() -> str:
    import torch

    from gradshield_fast.ops import cuda

    if cuda.module() is None:
        return "missing: the CUDA extension is not built (an install with nvcc and a C++ compiler builds it)"
    return "built" if torch.cuda.is_available() else "built; no GPU to run them"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").split())


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "not known"
    return f"{size / 2**30:.1f} GiB"
