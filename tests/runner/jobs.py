"""Pieces of work that run side by side, each with a log of its own."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


# What a failed job's log says of the failure is shown again at the end: at most this number of the lines that tell what failed,
# and this number of last lines. It is little, since some CI shows only the end of a log.
TELLING = 10
LAST = 6
# A test that failed with where and why, an error of the compiler's or of a check's, a traceback's end.
TELLS = re.compile(r"^test .* FAILED$|panicked at|^error|^\w*(Error|Exception)\b")
# How much of a line is shown.
WIDTH = 400


class Failed(Exception):
    """A command that did not do what it should."""


class LeftOut(Exception):
    """What cannot be done here, and need not be."""


class Job(threading.Thread):
    """Calls `work(job, *arguments)` once the jobs in `after` are done, alone with what it `uses`."""

    def __init__(self, name, work, *arguments, after=(), uses=(), nice=0):
        super().__init__(name=name, daemon=True)
        self.work, self.arguments, self.after, self.uses, self.nice = work, arguments, after, uses, nice
        self.plan = self.log = self.process = self.error = None
        self.seconds = 0.0
        self.is_left_out = False

    def run(self):
        """Nobody else calls this: it is the thread's."""
        try:
            self.wait_and_work()
        except LeftOut as left_out:
            self.is_left_out = True
            self.left_out(str(left_out))
        except Exception as error:  # pylint: disable=broad-except
            self.error = error

    def wait_and_work(self):
        for job in self.after:
            job.join()
            if job.error:
                raise Failed(f"{job.name} failed")
            if job.is_left_out:
                raise LeftOut(f"without {job.name}")
        for name in sorted(self.uses):
            self.plan.locks[name].acquire()
        began = time.monotonic()
        try:
            self.work(self, *self.arguments)
        finally:
            self.seconds = time.monotonic() - began
            for name in self.uses:
                self.plan.locks[name].release()

    def left_out(self, why):
        print(f"LEFT OUT: {why}", file=self.log, flush=True)

    def call(self, *command, cwd=ROOT, env=None, output=None, allowed=(0,)):
        """Runs a command, its output going to the log or to the file `output`, and returns its code."""
        if self.plan.stopping:
            raise Failed("the run was stopped")
        print("$", shlex.join(command), file=self.log, flush=True)
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output or self.log,
            stderr=self.log,
            start_new_session=True,
            preexec_fn=(lambda: os.nice(self.nice)) if self.nice else None,
        )
        code = self.process.wait()
        if code not in allowed:
            raise Failed(f"exit code {code} of {shlex.join(command)}")
        return code

    def chaos(self, script, *arguments):
        self.call(self.plan.python(), os.path.join("tests", "chaos", script), *arguments)

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def found(self, pattern):
        """What its log has of lines like this."""
        self.log.seek(0)
        return re.findall(pattern, self.log.read(), re.M)

    def end(self):
        """What its log says of the failure, as far as it can be told, and its last lines."""
        self.log.seek(0)
        lines = self.log.readlines()
        last = max(len(lines) - LAST, 0)
        # What was panicked with stands in the line after.
        tells = [place for place, line in enumerate(lines[:last]) if TELLS.search(line) or "panicked at" in lines[place - 1]]
        return "".join(f"{lines[place].rstrip()[:WIDTH]}\n" for place in tells[-TELLING:] + list(range(last, len(lines))))

    def tests(self):
        """How many tests passed, as far as its log tells."""
        return sum(int(count) for count in self.found(r"^test result: ok\. (\d+) passed"))


class Plan:
    """All jobs, what they share, and what came of them."""

    def __init__(self, sizes, folder):
        self.sizes, self.folder = sizes, folder
        # Tests on a broker must be in time: more of them at once than the machine has processors would not be.
        broker = threading.Semaphore(max(2, os.cpu_count() or 1))
        self.locks = {"cargo": threading.Lock(), "python": threading.Lock(), "broker": broker}
        self.stopping = False
        self.binaries = None
        self.jobs = []
        self.brokers = []
        self.missing = []

    def python(self):
        """A Python with the brokers' clients."""
        with self.locks["python"]:
            return subprocess.check_output([os.path.join(ROOT, "tests", "python")], text=True).strip()

    def carry_out(self, jobs):
        """Whether all went well. Shows each job's log when the job is over. One that fails stops no other, so that a run tells all."""
        self.jobs = list(jobs)
        for job in self.jobs:
            job.plan = self
            job.log = open(os.path.join(self.folder, f"{job.name}.log"), "w+", encoding="utf-8", errors="replace")
        for job in self.jobs:
            job.start()
        waiting = list(self.jobs)
        while waiting:
            over = [job for job in waiting if not job.is_alive()]
            for job in over:
                waiting.remove(job)
                self.show(job)
            time.sleep(0 if over else 0.1)
        return not any(job.error for job in self.jobs)

    @staticmethod
    def show(job):
        job.log.seek(0)
        print(f"\n== {job.name}, {job.seconds:.0f} s")
        for line in job.log:
            print(line, end="")
        if job.error:
            print(f"FAILED: {job.name}: {job.error}")
        sys.stdout.flush()

    def summary(self, seconds):
        print(f"\n| part | seconds | tests |\n|---|---|---|")
        for job in self.jobs:
            print(f"| {job.name} | {job.seconds:.0f} | {job.tests() or ''} |")
        print(f"| all | {seconds:.0f} | {sum(job.tests() for job in self.jobs)} |")
        for what, why in self.missing + [(job.name, why) for job in self.jobs for why in job.found("^LEFT OUT: (.*)")]:
            print(f"LEFT OUT: {what}: {why}")


def carry_out(sizes, jobs):
    """Carries the jobs out in a folder that is gone afterwards; the process's exit code."""
    began = time.monotonic()
    # A run that is stopped from outside stops what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="onlyonce-") as folder:
        plan = Plan(sizes, folder)
        try:
            fine = plan.carry_out(jobs(plan))
        finally:
            plan.stopping = True
            for job in plan.jobs:
                job.stop()
            for broker in plan.brokers:
                broker.stop()
        plan.summary(time.monotonic() - began)
    failed = [job for job in plan.jobs if job.error]
    for job in failed:
        print(f"\n== {job.name}, what its log says\n{job.end()}FAILED: {job.name}: {job.error}")
    print("all passed" if fine else "FAILED: " + ", ".join(job.name for job in failed))
    return 0 if fine else 1
