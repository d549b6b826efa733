"""Versions of what computed a row."""

import json
import platform
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

VERSIONED = ("torch", "transformers", "ray", "numpy", "pyarrow", "safetensors")


@cache
def versions() -> str:
    """JSON of the versions that decide numbers."""
    found = {name: metadata.version(name) for name in VERSIONED}
    return json.dumps({"deadbench": own_version(), "python": platform.python_version(), **found})


def own_version() -> str:
    """Version of deadbench: as installed, or of the folder that runs, as a Ray job's working directory does."""
    try:
        return metadata.version("deadbench")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
