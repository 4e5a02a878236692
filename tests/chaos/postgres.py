#!/usr/bin/env python3
"""Kills workers, and kills and restarts the PostgreSQL that is their store, while transfers go from RabbitMQ into a ledger there
through several workers at once; audits what became of them: each transfer once in the ledger, none missing, nothing left in the
queue. Exit code 1 if not.

With --queues the transfers go to several queues, each with its share of the workers; the queues have the same message ids for
different transfers. With --one-identity they count as one queue, and the second message of a transfer may go to another of them than
the first.

With --events each transfer has an event, which the workers publish to another queue: its events must be there, each once but for
repetitions with the same id, and those of an account in order.

Needs pika and psycopg. The commands that kill and restart the server are given, so that any server will do:

    postgres.py --url amqp://guest:guest@localhost/%2f --store postgres://user:password@localhost/database \\
        --ledger target/debug/ledger --server-kill-cmd "localstack/postgres crash DIR" \\
        --server-restart-cmd "localstack/postgres restart DIR"
"""

import json
import os
import time
from urllib.parse import urlencode

import psycopg

import chaos
import ledger
import rabbit

# What a worker is slowed down to, so that there is always work left to be killed in. More handlers than connections, so that
# commits are shared.
CONCURRENCY = 16
CONNECTIONS = 8
DELAY = 0.01


def arguments():
    parser = chaos.run_arguments(__doc__, transfers=100_000, kills=100)
    parser.add_argument("--url", required=True, help="AMQP URL without a query")
    parser.add_argument("--store", required=True, help="PostgreSQL URL without a query; the run makes a schema of its own there")
    parser.add_argument("--workers", type=int, default=4, help="how many there are at once")
    parser.add_argument("--queues", type=int, default=1, help="among how many the transfers and the workers are divided")
    parser.add_argument("--one-identity", action="store_true", help="the queues have their records in common")
    parser.add_argument("--groups", type=int, default=0, help="half of the transfers belong to one of this number of groups; 0: none")
    parser.add_argument("--events", action="store_true", help="workers publish an event for each transfer to another queue")
    parser.add_argument("--prefetch", type=int, default=200)
    parser.add_argument("--server-kills", type=int, default=5, help="how often PostgreSQL is killed with all its children")
    parser.add_argument("--server-restarts", type=int, default=2)
    parser.add_argument("--server-kill-cmd", default="", help="kills it and starts it again; needed unless --server-kills is 0")
    parser.add_argument("--server-restart-cmd", default="", help="needed unless --server-restarts is 0")
    options = parser.parse_args()
    if options.workers < options.queues:
        parser.error("each queue needs a worker")
    for name, count, command in [
        ("kill", options.server_kills, options.server_kill_cmd),
        ("restart", options.server_restarts, options.server_restart_cmd),
    ]:
        if count and not command:
            parser.error(f"--server-{name}s {count} needs --server-{name}-cmd; --server-{name}s 0 leaves them out")
    return options


class Book:
    """The ledger's tables, read without the program under test; through the server's outages, too."""

    def __init__(self, server, schema):
        self.server, self.schema = server, schema
        self.url = f"{server}?{urlencode({'schema': schema, 'connections': CONNECTIONS})}"
        self.connection = None
        self.counted, self.count_again = 0, 0.0

    def _query(self, sql):
        """`{}` stands for the schema."""
        if self.connection is None or self.connection.closed:
            self.connection = psycopg.connect(self.server, autocommit=True, connect_timeout=5)
        return self.connection.execute(sql.format(self.schema)).fetchall()

    def entries(self):
        """How many entries there are, or were when the server last told. Counting takes a tenth of the time at most."""
        began = time.monotonic()
        if began >= self.count_again:
            try:
                self.counted = self._query("SELECT count(*) FROM {}.entries")[0][0]
            except (psycopg.OperationalError, psycopg.errors.UndefinedTable):
                pass  # It is away, or has no tables yet.
            self.count_again = time.monotonic() + 10 * (time.monotonic() - began)
        return self.counted

    def transfers(self):
        """Each transfer's entries, as accounts with amounts, first from where and then to where."""
        transfers = {}
        for transfer, *entry in self._query("SELECT transfer_id, account, amount FROM {}.entries ORDER BY amount"):
            transfers.setdefault(transfer, []).append(tuple(entry))
        return transfers

    def sum_of_balances(self):
        return int(self._query("SELECT coalesce(sum(balance), 0) FROM {}.balances")[0][0])

    def waiting_events(self):
        return self._query("SELECT count(*) FROM {}.onlyonce_outbox")[0][0]

    def delete(self):
        self.connection.execute(f"DROP SCHEMA {self.schema} CASCADE")


def check_events(messages, sent):
    """Compares the events, as the next consumer would get them, with the transfers' payloads by id: findings, and the number of
    repetitions. What that consumer has seen, by its id, it does not look at again."""
    seen, told, numbers = {}, {}, {}
    findings = {"events_twice": 0, "events_not_as_sent": 0, "events_out_of_order": 0, "event_ids_of_several": 0}
    for identity, body in messages:
        if identity in seen:
            findings["event_ids_of_several"] += seen[identity] != body
            continue
        seen[identity] = body
        event = json.loads(body)
        number, transfer, account = event.pop("number"), event["transfer_id"], event["from"]
        findings["events_twice"] += transfer in told
        told[transfer] = identity
        findings["events_not_as_sent"] += transfer not in sent or event != json.loads(sent[transfer])
        # None may be missed, either.
        findings["events_out_of_order"] += number != numbers.get(account, 0) + 1
        numbers[account] = number
    findings["events_lost"] = len(sent.keys() - told.keys())
    return findings, len(messages) - len(seen)


def divided(lines, sent, queues, as_one, rng):
    """The messages of each queue, in lines as before. If the queues do not count `as_one`, each has all messages of its transfers, and
    the same ids as the others."""
    parts = [[[] for _ in lines] for _ in range(queues)]
    places, ids = {}, [0] * queues
    for number, line in enumerate(lines):
        for message in line:
            identity, _, properties = message
            place = rng.randrange(queues)
            if not as_one and identity in sent:
                place = places.setdefault(identity, place)
                # The messages of a transfer have their properties in common.
                if properties.message_id == identity:
                    ids[place] += 1
                    properties.message_id = f"message-{ids[place]}"
            parts[place][number].append(message)
    return parts


class Run(chaos.Run):
    def __init__(self, options, folder):
        super().__init__(options, folder)
        self.WORKERS = options.workers
        self.SPEED = options.workers * CONNECTIONS / DELAY
        name = f"chaos-{os.getpid()}-{options.seed}"
        self.book = Book(options.store, name.replace("-", "_"))
        self.identity = name
        self.queues = [rabbit.Queue(options.url, f"{name}.{number}") for number in range(options.queues)]
        self.events_queue = rabbit.Queue(options.url, f"{name}.events") if options.events else None
        lines, self.sent, self.duplicates = rabbit.traffic(options, self.rng)
        parts = divided(lines, self.sent, options.queues, options.one_identity, self.rng)
        self.publishers = [rabbit.Publisher(queue, line) for queue, lines in zip(self.queues, parts) for line in lines]
        self.counts |= {"server_kills": 0, "server_kills_during_work": 0, "server_restarts": 0}
        self.applied |= {"conflicts": 0, "failed": 0}

    def worker(self, log, *more):
        order = {"group_header": rabbit.GROUP_HEADER} if self.options.groups else {}
        if self.events_queue:
            more = (*more, "--events", self.events_queue.of(self.events_queue.name, heartbeat="5s"))
        if self.options.one_identity:
            more = (*more, "--identity", self.identity)
        sources = {
            queue.of(queue.name, prefetch=self.options.prefetch, heartbeat="5s", **order): queue.of(queue.dead) for queue in self.queues
        }
        # The one with the fewest workers.
        source = min(sources, key=[worker.source for worker in self.workers].count)
        return ledger.Worker(
            self.program,
            source,
            self.book,
            sources[source],
            log,
            *("--prefetch", str(self.options.prefetch), "--concurrency", str(CONCURRENCY)),
            *("--delay-before", str(DELAY)),
            *more,
        )

    def plan(self):
        restart = self.options.server_restart_cmd
        return [
            (self.kill_server, self.options.server_kills),
            (lambda: self.break_server("server_restarts", restart), self.options.server_restarts),
        ]

    def kill_server(self):
        # Only what is being written can be lost or doubled.
        self.busy_worker()
        self.counts["server_kills_during_work"] += self.unfinished()
        self.break_server("server_kills", self.options.server_kill_cmd)

    def verdict(self):
        findings, dead_letters = rabbit.settled(self.queues, self.options.poison)
        findings["server_kills_missing"] = self.options.server_kills - self.counts["server_kills_during_work"]
        details = {"duplicates_sent": self.duplicates, "dead_letters": dead_letters}
        if self.events_queue:
            messages = self.events_queue.messages()
            more, details["events_repeated"] = check_events(messages, self.sent)
            findings |= {**more, "events_left": self.book.waiting_events()}
            details["events"] = len(messages)
        return findings, details

    def delete(self):
        for queue in [*self.queues, self.events_queue]:
            if queue:
                queue.delete()
        if not self.options.keep:
            self.book.delete()


if __name__ == "__main__":
    chaos.main(arguments(), Run)
