#!/usr/bin/env python3
"""Kills workers, cuts connections and restarts the broker while transfers go through RabbitMQ, and audits what became of
them: each transfer once in the ledger, none missing, nothing left in the queue. Exit code 1 if not.

Needs pika. The commands that cut and restart are given, so that any broker will do:

    rabbitmq.py --url amqp://guest:guest@localhost/%2f --ledger target/debug/ledger \\
        --cut-cmd "localstack/rabbitmq-4.0 ctl DIR close_all_connections cut" \\
        --restart-cmd "localstack/rabbitmq-4.0 restart DIR"
"""

import os

import chaos
import ledger
import rabbit

# What the worker is slowed down to, so that there is always work left to be killed in.
CONCURRENCY = 16
DELAY = 0.01


def arguments():
    parser = chaos.run_arguments(__doc__, transfers=50_000, kills=50)
    parser.add_argument("--url", required=True, help="AMQP URL without a query")
    parser.add_argument("--groups", type=int, default=50, help="half of the transfers belong to one of this number of groups; 0: none")
    parser.add_argument("--single", action="store_true", help="a single active consumer; without groups the queue is one")
    parser.add_argument("--limit", type=int, help="the queue's delivery limit; the broker's default if not given")
    parser.add_argument("--dead-letters", action="store_true", help="the queue has a dead-letter exchange")
    parser.add_argument("--cuts", type=int, default=6)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--cut-cmd", default="", help="closes all connections; needed unless --cuts is 0")
    parser.add_argument("--restart-cmd", default="", help="restarts the broker; needed unless --restarts is 0")
    parser.add_argument("--prefetch", type=int, default=200)
    parser.add_argument("--queue-type", choices=["quorum", "classic"], default="quorum")
    options = parser.parse_args()
    for name, count, command in [("cut", options.cuts, options.cut_cmd), ("restart", options.restarts, options.restart_cmd)]:
        if count and not command:
            parser.error(f"--{name}s {count} needs --{name}-cmd; --{name}s 0 leaves them out")
    return options


class Run(chaos.Run):
    SPEED = CONCURRENCY / DELAY

    def __init__(self, options, folder):
        super().__init__(options, folder)
        settings = (options.queue_type, options.limit, options.single, options.dead_letters)
        self.queue = rabbit.Queue(options.url, f"chaos-{os.getpid()}-{options.seed}", *settings)
        lines, self.sent, self.duplicates = rabbit.traffic(options, self.rng, options.single)
        self.publishers = [rabbit.Publisher(self.queue, line) for line in lines]
        self.counts |= {"cuts": 0, "restarts": 0}

    def worker(self, log, *more):
        order = {"group_header": rabbit.GROUP_HEADER} if self.options.groups else {}
        if self.options.single:
            order["single_active_consumer"] = "true"
        return ledger.Worker(
            self.program,
            self.queue.of(self.queue.name, prefetch=self.options.prefetch, heartbeat="5s", **order),
            self.book,
            self.queue.of(self.queue.dead),
            log,
            *("--prefetch", str(self.options.prefetch), "--concurrency", str(CONCURRENCY)),
            *("--delay-before", str(DELAY)),
            *more,
        )

    def plan(self):
        options = self.options
        return [
            (lambda: self.break_server("cuts", options.cut_cmd), options.cuts),
            (lambda: self.break_server("restarts", options.restart_cmd), options.restarts),
        ]

    def lines_in_order(self):
        """Transfers that one publisher sent one after another, of one group: none but with a single active consumer."""
        options = self.options
        lines = {}
        for number in range(options.transfers if options.single else 0):
            grouped = not options.groups or number % 2 == 0
            key = (number % options.publishers, number % (options.groups or 1))
            if grouped:
                lines.setdefault(key, []).append(f"transfer-{number}")
        return lines.values()

    def verdict(self):
        findings, dead_letters = rabbit.settled([self.queue], self.options.poison)
        findings["out_of_order"] = self.out_of_order(self.lines_in_order())
        return findings, {
            "queue_type": self.options.queue_type,
            "duplicates_sent": self.duplicates,
            "dead_letters": dead_letters,
        }


if __name__ == "__main__":
    chaos.main(arguments(), Run)
