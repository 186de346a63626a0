"""What every benchmark writes: one JSON line a run, with the device, the versions and the commit it ran on."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def device_name() -> str:
    """Name the device: the GPU where there is one, else the processor and the threads that torch uses.

    Returns:
        One line.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return f"{model}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def surroundings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Say what a figure depends on besides the code that printed it.

    Args:
        options: the benchmark's options; paths are kept by their last part alone.

    Returns:
        JSON values.
    """
    import torch
    import transformers

    import gradshield_fast

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    ).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "commit": commit or None,
        "versions": {
            "gradshield_fast": gradshield_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": f"python benchmarks/{Path(sys.argv[0]).resolve().relative_to(RESULTS.parent)}",
        "options": {
            name: Path(str(x)).name if isinstance(x, Path) or "/" in str(x) else x for name, x in options.items()
        },
    }


def append(name: str, line: Mapping[str, Any]) -> Path:
    """Add a run to a results file.

    Args:
        name: the file's name, without its ending.
        line: JSON values.

    Returns:
        The file.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path
