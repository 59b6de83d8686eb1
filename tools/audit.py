"""Compare the installed packages with the vulnerabilities that PyPI publishes, by pip-audit.

Where PyPI's advisories cannot be reached, as offline or behind a mirror, this prints a line and succeeds: pip-audit
itself would call every package unknown, and find nothing.

    python tools/audit.py
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name

OWN = "binarize-diffusion"


def installed() -> dict[str, str]:
    """Return the version of each installed package as PyPI names it, without a local part such as +cu130."""
    found = {canonicalize_name(d.name): d.version.partition("+")[0] for d in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if name != OWN}


def audit(packages: dict[str, str], *options: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pip-audit on packages by version, without installing them."""
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder, "installed.txt")
        pinned.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner=off", *options]
        return subprocess.run([*command, "-r", str(pinned)], check=False, capture_output=quiet, text=True)


def unreachable(version: str) -> str | None:
    """Return why PyPI does not answer with the advisories of pip-audit, which it has, or None."""
    answer = audit({"pip-audit": version}, "--format=json", quiet=True)
    try:
        return json.loads(answer.stdout)["dependencies"][0].get("skip_reason")
    except (ValueError, LookupError):
        return (answer.stderr.strip().splitlines() or ["no answer"])[-1]


def main() -> int:
    """Return pip-audit's exit status, or 0 if there is nothing to compare with."""
    packages = installed()
    if (reason := unreachable(packages["pip-audit"])) is not None:
        print(f"audit: skipped, because PyPI's advisories cannot be reached: {reason}")
        return 0
    return audit(packages).returncode


if __name__ == "__main__":
    sys.exit(main())
