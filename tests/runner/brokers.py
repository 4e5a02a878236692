"""Brokers that the tests run on: started by the scripts in localstack, or named by the environment."""

import os
import shlex
import subprocess
import threading

from jobs import ROOT, Job, LeftOut


class Broker:
    """One that a script in localstack starts, which has its name unless another one is given. An `optional` one may be left out where
    its programs cannot be had. The script of one that `needs` another has the variables of that one."""

    def __init__(self, name, kind, full=False, optional=False, needs=None, script=None):
        self.name, self.kind, self.full, self.optional, self.needs = name, kind, full, optional, needs
        self.script = os.path.join(ROOT, "localstack", script or name)
        self.folder = None
        # What the tests look for.
        self.env = {}
        # Held by whoever breaks it, and by whoever would take that ill.
        self.lock = threading.Lock()

    def start(self, job):
        # Before it is started, so that what came up in part is stopped, too.
        self.folder = os.path.join(job.plan.folder, "brokers", self.name)
        env = {}
        for broker in job.plan.brokers:
            if broker.name == self.needs:
                env |= broker.env
        code = job.call(self.script, "start", self.folder, env=env, allowed=(0, 3) if self.optional else (0,))
        if code == 3:
            raise LeftOut("its programs cannot be had here, see above")
        lines = subprocess.check_output([self.script, "env", self.folder], text=True)
        self.env = dict(word.split("=", 1) for word in shlex.split(lines, comments=False) if "=" in word)

    def stop(self):
        if self.folder:
            subprocess.run([self.script, "stop", self.folder], check=False, timeout=120)

    def job(self, starts):
        """`starts` are the jobs of those before it."""
        needed = [start for broker, start in starts.items() if broker.name == self.needs]
        return Job(f"start {self.name}", self.start, after=needed)


class Given:
    """One that the environment names."""

    def __init__(self, kind):
        self.name, self.kind = f"the {kind} given", kind
        prefix = f"ONLYONCE_{kind.upper()}_"
        self.env = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
        self.lock = threading.Lock()

    @staticmethod
    def start(job):
        pass

    def stop(self):
        """It belongs to somebody else."""

    def job(self, _):
        return Job(f"find {self.name}", self.start)


def choose(plan, brokers, kinds, full):
    """Those to be used, by kind."""
    chosen = {}
    for kind in kinds:
        ours = [broker for broker in brokers if broker.kind == kind and (full or not broker.full)]
        if f"ONLYONCE_{kind.upper()}_URL" in os.environ:
            plan.missing += [(broker.name, "the environment names another one") for broker in ours]
            ours = [Given(kind)]
        chosen[kind] = ours
    plan.brokers = [broker for ours in chosen.values() for broker in ours]
    return chosen
