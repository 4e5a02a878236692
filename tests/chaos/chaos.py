"""What is the same in all chaos tests, whichever broker it is: a scenario and its verdict, and the run in which workers are
killed and followed by others while transfers go through the broker."""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import ledger

# A run in which nothing was published or applied for this number of seconds has come to a stop.
STUCK = 120
# What happens to workers and broker happens while there is still work for this number of seconds at full speed.
WORK_LEFT = 1
# Workers that end as soon as they start, this often and for this number of seconds in a row, have no broker's fault for an excuse.
FALSE_STARTS = 5
FALSE_STARTS_FOR = 15


class Stopped(Exception):
    """Why the run cannot go on."""


def arguments(description, transfers):
    """A parser with the arguments that all scenarios have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", required=True, help="the program")
    parser.add_argument("--transfers", type=int, default=transfers)
    parser.add_argument("--keep", help="keep the ledger and the logs in this folder")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    return parser


def run_arguments(description, transfers, kills):
    """A parser with the arguments that all runs with kills have."""
    parser = arguments(description, transfers)
    parser.add_argument("--duplicates", type=int, default=10, help="how many are sent twice, in percent")
    parser.add_argument("--poison", type=int, default=20, help="messages that nobody can process")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--stops", type=int, default=0, help="how often a worker is told to stop, and does")
    parser.add_argument("--publishers", type=int, default=4)
    return parser


class Publisher(threading.Thread):
    """Publishes until everything is confirmed; a subclass knows how."""

    ERRORS = ()

    def __init__(self, messages):
        super().__init__(daemon=True)
        # How many there are, and the share of them that may be published by now.
        self.messages = messages
        self.released = 1.0
        self.confirmed = 0
        # The ids of what was confirmed.
        self.published = set()
        self.repeated = 0
        self.error = None

    def done(self):
        return self.confirmed == self.messages

    def must_wait(self):
        return self.confirmed >= math.ceil(self.messages * self.released)

    def publish(self):
        """Some of what is left, or all of it, but nothing while it must wait; what was confirmed is told. What an error ends may
        or may not be there: it is sent again."""
        raise NotImplementedError

    def confirm(self, identity):
        self.confirmed += 1
        self.published.add(identity)

    def run(self):
        try:
            while not self.done():
                try:
                    self.publish()
                except self.ERRORS:
                    self.repeated += 1
                    time.sleep(0.2)
        except Exception as error:  # pylint: disable=broad-except
            self.error = error


class Scenario:
    """Workers of the ledger on a queue, and what became of the transfers. A subclass brings the broker's `queue`, and the
    methods that raise NotImplementedError here."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.program = os.path.abspath(options.ledger)
        self.rng = random.Random(options.seed)
        self.book = ledger.Book(folder)
        self.queue = None
        # The transfers' payloads by id.
        self.sent = {}
        self.workers = []

    def go(self):
        raise NotImplementedError

    def findings(self):
        """Findings, each of which must be zero, and what else is worth telling."""
        raise NotImplementedError

    def check_tables(self):
        return ledger.check_tables(self.book, self.program, self.sent)

    def end(self):
        """Ends all workers."""
        for worker in self.workers:
            worker.kill()

    def delete(self):
        """Removes what was made for the run outside of its folder."""
        self.queue.delete()

    def last_words(self):
        return "\n".join(f"a worker: {worker.figures}\n{worker.last_words()}" for worker in self.workers)


class Run(Scenario):
    """Workers that are killed and replaced, and what was counted. A subclass brings the broker: `queue`, `publishers`, `sent`
    and `duplicates`, and the methods that raise NotImplementedError here."""

    # How many workers there are at any time.
    WORKERS = 1
    # How many transfers they apply in a second at most: what they are slowed down to.
    SPEED = None
    # A queue that gave nothing for this number of seconds is empty: whatever a dead worker held has come back by then.
    IDLE = 4

    def __init__(self, options, folder):
        super().__init__(options, folder)
        self.publishers = []
        # How many messages are not the first of their transfer.
        self.duplicates = 0
        self.hired = 0
        self.counts = {"kills": 0, "kills_during_work": 0, "stops": 0, "exits_at_start": 0, "exits_while_working": 0}
        self.applied = {"applied": 0, "received": 0, "duplicates": 0, "fenced": 0, "cancelled": 0, "lease_lost": 0}
        self.applied["dead_lettered"] = 0
        self.shown = 0.0
        self.progress = (None, time.monotonic())
        self.false_starts = []
        # The command that breaks a server, and has it back when it ends.
        self.outage = None
        # How much of what is planned has not happened yet, and the share of the messages that may be published by now.
        self.planned = 0
        self.released = 1.0

    def worker(self, log, *more):
        """Starts a worker on the queue."""
        raise NotImplementedError

    def plan(self):
        """What is done to the broker or to the store's server, with how often."""
        raise NotImplementedError

    def break_server(self, what, command):
        """Runs a command that breaks a server for a while; workers are killed meanwhile as at any other time."""
        self.settle()
        with open(os.path.join(self.folder, "servers.log"), "a", encoding="utf-8") as output:
            self.outage = subprocess.Popen(command, shell=True, stdout=output, stderr=output)
        self.counts[what] += 1

    def settle(self):
        """Waits until what is done to a server is over."""
        if self.outage and self.outage.wait(timeout=120) != 0:
            raise AssertionError(f"the command given ended with {self.outage.returncode}, see servers.log")

    def server_is_away(self):
        """Whether workers have a reason not to start."""
        return self.outage is not None and self.outage.poll() is None

    def verdict(self):
        """Of the broker's part: findings, each of which must be zero, and what else is worth telling."""
        raise NotImplementedError

    def hire(self, *more):
        self.hired += 1
        self.workers.append(self.worker(os.path.join(self.folder, f"worker-{self.hired}.log"), *more))

    def retire(self, worker):
        """Adds up the counts of a worker that is gone now, if it was not before."""
        worker.kill()
        for name in self.applied:
            self.applied[name] += worker.count(name)
        self.workers.remove(worker)

    def replace(self, worker):
        self.retire(worker)
        self.hire()

    def supervise(self):
        """Replaces workers that ended by themselves: they cannot start while there is no broker. Ends a run that does not go
        on."""
        for publisher in self.publishers:
            if publisher.error:
                raise publisher.error
        progress = (self.book.entries(), sum(publisher.confirmed for publisher in self.publishers))
        if self.planned and self.idle():
            self.release()
        if progress != self.progress[0]:
            self.progress = (progress, time.monotonic())
        elif time.monotonic() > self.progress[1] + STUCK:
            raise Stopped(f"nothing was published or applied for {STUCK} s")
        if self.server_is_away() or all(worker.count("applied") for worker in self.workers):
            self.false_starts = []
        for worker in [worker for worker in self.workers if worker.ended()]:
            worked = worker.count("applied") > 0
            self.counts["exits_while_working" if worked else "exits_at_start"] += 1
            if worked:
                print(f"a worker ended by itself:\n{worker.last_words()}", file=sys.stderr)
            else:
                self.false_starts.append(time.monotonic())
            if len(self.false_starts) >= FALSE_STARTS and self.false_starts[-1] > self.false_starts[0] + FALSE_STARTS_FOR:
                raise Stopped("workers end as soon as they start")
            time.sleep(0.2)
            self.replace(worker)

    def idle(self):
        """Whether all that may be published is, and was applied."""
        if not all(publisher.must_wait() for publisher in self.publishers):
            return False
        published = set().union(*(publisher.published for publisher in self.publishers))
        return self.book.entries() >= 2 * len(published & self.sent.keys())

    def release(self):
        """Has the publishers go on with a part of what they hold back: the workers have done everything else, and something is
        still to happen to them while they work. At the end, with all of it."""
        self.released += (1 - self.released) / (self.planned + 1)
        for publisher in self.publishers:
            publisher.released = self.released

    def unfinished(self):
        return self.book.entries() < 2 * self.options.transfers

    def busy_worker(self):
        """One of those that have done something, a moment later."""
        def busy():
            self.supervise()
            return [worker for worker in self.workers if worker.count("applied")]

        worker = self.rng.choice(ledger.until("a worker that works", busy, seconds=math.inf))
        time.sleep(self.rng.random() * 0.03)
        return worker

    def kill(self):
        worker = self.busy_worker()
        if worker.kill():
            self.counts["kills"] += 1
            self.counts["kills_during_work"] += self.unfinished()
            self.replace(worker)

    def stop(self):
        worker = self.busy_worker()
        worker.stop()
        self.counts["stops"] += 1
        self.replace(worker)

    def wait_for(self, transfers):
        """Waits until this number of transfers are in the ledger."""
        def reached():
            self.supervise()
            entries = self.progress[0][0]
            self.show(entries // 2)
            return entries >= 2 * transfers

        # It is the supervisor who loses patience.
        ledger.until(f"{transfers} transfers", reached, seconds=math.inf)

    def show(self, applied):
        if sys.stderr.isatty() and time.monotonic() > self.shown + 0.5:
            self.shown = time.monotonic()
            print(f"\r{applied} applied, {self.counts['kills']} kills ", end="", file=sys.stderr, flush=True)

    def work_left(self):
        """The number of transfers that are left when the last of what is planned is to happen."""
        transfers = self.options.transfers
        return min(max(transfers * 0.05, self.SPEED * WORK_LEFT), transfers * 0.5)

    def events(self):
        """When to do what: the number of applied transfers, with what happens then."""
        events = []
        last = self.options.transfers - self.work_left()
        for action, count in [(self.kill, self.options.kills), (self.stop, self.options.stops), *self.plan()]:
            part = last / max(count, 1)
            events += [(int(part * (n + self.rng.random())), action) for n in range(count)]
        return sorted(events, key=lambda event: event[0])

    def go(self):
        events = self.events()
        self.planned = len(events)
        self.released = 1 - self.work_left() / 2 / self.options.transfers
        for publisher in self.publishers:
            publisher.released = self.released
            publisher.start()
        for _ in range(self.WORKERS):
            self.hire()
        for applied, action in events:
            self.wait_for(applied)
            action()
            self.planned -= 1
        self.release()
        for publisher in self.publishers:
            while publisher.is_alive():
                self.supervise()
                publisher.join(0.05)
        self.supervise()
        self.settle()
        self.end()
        for _ in range(self.WORKERS):
            self.hire("--drain-when-empty", str(self.IDLE))
        for worker in self.workers:
            worker.report(STUCK + self.IDLE)
        self.end()

    def end(self):
        for worker in list(self.workers):
            self.retire(worker)

    def out_of_order(self, lines):
        """How many transfers were applied before the one that stands before them in one of these lines."""
        places = {}
        for place, transfer in enumerate(self.book.order()):
            places.setdefault(transfer, place)
        count = 0
        for line in lines:
            applied = [places[transfer] for transfer in line if transfer in places]
            count += sum(later < earlier for earlier, later in zip(applied, applied[1:]))
        return count

    def findings(self):
        findings, audit = self.check_tables()
        findings["kills_missing"] = self.options.kills - self.counts["kills_during_work"]
        findings["exits_while_working"] = self.counts["exits_while_working"]
        findings["no_duplicate_was_seen"] = int(self.duplicates > 0 and self.applied["duplicates"] == 0)
        more, details = self.verdict()
        counted = {"published_again": sum(publisher.repeated for publisher in self.publishers), "poison": self.options.poison}
        return findings | more, {**counted, **self.counts, "at_least": self.applied, **details, "audit": audit}

    def last_words(self):
        confirmed = sum(publisher.confirmed for publisher in self.publishers)
        messages = sum(publisher.messages for publisher in self.publishers)
        done = f"{confirmed} of {messages} messages published, {self.book.entries() // 2} of {self.options.transfers} transfers applied"
        return f"\n{done}\n{self.counts}\n{self.applied}\n{super().last_words()}"


def family(process):
    """A process with all that descend from it."""
    parents = []
    for child in filter(str.isdigit, os.listdir("/proc")):
        # It may have ended meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/{child}/stat", encoding="utf-8", errors="replace") as stat:
            # After its name, which may have blanks and brackets in it: state and parent.
            parents.append((int(child), int(stat.read().rpartition(")")[2].split()[1])))
    found = [process]
    for parent in found:
        found += [child for child, its_parent in parents if its_parent == parent]
    return found


def freeze(process, seconds):
    """Stops a process, with all that descend from it, for this number of seconds."""
    processes = family(process)
    try:
        for each in processes:
            os.kill(each, signal.SIGSTOP)
        time.sleep(seconds)
    finally:
        for each in processes:
            os.kill(each, signal.SIGCONT)


def working_folder(keep):
    if keep is None:
        return tempfile.TemporaryDirectory(prefix="chaos-")
    os.makedirs(keep)
    return contextlib.nullcontext(keep)


def main(options, scenario):
    """Carries out a scenario of this class, prints what came of it, and exits with 1 if that is not fine."""
    print(f"seed {options.seed}", file=sys.stderr)
    began = time.monotonic()
    with working_folder(options.keep) as folder:
        run = scenario(options, folder)
        try:
            run.go()
            findings, details = run.findings()
            run.delete()
        except (Stopped, TimeoutError) as stopped:
            print(run.last_words(), file=sys.stderr)
            findings, details = {"stopped": 1}, {"because": str(stopped)}
        except Exception:
            print(run.last_words(), file=sys.stderr)
            raise
        finally:
            run.end()
        summary = {
            "fine": not any(findings.values()),
            "seed": options.seed,
            "transfers": options.transfers,
            "findings": findings,
            **details,
            "seconds": round(time.monotonic() - began, 1),
        }
        print(json.dumps(summary, indent=2))
        for name, count in findings.items():
            if count:
                print(f"error: {name}: {count}")
    sys.exit(0 if summary["fine"] else 1)
