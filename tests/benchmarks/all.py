"""The tables of the ensemble and of the chain step for one device, as one page: one command on a borrowed GPU.

    python tests/benchmarks/all.py --device cuda --out FILE [--quick | --full]

Each script runs in a process of its own, plain, recorded ("auto") and compiled, float32 and float64; one that fails leaves its error
in the page.  FILE gets Markdown, FILE with the ending .json all rows.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "ensemble_inference": (
        "Ensemble against i-PI's batched MACE driver, ms of a call",
        ("model", "system", "frames", "chunk", "alternative_ms", "pruned_ms", "cueq_ms", "modules_ms", "ours_ms", "ratio", "ratio_cueq",
         "floor_ms", "gflop", "gb", "gb_least", "of_roofline", "max_dE", "max_dF"),
    ),
    "chain_update": (
        "Chain step against independent models, ms per chain",
        ("model", "system", "members", "alternative_ms", "pruned_ms", "ours_ms", "ratio", "floor_ms", "update_ms", "gflop", "gb",
         "gb_least", "of_roofline", "check"),
    ),
}  # fmt: skip


def run(script: str, arguments: Sequence[str], timeout: float) -> dict[str, Any]:
    """Rows and facts of one script, or the end of its error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{script}.py"), *arguments, "--json", str(file)]
        print(" ".join(command[1:]), flush=True)
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout:.0f} s"}
        if done.returncode != 0 or not file.exists():
            return {"error": done.stdout[-1500:]}
        print(done.stdout, flush=True)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; columns that no row has are left out."""
    rows = [dict(row) | ({"ratio_cueq": row["cueq_ms"] / row["ours_ms"]} if row.get("cueq_ms") else {}) for row in rows]
    kept = [c for c in columns if any(row.get(c) is not None for row in rows)]
    lines = ["| " + " | ".join(kept) + " |", "|" + "---|" * len(kept)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row.get(c)) for c in kept) + " |" for row in rows)])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def page(device: str, results: Sequence[tuple[str, str, dict[str, Any]]]) -> str:
    """Everything, with the date, the device and the versions of the first run that worked.  Args: results: (script, variant, found)."""
    facts = next((found for _, _, found in results if "rows" in found), None)
    parts = [f"# Measured with --device {device}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"]
    if facts is not None:
        machine, versions = facts["machine"], facts["versions"]
        parts.append(f"{machine['gpu'] or 'no GPU'}; {machine['cpu']}, {machine['cores']} cores; " + _listed(versions))
    for script, variant, found in results:
        title, columns = SCRIPTS[script]
        rows = [row for row in found.get("rows", []) if row["system"] != "checkpoint"]
        body = table(columns, rows) if rows else "```\n" + found.get("error", "no rows") + "\n```"
        parts.append(f"## {title}: {variant}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _listed(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def main() -> None:
    """All scripts in all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--compile", nargs="+", choices=["off", "auto", "on"], default=["off", "auto", "on"])
    parser.add_argument("--dtypes", nargs="+", choices=["float64", "float32"], default=["float64", "float32"])
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds of one script in one variant")
    options = parser.parse_args()
    flags = [flag for flag in ("--quick", "--full") if getattr(options, flag[2:])]
    results = []
    for dtype, compile, script in itertools.product(options.dtypes, options.compile, options.scripts):
        arguments = ["--device", options.device, "--dtype", dtype, "--compile", compile, *flags]
        results.append((script, f"{dtype}, compile = {compile}", run(script, arguments, options.timeout)))
        options.out.write_text(page(options.device, results))  # after each, so that an end of the loan loses little
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
