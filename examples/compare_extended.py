# SPDX-License-Identifier: Apache-2.0
"""The paired differences of several `python -m latte_ext extend` runs in one table: seeds, options.

python examples/compare_extended.py SEED0/report.json SEED1/report.json SEED2/report.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any


def differences(report: dict[str, Any]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(document, way to read, positions) to the mean difference and its standard error."""
    return {
        (name, way, span): (value["mean"], value["error"])
        for name, document in report["documents"].items()
        for way, spans in document["against"].items()
        for span, value in spans.items()
    }


def combine(values: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean over runs, and its standard error: the runs read the same documents, so that the errors
    within a document do not average out; the runs' own scatter does."""
    means = [mean for mean, _ in values]
    middle = sum(means) / len(means)
    within = sum(error for _, error in values) / len(values)
    if len(means) < 2:
        return middle, within
    scatter = sum((mean - middle) ** 2 for mean in means) / (len(means) - 1)
    return middle, math.hypot(within, math.sqrt(scatter / len(means)))


def table(reports: list[dict[str, Any]]) -> str:
    """Rows that all reports have, in markdown."""
    found = [differences(report) for report in reports]
    heads = [f"seed {report['recipe']['seed']}" for report in reports]
    lines = ["| document | against | positions | " + " | ".join(heads) + " | all | sigma |"]
    lines += ["|---" * (len(heads) + 5) + "|"]
    for key in found[0]:
        if not all(key in other for other in found):
            continue
        values = [other[key] for other in found]
        mean, error = combine(values)
        cells = [f"{value:+.3f} ± {spread:.3f}" for value, spread in values]
        cells += [f"{mean:+.3f} ± {error:.3f}", f"{mean / error:+.1f}"]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    print(table([json.loads(path.read_text()) for path in args.reports]), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
