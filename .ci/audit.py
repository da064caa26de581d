"""Are the pinned dependencies known to be vulnerable? Asks PyPI's advisories through pip-audit.

Fails for an advisory that `audit.json` does not list as looked at. Where the service cannot be
reached it fails for nothing, and says from when the last known state is. `--record` writes what was
found, with the day, to `audit.json`: that nothing could be asked, too, so that the file never tells
of other versions than those in `constraints.txt`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints.txt"
KNOWN = Path(__file__).with_name("audit.json")
TIME_S = 120


def ask() -> tuple[dict[str, Any] | None, str]:
    """pip-audit's report, or None and why there is none."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(PINS), "--no-deps", "--disable-pip"]
    try:
        found = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off", "--timeout", "5"],
            capture_output=True,
            text=True,
            timeout=TIME_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {TIME_S} s"
    try:
        report: dict[str, Any] = json.loads(found.stdout)
    except ValueError:
        return None, (found.stderr.strip().splitlines() or ["no report"])[-1][:200]
    asked = report.get("dependencies", [])
    if not any("vulns" in one for one in asked):
        return None, "the service knows none of the packages"
    return report, ""


def record(digest: str, state: str, looked_at: dict[str, str]) -> dict[str, Any]:
    """Write, and return, what is known from today on of the versions with this digest."""
    known = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "constraints_sha256": digest,
        "state": state,
        "looked_at": looked_at,
    }
    KNOWN.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return known


def main() -> int:
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()
    report, why = ask()
    if report is None:
        print(f"dependency audit: NOT REACHED ({why})")
        print(f"  last known state, of {known['date']}: {known['state']}")
        if known["constraints_sha256"] != digest:
            print("  constraints.txt has changed since")
            if "--record" in sys.argv[1:]:
                record(digest, f"not audited: {why}", known["looked_at"])
        return 0
    asked = report["dependencies"]
    skipped = [one["name"] for one in asked if "vulns" not in one]
    advisories = {
        advisory["id"]: f"{one['name']} {one['version']}, fixed in "
        f"{', '.join(advisory.get('fix_versions', [])) or 'no version yet'}"
        for one in asked
        for advisory in one.get("vulns", [])
    }
    state = f"{len(asked) - len(skipped)} packages audited, {len(advisories)} advisories"
    print(f"dependency audit: {state}")
    if skipped:
        print(f"  not known to the service: {', '.join(sorted(skipped))}")
    if "--record" in sys.argv[1:]:
        before = known["looked_at"]
        looked_at = {one: before.get(one, text) for one, text in advisories.items()}
        known = record(digest, state, looked_at)
    fresh = sorted(set(advisories) - set(known["looked_at"]))
    for one in fresh:
        print(f"  {one}: {advisories[one]}")
    return 1 if fresh else 0


if __name__ == "__main__":
    sys.exit(main())
