"""What the GPU benchmark prints: Markdown tables, the goals, the machine. Needs no GPU."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import contextlib

from bench_linear import table

# The versions of these are printed.
PACKAGES = [
    "torch", "triton", "transformers", "gemlite", "torchao", "humming-kernels", "vllm", "bitsandbytes",
    "hqq",
]  # fmt: skip
SMI_FIELDS = [
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit",
    "temperature.gpu", "compute_mode",
]  # fmt: skip


@dataclass
class Section:
    """A table: rows are dicts with a "name", columns are (heading, key, format)."""

    title: str
    rows: list[dict[str, Any]]
    columns: list[tuple[str, str, str]]
    note: str = ""

    def markdown(self) -> str:
        rows = [
            {key: row.get(key) for _, key, _ in self.columns} | {"name": row["name"]}
            for row in self.rows
        ]
        text = table(self.title, rows, self.columns)
        return f"{text}\n\n{self.note}" if self.note else text


@dataclass
class Goal:
    """A figure and the least it should be."""

    what: str
    least: float
    value: float | None
    unit: str = ""

    def row(self) -> str:
        if self.value is None:
            return f"| {self.what} | >= {self.least:g}{self.unit} | not measured | |"
        met = "yes" if self.value >= self.least else "no"
        return (
            f"| {self.what} | >= {self.least:g}{self.unit} | {self.value:.3g}{self.unit} | {met} |"
        )


@dataclass
class Report:
    machine: str
    sections: list[Section] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # peer or case -> reason

    def markdown(self) -> str:
        parts = ["# Measured on a GPU", self.machine]
        if self.goals:
            lines = ["| what | goal | measured | met |", "|--|--:|--:|--|"]
            parts.append("\n".join(lines + [goal.row() for goal in self.goals]))
        parts += [section.markdown() for section in self.sections]
        for why in dict.fromkeys(self.failed.values()):
            names = ", ".join(name for name, other in self.failed.items() if other == why)
            parts.append(f"Not measured: {names}: {why}")
        return "\n\n".join(parts) + "\n"


def nvidia_smi(index: int) -> str:
    """Clocks and driver, or why they are unknown."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = [
        "nvidia-smi", f"--id={index}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(SMI_FIELDS):
        return f"nvidia-smi: exit code {done.returncode}"
    return ", ".join(f"{name} {value}" for name, value in zip(SMI_FIELDS, values))


def versions() -> str:
    found = []
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def machine_text(facts: dict[str, str]) -> str:
    """A list of facts, with the date."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(f"- {name}: {value}" for name, value in {**facts, "date": date}.items())
