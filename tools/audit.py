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
import urllib.request
from pathlib import Path

from packaging.utils import canonicalize_name

OWN = "binarize-diffusion"


def installed() -> dict[str, str]:
    """Return the version of each installed package as PyPI names it, without a local part such as +cu130."""
    found = {canonicalize_name(d.name): d.version.partition("+")[0] for d in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if name != OWN}


def unreachable(name: str, version: str) -> str | None:
    """Return why PyPI does not answer with the advisories of a package that it has, or None."""
    try:
        with urllib.request.urlopen(f"https://pypi.org/pypi/{name}/{version}/json", timeout=20) as answer:
            return None if "vulnerabilities" in json.load(answer) else "its answer has no advisories"
    except (OSError, ValueError) as error:
        return str(error)


def main() -> int:
    """Return pip-audit's exit status, or 0 if there is nothing to compare with."""
    packages = installed()
    if (reason := unreachable("pip-audit", packages["pip-audit"])) is not None:
        print(f"audit: skipped, because PyPI's advisories cannot be reached: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder, "installed.txt")
        pinned.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        options = ["--disable-pip", "--no-deps", "--progress-spinner=off"]
        command = [sys.executable, "-m", "pip_audit", *options, "-r", str(pinned)]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
