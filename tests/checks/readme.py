"""Runs every command of the README's `sh` blocks, but the one that runs this."""

import re
import subprocess
import sys
import time

text = open("README.md", encoding="utf-8").read()
commands = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
if "./tests/run" not in commands:
    sys.exit("the README no longer names ./tests/run")
for command in commands:
    if command.startswith("./tests/run"):
        continue
    began = time.monotonic()
    print("$", command, flush=True)
    subprocess.run(command, shell=True, check=True)
    print(f"took {time.monotonic() - began:.0f} s", flush=True)
