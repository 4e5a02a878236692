#!/usr/bin/env python3
"""Kills workers, cuts connections and restarts the broker while transfers go through RabbitMQ, and audits what became of
them: each transfer once in the ledger, none missing, nothing left in the queue. Exit code 1 if not.

Needs pika. The commands that cut and restart are given, so that any broker will do:

    rabbitmq.py --url amqp://guest:guest@localhost/%2f --ledger target/release/ledger \\
        --cut-cmd "localstack/rabbitmq ctl DIR close_all_connections cut" \\
        --restart-cmd "localstack/rabbitmq restart DIR"
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time

import pika

import ledger

CLIENT_ERRORS = (pika.exceptions.AMQPError, OSError)
# What the worker is slowed down to, so that there is always work left to be killed in.
CONCURRENCY = 32
DELAY = 0.01


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="AMQP URL without a query")
    parser.add_argument("--ledger", required=True, help="the program")
    parser.add_argument("--transfers", type=int, default=50_000)
    parser.add_argument("--duplicates", type=int, default=10, help="how many are sent twice, in percent")
    parser.add_argument("--poison", type=int, default=20, help="messages that nobody can process")
    parser.add_argument("--groups", type=int, default=50, help="half of the transfers belong to one of so many; 0: none")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=6)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--cut-cmd", default="", help="closes all connections; none without it")
    parser.add_argument("--restart-cmd", default="", help="restarts the broker; none without it")
    parser.add_argument("--publishers", type=int, default=4)
    parser.add_argument("--prefetch", type=int, default=200)
    parser.add_argument("--queue-type", choices=["quorum", "classic"], default="quorum")
    parser.add_argument("--keep", help="keep the ledger and the logs in this folder")
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    options.cuts *= bool(options.cut_cmd)
    options.restarts *= bool(options.restart_cmd)
    if options.seed is None:
        options.seed = random.randrange(1_000_000)
    return options


def traffic(options, rng):
    """All messages, each publisher's in its order; duplicates come later than their first."""
    lines = [[] for _ in range(options.publishers)]
    duplicates = 0
    for number in range(options.transfers):
        grouped = options.groups and number % 2 == 0
        message = ledger.transfer(number, rng, f"group-{number % options.groups}" if grouped else None)
        lines[number % options.publishers].append((number, message))
        if rng.randrange(100) < options.duplicates:
            duplicates += 1
            lines[rng.randrange(options.publishers)].append((number + rng.randrange(2_000), message))
    for number in range(options.poison):
        body, properties = poison(number)
        line = rng.choice(lines)
        line.append((rng.randrange(options.transfers), (f"poison-{number}", body, properties)))
    for line in lines:
        line.sort(key=lambda entry: entry[0])
    return [[message for _, message in line] for line in lines], duplicates


def poison(number):
    identity = f"poison-{number}"
    kinds = [
        (b"\xff\xfe" + identity.encode(), identity),
        (b'{"transfer_id": ' + str(number).encode(), identity),
        # Fine but for its missing id, without which a redelivery would be another transfer.
        (b'{"transfer_id":"poison-%d","from":"a","to":"b","amount":1}' % number, None),
    ]
    body, message_id = kinds[number % len(kinds)]
    return body, pika.BasicProperties(message_id=message_id, delivery_mode=2)


class Publisher(threading.Thread):
    """Publishes with confirms, again and again until each is confirmed."""

    def __init__(self, queue, messages):
        super().__init__(daemon=True)
        self.queue, self.messages = queue, messages
        self.confirmed = self.repeated = 0
        self.error = None

    def run(self):
        try:
            while self.confirmed < len(self.messages):
                try:
                    self._publish()
                except CLIENT_ERRORS:
                    # The one that was under way may or may not be there: one more duplicate.
                    self.repeated += 1
                    time.sleep(0.2)
        except Exception as error:  # pylint: disable=broad-except
            self.error = error

    def _publish(self):
        with self.queue.connect() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            while self.confirmed < len(self.messages):
                _, body, properties = self.messages[self.confirmed]
                channel.basic_publish("", self.queue.name, body, properties, mandatory=True)
                self.confirmed += 1


class Run:
    """One run: what is going on, and what was counted."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.rng = random.Random(options.seed)
        self.book = ledger.Book(folder)
        name = f"chaos-{os.getpid()}-{options.seed}"
        self.queue = ledger.Queue(options.url, name, options.queue_type)
        lines, self.duplicates = traffic(options, self.rng)
        self.publishers = [Publisher(self.queue, line) for line in lines]
        self.worker = None
        self.workers = 0
        self.outage = None
        self.counts = {"kills": 0, "kills_during_work": 0, "cuts": 0, "restarts": 0}
        self.counts |= {"exits_at_start": 0, "exits_while_working": 0}
        self.applied = {"applied": 0, "received": 0, "duplicates": 0, "fenced": 0, "cancelled": 0, "dead_lettered": 0}
        self.started_at = 0
        self.shown = 0.0

    def start_worker(self, *more):
        self.workers += 1
        self.started_at = self.book.entries()
        group = {"group_header": ledger.GROUP_HEADER} if self.options.groups else {}
        self.worker = ledger.Worker(
            os.path.abspath(self.options.ledger),
            self.queue.of(self.queue.name, prefetch=self.options.prefetch, heartbeat="5s", **group),
            self.book,
            self.queue.of(self.queue.dead),
            os.path.join(self.folder, f"worker-{self.workers}.log"),
            *("--prefetch", str(self.options.prefetch), "--concurrency", str(CONCURRENCY)),
            *("--delay-before", str(DELAY)),
            *more,
        )

    def gone(self):
        """Adds up the counts of a worker that is gone."""
        for name in self.applied:
            self.applied[name] += self.worker.count(name)

    def supervise(self):
        """Starts the next worker where one ended by itself: it cannot start while there is no broker."""
        if not self.worker.ended():
            return
        worked = self.book.entries() > self.started_at
        self.counts["exits_while_working" if worked else "exits_at_start"] += 1
        if worked:
            print(f"a worker ended by itself:\n{self.worker.last_words()}", file=sys.stderr)
        self.gone()
        time.sleep(0.2)
        self.start_worker()

    def wait_for(self, transfers, worked=False):
        """Waits until so many transfers are in the ledger, and this worker added to them if that is asked for."""
        def reached():
            self.supervise()
            entries = self.book.entries()
            self.show(entries // 2)
            return entries >= 2 * transfers and (not worked or entries > self.started_at)
        ledger.until(f"{transfers} transfers", reached, seconds=180)

    def show(self, applied):
        if sys.stderr.isatty() and time.monotonic() > self.shown + 0.5:
            self.shown = time.monotonic()
            print(f"\r{applied} applied, {self.counts['kills']} kills ", end="", file=sys.stderr, flush=True)

    def kill(self):
        time.sleep(self.rng.random() * 0.03)
        self.worker.kill()
        self.counts["kills"] += 1
        applied = self.book.entries()
        self.counts["kills_during_work"] += self.started_at < applied < 2 * self.options.transfers
        self.gone()
        self.start_worker()

    def break_broker(self, what, command):
        """Cuts or restarts; the workers are killed meanwhile as at any other time."""
        if self.outage:
            self.outage_over()
        output = open(os.path.join(self.folder, "broker.log"), "a", encoding="utf-8")
        self.outage = subprocess.Popen(command, shell=True, stdout=output, stderr=output)
        output.close()
        self.counts[what] += 1

    def outage_over(self):
        if self.outage.wait(timeout=120) != 0:
            raise AssertionError(f"the command given ended with {self.outage.returncode}, see broker.log")

    def events(self):
        """When to do what: the number of applied transfers, with what happens then."""
        options = self.options
        plan = [(self.kill, options.kills)]
        plan.append((lambda: self.break_broker("cuts", options.cut_cmd), options.cuts))
        plan.append((lambda: self.break_broker("restarts", options.restart_cmd), options.restarts))
        events = []
        for action, count in plan:
            part = options.transfers * 0.95 / max(count, 1)
            events += [(int(part * (n + self.rng.random())), n, action) for n in range(count)]
        return sorted(events, key=lambda event: event[:2])

    def go(self):
        for publisher in self.publishers:
            publisher.start()
        self.start_worker()
        for applied, _, action in self.events():
            self.wait_for(applied, worked=action == self.kill)
            action()
        if self.outage:
            self.outage_over()
        for publisher in self.publishers:
            while publisher.is_alive():
                self.supervise()
                publisher.join(0.05)
            if publisher.error:
                raise publisher.error
        self.worker.kill()
        self.gone()
        self.start_worker("--drain-when-empty", "4")
        self.worker.report()
        self.gone()

    def findings(self):
        findings, audit = ledger.check_tables(self.book, os.path.abspath(self.options.ledger), self.options.transfers)
        dead = self.queue.drained(self.queue.dead)
        expected = {poison(number)[0] for number in range(self.options.poison)}
        findings["left_in_queue"] = self.queue.depth(self.queue.name)
        findings["poison_not_set_aside"] = len(expected - set(dead))
        findings["wrongly_set_aside"] = len(set(dead) - expected)
        findings["kills_missing"] = self.options.kills - self.counts["kills_during_work"]
        findings["exits_while_working"] = self.counts["exits_while_working"]
        return findings, audit, len(dead)


def working_folder(keep):
    if keep is None:
        return tempfile.TemporaryDirectory(prefix="chaos-")
    os.makedirs(keep)
    return contextlib.nullcontext(keep)


def main():
    options = arguments()
    print(f"seed {options.seed}", file=sys.stderr)
    began = time.monotonic()
    with working_folder(options.keep) as folder:
        run = Run(options, folder)
        try:
            run.go()
            findings, audit, dead = run.findings()
            run.queue.delete()
        except Exception:
            print(f"\n{run.counts}\n{run.applied}", file=sys.stderr)
            if run.worker:
                print(f"the last worker: {run.worker.figures}\n{run.worker.last_words()}", file=sys.stderr)
            raise
        finally:
            if run.worker and not run.worker.ended():
                run.worker.kill()
        fine = not any(findings.values())
        summary = {
            "fine": fine,
            "seed": options.seed,
            "queue_type": options.queue_type,
            "transfers": options.transfers,
            "sent_twice": run.duplicates,
            "published_again": sum(publisher.repeated for publisher in run.publishers),
            "poison": options.poison,
            "dead_letters": dead,
            **run.counts,
            "at_least": run.applied,
            "findings": findings,
            "audit": audit,
            "seconds": round(time.monotonic() - began, 1),
        }
        print(json.dumps(summary, indent=2))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
