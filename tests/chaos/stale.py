#!/usr/bin/env python3
"""Stops a worker in the middle of its handlers, lets another take its messages over from RabbitMQ and finish, and lets the
first go on: nothing stale may land, in transactional and in idempotent mode. Exit code 1 if it does.

    stale.py --url amqp://guest:guest@localhost/%2f --ledger target/debug/ledger --mode idempotent
"""

import os
import random
import signal

import chaos
import ledger
import rabbit

# The broker takes a silent worker for dead after about two of these.
HEARTBEAT = "1s"


def arguments():
    parser = chaos.arguments(__doc__, transfers=300)
    parser.add_argument("--url", required=True, help="AMQP URL without a query")
    parser.add_argument("--queue-type", choices=["quorum", "classic"], default="quorum")
    parser.add_argument("--mode", choices=["transactional", "idempotent"], default="transactional")
    return parser.parse_args()


class Stale(chaos.Scenario):
    def __init__(self, options, folder):
        super().__init__(options, folder)
        self.queue = rabbit.Queue(options.url, f"stale-{os.getpid()}-{options.seed}", options.queue_type)
        self.found = {}
        self.details = {}

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
            self.program,
            self.queue.of(self.queue.name, heartbeat=HEARTBEAT, prefetch=64),
            self.book,
            self.queue.of(self.queue.dead),
            os.path.join(self.folder, f"worker-{len(self.workers)}.log"),
            *("--mode", self.options.mode, "--drain-when-empty", "6", *more),
        )
        self.workers.append(worker)
        return worker

    def stop(self, worker):
        """Stops it in the middle of its work, at a moment when it does not hold the ledger's lock: else nobody could
        take over before it goes on."""
        ledger.until("work", lambda: worker.count("applied") >= 20)

        def stopped():
            worker.freeze()
            if self.book.can_be_written():
                return True
            worker.signal(signal.SIGCONT)
            return False

        ledger.until("a moment to stop it", stopped)

    def go(self):
        self.publish()
        delay = "--delay-before" if self.options.mode == "transactional" else "--delay-after"
        stale = self.worker("--concurrency", "16", delay, "0.3")
        self.stop(stale)
        successor = self.worker().report()
        before, _ = self.check_tables()
        stale.signal(signal.SIGCONT)
        stale = stale.report()
        after, audit = self.check_tables()
        self.found = {name: max(count, abs(after[name])) for name, count in before.items()}
        # What comes again is a duplicate: each has its record.
        self.publish()
        again = self.worker().report()
        applied = stale["applied"] + successor["applied"]
        self.found["completions_missing_or_doubled"] = abs(applied - self.options.transfers)
        self.found["without_record"] = self.options.transfers - again["duplicates"]
        self.found["was_not_stale"] = int(stale["cancelled"] + stale["fenced"] + stale["lease_lost"] == 0)
        self.details = {"stale": stale, "successor": successor, "audit": audit}

    def findings(self):
        self.found["left_in_queue"] = self.queue.depth(self.queue.name)
        repeated = None
        if self.options.mode == "idempotent":
            repeated = self.book.repeated_calls()
            self.found["no_call_was_repeated"] = int(repeated == 0)
        return self.found, {"mode": self.options.mode, **self.details, "repeated_calls": repeated}


if __name__ == "__main__":
    chaos.main(arguments(), Stale)
