# SPDX-License-Identifier: Apache-2.0
"""Known vulnerabilities of what is installed here, as far as the package index tells them.

pip-audit succeeds where the index knows nothing; this says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = (
    sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off",
    "--timeout", "10",
)  # fmt: skip


def verdict(dependencies: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """The exit code and the lines to print for the `dependencies` of pip-audit's report."""
    audited = [entry for entry in dependencies if "skip_reason" not in entry]
    if not audited:
        return 0, ["vulnerabilities: NOT checked: the package index does not list any"]
    lines = [
        f"FAILED: {entry['name']} {entry['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no version'}"
        for entry in audited
        for flaw in entry["vulns"]
    ]
    code = 1 if lines else 0
    return code, lines or [f"vulnerabilities: none known in {len(audited)} packages"]


def main() -> int:
    """0 if nothing is known or nothing could be asked, 1 if a package has a vulnerability."""
    run = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    try:
        dependencies = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (run.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"vulnerabilities: NOT checked: {reason}")
        return 0
    code, lines = verdict(dependencies)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
