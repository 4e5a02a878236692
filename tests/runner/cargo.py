"""What cargo builds, once: one profile and one set of features for everything that runs."""

import json
import os
import shutil

# All crates at a time, since cargo unites the features of what it is asked for: another choice of crates would have
# other features, and most dependencies would be built once more.
EVERYTHING = ["--workspace", "--all-features", "--locked"]


class Binary:
    def __init__(self, package, artifact):
        self.package, self.path = package, artifact["executable"]
        self.target, self.is_test = artifact["target"]["name"], artifact["profile"]["test"]
        # Where cargo would run it.
        self.folder = os.path.dirname(artifact["manifest_path"])


class Binaries:
    def __init__(self, messages):
        artifacts = [json.loads(line) for line in messages if line.startswith("{")]
        built = [artifact for artifact in artifacts if artifact.get("executable")]
        self.all = [Binary(package_name(artifact["package_id"]), artifact) for artifact in built]

    def tests(self):
        return [binary for binary in self.all if binary.is_test]

    def test(self, package, target):
        return next(binary for binary in self.tests() if (binary.package, binary.target) == (package, target))

    def program(self, name):
        return next(binary.path for binary in self.all if binary.target == name and not binary.is_test)


def package_name(package_id):
    """Of `path+file:///…/crates/core#onlyonce-core@0.1.0`, or `…/crates/proof#0.1.0` if folder and package have one name."""
    path, _, fragment = package_id.partition("#")
    return fragment.partition("@")[0] if "@" in fragment else path.rpartition("/")[2]


def build(job):
    """Builds all libraries, programs and tests."""
    with open(os.path.join(job.plan.folder, "messages"), "w+", encoding="utf-8") as messages:
        kinds = ["--lib", "--bins", "--tests", "--message-format", "json-render-diagnostics"]
        job.call("cargo", "build", *EVERYTHING, *kinds, output=messages)
        messages.seek(0)
        job.plan.binaries = Binaries(messages)
    # The README's commands build the same programs with other features, in the same place.
    folder = os.path.join(job.plan.folder, "programs")
    os.makedirs(folder)
    for binary in job.plan.binaries.all:
        if not binary.is_test:
            binary.path = shutil.copy(binary.path, folder)
