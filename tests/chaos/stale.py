#!/usr/bin/env python3
"""Stops a worker in the middle of its handlers, lets another take its messages over from RabbitMQ and finish, and lets the
first go on: nothing stale may land, in transactional and in idempotent mode. Exit code 1 if it does.

    stale.py --url amqp://guest:guest@localhost/%2f --ledger target/release/ledger
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile

import ledger
import rabbit

# The broker takes a silent worker for dead after about two of these.
HEARTBEAT = "1s"


class Stale:
    """One mode's run."""

    def __init__(self, options, mode, folder):
        self.options, self.mode, self.folder = options, mode, folder
        self.book = ledger.Book(folder)
        self.queue = rabbit.Queue(options.url, f"stale-{mode}-{os.getpid()}-{options.seed}", options.queue_type)
        self.workers = []
        self.sent = {}

    def publish(self):
        rng = random.Random(self.options.seed)
        with self.queue.connect() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for number in range(self.options.transfers):
                identity, body, properties = rabbit.transfer(number, rng)
                self.sent[identity] = body
                channel.basic_publish("", self.queue.name, body, properties, mandatory=True)

    def worker(self, *more):
        worker = ledger.Worker(
            os.path.abspath(self.options.ledger),
            self.queue.of(self.queue.name, heartbeat=HEARTBEAT, prefetch=64),
            self.book,
            self.queue.of(self.queue.dead),
            os.path.join(self.folder, f"worker-{len(self.workers)}.log"),
            *("--mode", self.mode, "--drain-when-empty", "6", *more),
        )
        self.workers.append(worker)
        return worker

    def stop(self, worker):
        """Stops it in the middle of its work, at a moment when it does not hold the ledger's lock: else nobody could
        take over before it goes on."""
        ledger.until("work", lambda: worker.count("applied") >= 20)

        def stopped():
            worker.signal(signal.SIGSTOP)
            if self.book.can_be_written():
                return True
            worker.signal(signal.SIGCONT)
            return False

        ledger.until("a moment to stop it", stopped)

    def go(self):
        self.publish()
        delay = "--delay-before" if self.mode == "transactional" else "--delay-after"
        stale = self.worker("--concurrency", "16", delay, "0.3")
        self.stop(stale)
        successor = self.worker().report()
        findings, _ = self.check()
        stale.signal(signal.SIGCONT)
        stale = stale.report()
        after, audit = self.check()
        findings = {name: max(count, abs(after[name])) for name, count in findings.items()}
        # What comes again is a duplicate: each has its record.
        self.publish()
        again = self.worker().report()
        applied = stale["applied"] + successor["applied"]
        findings["completions_missing_or_doubled"] = abs(applied - self.options.transfers)
        findings["without_record"] = self.options.transfers - again["duplicates"]
        findings["was_not_stale"] = int(stale["cancelled"] + stale["fenced"] + stale["lease_lost"] == 0)
        findings["left_in_queue"] = self.queue.depth(self.queue.name)
        repeated = None
        if self.mode == "idempotent":
            repeated = self.book.repeated_calls()
            findings["no_call_was_repeated"] = int(repeated == 0)
        self.queue.delete()
        return {"findings": findings, "stale": stale, "successor": successor, "repeated_calls": repeated, "audit": audit}

    def check(self):
        return ledger.check_tables(self.book, os.path.abspath(self.options.ledger), self.sent)

    def end(self):
        for worker in self.workers:
            if not worker.ended():
                worker.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="AMQP URL without a query")
    parser.add_argument("--ledger", required=True, help="the program")
    parser.add_argument("--transfers", type=int, default=300)
    parser.add_argument("--queue-type", choices=["quorum", "classic"], default="quorum")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    summary = {}
    for mode in ("transactional", "idempotent"):
        with tempfile.TemporaryDirectory(prefix="stale-") as folder:
            run = Stale(options, mode, folder)
            try:
                summary[mode] = run.go()
            finally:
                run.end()
    fine = not any(any(run["findings"].values()) for run in summary.values())
    print(json.dumps({"fine": fine, **summary}, indent=2))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
