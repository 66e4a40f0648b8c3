"""Known vulnerabilities of what an environment holds: python .ci/audit.py PYTHON

Runs in an environment that has pip-audit, and looks at that of PYTHON. Ends with 1 where a package has a
known vulnerability, or packages do not fit together. Advisories come from the package index; where it has
none to give, as mirrors may, that is said, and nothing is claimed.
"""

import json
import subprocess
import sys
import tempfile


def main(python: str) -> int:
    """Prints what was found; the exit code."""
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    broken = subprocess.run([*pip, "check"]).returncode
    freeze = subprocess.run(
        [*pip, "list", "--format=freeze", "--exclude-editable"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    # A build's own label, such as +cpu, is unknown to the index.
    pinned = "\n".join(line.split("+")[0] for line in freeze.splitlines() if "==" in line)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pinned)
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "-r", file.name, "--no-deps", "--disable-pip"]
        result = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"],
            capture_output=True,
            text=True,
        )
    if not result.stdout.strip():
        print(f"audit: NOT DONE, pip-audit failed: {result.stderr.strip().splitlines()[-1:]}")
        return 1
    packages = json.loads(result.stdout)["dependencies"]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    bad = [p for p in packages if p.get("vulns")]
    for package in bad:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no release yet"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    print(
        f"audit: {len(packages) - len(skipped)} packages looked up, {len(bad)} with known vulnerabilities"
    )
    if skipped:
        print(
            f"audit: {len(skipped)} packages NOT looked up, the index here knows no advisories of them"
        )
    return int(bool(broken or bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
