#!/usr/bin/env python3
"""Kills workers, cuts connections and restarts the broker while transfers go through RabbitMQ, and audits what became of
them: each transfer once in the ledger, none missing, nothing left in the queue. Exit code 1 if not.

Needs pika. The commands that cut and restart are given, so that any broker will do:

    rabbitmq.py --url amqp://guest:guest@localhost/%2f --ledger target/debug/ledger \\
        --cut-cmd "localstack/rabbitmq-4.0 ctl DIR close_all_connections cut" \\
        --restart-cmd "localstack/rabbitmq-4.0 restart DIR"
"""

import os
import subprocess

import pika

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


def traffic(options, rng):
    """All messages, each publisher's in its order, the transfers by id, and the number of duplicates, each of which comes later
    than its first."""
    lines = [[] for _ in range(options.publishers)]
    sent = {}
    duplicates = 0
    for number in range(options.transfers):
        grouped = options.groups and number % 2 == 0
        message = rabbit.transfer(number, rng, f"group-{number % options.groups}" if grouped else None)
        identity, body, _ = message
        sent[identity] = body
        lines[number % options.publishers].append((number, message))
        if rng.randrange(100) < options.duplicates:
            duplicates += 1
            # Where the order counts, it must not come before its first: another publisher may be ahead.
            ordered = options.single or grouped
            line = number % options.publishers if ordered else rng.randrange(options.publishers)
            lines[line].append((number + rng.randrange(2_000), message))
    for number in range(options.poison):
        body, properties = poison(number)
        line = rng.choice(lines)
        line.append((rng.randrange(options.transfers), (f"poison-{number}", body, properties)))
    for line in lines:
        line.sort(key=lambda entry: entry[0])
    return [[message for _, message in line] for line in lines], sent, duplicates


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


class Publisher(chaos.Publisher):
    """Publishes with confirms, again and again until each is confirmed."""

    ERRORS = (pika.exceptions.AMQPError, OSError)

    def __init__(self, queue, messages):
        super().__init__(len(messages))
        self.queue, self.line = queue, messages

    def publish(self):
        with self.queue.connect() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            while not self.done():
                if self.must_wait():
                    connection.sleep(0.02)
                    continue
                identity, body, properties = self.line[self.confirmed]
                channel.basic_publish("", self.queue.name, body, properties, mandatory=True)
                self.confirm(identity)


class Run(chaos.Run):
    SPEED = CONCURRENCY / DELAY

    def __init__(self, options, folder):
        super().__init__(options, folder)
        settings = (options.queue_type, options.limit, options.single, options.dead_letters)
        self.queue = rabbit.Queue(options.url, f"chaos-{os.getpid()}-{options.seed}", *settings)
        lines, self.sent, self.duplicates = traffic(options, self.rng)
        self.publishers = [Publisher(self.queue, line) for line in lines]
        self.outage = None
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
            (lambda: self.break_broker("cuts", options.cut_cmd), options.cuts),
            (lambda: self.break_broker("restarts", options.restart_cmd), options.restarts),
        ]

    def break_broker(self, what, command):
        """Cuts or restarts; the workers are killed meanwhile as at any other time."""
        self.settle()
        with open(os.path.join(self.folder, "broker.log"), "a", encoding="utf-8") as output:
            self.outage = subprocess.Popen(command, shell=True, stdout=output, stderr=output)
        self.counts[what] += 1

    def broker_is_away(self):
        return self.outage is not None and self.outage.poll() is None

    def settle(self):
        if self.outage and self.outage.wait(timeout=120) != 0:
            raise AssertionError(f"the command given ended with {self.outage.returncode}, see broker.log")

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
        dead = self.queue.drained(self.queue.dead)
        expected = {poison(number)[0] for number in range(self.options.poison)}
        findings = {
            "out_of_order": self.out_of_order(self.lines_in_order()),
            "left_in_queue": self.queue.depth(self.queue.name),
            "poison_not_set_aside": len(expected - set(dead)),
            "wrongly_set_aside": len(set(dead) - expected),
        }
        return findings, {
            "queue_type": self.options.queue_type,
            "duplicates_sent": self.duplicates,
            "dead_letters": len(dead),
        }


if __name__ == "__main__":
    chaos.main(arguments(), Run)
