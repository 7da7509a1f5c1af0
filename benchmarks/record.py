"""What every benchmark writes: where it was measured, and its figures among those of all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Where this is measured. packages: whose versions matter, those that are installed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages if installed(name)},
        "load_average": os.getloadavg(),
    }


def installed(package: str) -> bool:
    """Whether a distribution of this name is here."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def summarise(figures: Mapping[str, float], digits: int = 4) -> Path:
    """Put figures into results/summary.json, leaving those of others as they are; returns its path."""
    path = RESULTS / "summary.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {name: round(value, digits) for name, value in figures.items()}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2, allow_nan=False) + "\n")
    return path
