"""With a feature off, none of that adapter's SDK is in the tree."""

import subprocess
import sys

SDKS = {"rabbitmq": "lapin", "sqlite": "rusqlite", "sqs": "aws-sdk-sqs"}


def tree(features):
    command = ["cargo", "tree", "-p", "onlyonce", "-e", "normal", "--prefix", "none", "--locked"]
    output = subprocess.check_output(
        command + ["--no-default-features", "--features", features], text=True
    )
    return {line.split()[0] for line in output.splitlines() if line}


for features in ["", *SDKS]:
    found = {sdk for sdk in SDKS.values() if sdk in tree(features)}
    wanted = {SDKS[features]} if features else set()
    print(f"features [{features}]: {sorted(found)}")
    if found != wanted:
        sys.exit(f"features [{features}] must bring {sorted(wanted)}")
