#!/usr/bin/env python3
"""Kills workers, cuts their connections and freezes the emulator past every lease while transfers go through a Pub/Sub
subscription with exactly-once delivery and ordering, and audits what became of them: each transfer once in the ledger, in the
order of its key, none missing, nothing left in the subscription. Exit code 1 if not.

The order is not audited where workers are told to stop. They give back what they have not begun, and the emulator (0.8.20) puts
that behind the key's other messages; the service does not. What comes back because its lease has ended keeps its place.

Needs google-cloud-pubsub, and Google's emulator with its process, to freeze it:

    pubsub.py --url http://127.0.0.1:8085 --emulator-pid 1234 --ledger target/debug/ledger
"""

import asyncio
import collections
import contextlib
import json
import math
import os
import socket
import struct
import threading
import time
from urllib.parse import urlencode, urlsplit

import grpc
from google.api_core.exceptions import DeadlineExceeded, GoogleAPIError
from google.cloud.pubsub_v1 import PublisherClient, SubscriberClient
from google.cloud.pubsub_v1.types import BatchSettings, PublisherOptions
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

import chaos
import ledger

KEY = "idempotency-key"
REASON = "onlyonce-reason"
PROJECT = "chaos"
# The least that Pub/Sub takes for a subscription, in seconds.
ACK_DEADLINE = 10
# With exactly-once delivery a client extends its leases to this number of seconds. What a killed worker held comes back after
# them at the latest.
LEASE = 60
# What the workers count when a lease has ended too early for them.
LOST = ("cancelled", "fenced", "lease_lost", "unknown")
# What the workers are slowed down to, so that there is always work left to be killed in. A key is blocked for as long as a
# killed worker's leases last: what a worker holds at a time is less than all keys.
PREFETCH = 20
CONCURRENCY = 8
DELAY = 0.01
# How many messages for each key are published ahead, so that the publishers live through the freezes, too.
AHEAD = 10
# How many keys a publisher sends at a time, with how many messages each, in how large requests. What follows a request that
# failed is not sent by Google's client, until it is told to resume the key.
WIDTH, DEPTH, BATCH = 5, 4, 2


def arguments():
    parser = chaos.run_arguments(__doc__, transfers=50_000, kills=30)
    parser.add_argument("--url", required=True, help="the emulator's")
    parser.add_argument("--emulator-pid", type=int, help="its process; needed unless --freezes is 0")
    parser.add_argument("--keys", type=int, default=500)
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--freezes", type=int, default=5)
    options = parser.parse_args()
    if options.freezes and options.emulator_pid is None:
        parser.error(f"--freezes {options.freezes} needs --emulator-pid; --freezes 0 leaves them out")
    return options


class Queue:
    """A topic with a subscription, and another topic with a subscription for dead letters. The subscription has no dead-letter
    policy of its own: with ordering too, the emulator fails every pull."""

    def __init__(self, address, name):
        self.name = name
        self.publisher = PublisherClient(
            BatchSettings(max_messages=BATCH),
            PublisherOptions(enable_message_ordering=True),
            transport=PublisherGrpcTransport(channel=grpc.insecure_channel(address)),
        )
        self.subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=grpc.insecure_channel(address)))
        self.topic, self.subscription = self._create(name, enable_message_ordering=True, enable_exactly_once_delivery=True)
        self.dead_topic, self.dead = self._create(f"{name}-dead")

    def _create(self, name, **settings):
        topic, subscription = f"projects/{PROJECT}/topics/{name}", f"projects/{PROJECT}/subscriptions/{name}"
        self.publisher.create_topic(name=topic)
        settings |= {"name": subscription, "topic": topic, "ack_deadline_seconds": ACK_DEADLINE}
        self.subscriber.create_subscription(request=settings)
        return topic, subscription

    def source(self, endpoint):
        return f"pubsub://{PROJECT}/{self.name}?{urlencode({'endpoint': endpoint})}"

    def sink(self, endpoint):
        return f"pubsub://{PROJECT}/topics/{self.name}-dead?{urlencode({'endpoint': endpoint})}"

    def publish(self, message):
        """Hands a message to Google's client; its result is to come. The client does not send it again by itself."""
        attributes = {KEY: message.identity}
        return self.publisher.publish(
            self.topic, message.body.encode(), ordering_key=message.key, retry=None, timeout=5, **attributes
        )

    def resume(self, key):
        self.publisher.resume_publish(self.topic, key)

    def drained(self, subscription, patience):
        """Takes out every message, until none came for this number of seconds."""
        messages = []
        end = time.monotonic() + patience
        while (left := end - time.monotonic()) > 0:
            try:
                answer = self.subscriber.pull(subscription=subscription, max_messages=100, retry=None, timeout=left)
            except DeadlineExceeded:
                continue
            # The emulator answers with nothing a second before the time is over.
            if answer.received_messages:
                messages += [received.message for received in answer.received_messages]
                ids = [received.ack_id for received in answer.received_messages]
                self.subscriber.acknowledge(subscription=subscription, ack_ids=ids)
                end = time.monotonic() + patience
        return messages

    def delete(self):
        for topic, subscription in [(self.topic, self.subscription), (self.dead_topic, self.dead)]:
            self.subscriber.delete_subscription(subscription=subscription)
            self.publisher.delete_topic(topic=topic)


class Proxy(threading.Thread):
    """Passes TCP connections on to an address, from a port of its own on loopback, and can reset all of them."""

    def __init__(self, host, port):
        super().__init__(daemon=True)
        self.target = (host, port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.accepted = 0
        self.connections = set()
        self.loop = asyncio.new_event_loop()
        self.start()

    def run(self):
        self.loop.run_until_complete(self._serve())

    async def _serve(self):
        async with await asyncio.start_server(self._connect, sock=self.listener) as server:
            await server.serve_forever()

    async def _connect(self, reader, writer):
        self.accepted += 1
        ends = [writer]
        self.connections.add(writer)
        try:
            its_reader, its_writer = await asyncio.open_connection(*self.target)
            ends.append(its_writer)
            self.connections.add(its_writer)
            ways = [self._pass(reader, its_writer), self._pass(its_reader, writer)]
            await asyncio.wait([asyncio.create_task(way) for way in ways], return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            for end in ends:
                self.connections.discard(end)
                end.transport.abort()

    @staticmethod
    async def _pass(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    def cut(self):
        """Resets all connections, and returns how many clients had one."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self.loop).result()

    async def _cut(self):
        connections = list(self.connections)
        for connection in connections:
            # What is closed without lingering is reset.
            connection.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.transport.abort()
        return len(connections) // 2


Message = collections.namedtuple("Message", "identity body key")


def poison(number):
    """What can be read, and never be applied."""
    identity = f"poison-{number}"
    return identity, json.dumps({"transfer_id": identity, "from": "account-1", "to": "account-2", "amount": 0})


def traffic(options, rng):
    """Each key's messages in their order, the transfers by id, and the number of duplicates, each of which is another message
    with the same idempotency key, later than its first."""
    lines = [[] for _ in range(options.keys)]
    sent = {}
    duplicates = 0
    for number in range(options.transfers):
        identity, body = ledger.transfer(number, rng)
        sent[identity] = body
        place = number % options.keys
        message = Message(identity, body, f"key-{place}")
        lines[place].append((number, message))
        if rng.randrange(100) < options.duplicates:
            duplicates += 1
            lines[place].append((number + rng.randrange(10 * options.keys), message))
    for number in range(options.poison):
        place = rng.randrange(options.keys)
        lines[place].append((rng.randrange(options.transfers), Message(*poison(number), f"key-{place}")))
    for line in lines:
        line.sort(key=lambda entry: entry[0])
    return [[message for _, message in line] for line in lines], sent, duplicates


class Publisher(chaos.Publisher):
    """Publishes some keys' messages."""

    ERRORS = (GoogleAPIError,)

    def __init__(self, queue, lines, ahead):
        super().__init__(sum(map(len, lines)))
        self.queue, self.ahead = queue, ahead
        self.lines = [line[::-1] for line in lines if line]

    def publish(self):
        while not self.done():
            if self.must_wait() or self.ahead():
                time.sleep(0.05)
                continue
            some, others = self.lines[:WIDTH], self.lines[WIDTH:]
            under_way = [(line, [self.queue.publish(message) for message in line[: -DEPTH - 1 : -1]]) for line in some]
            errors = [self.settle(line, results) for line, results in under_way]
            self.lines = others + [line for line in some if line]
            for error in filter(None, errors):
                raise error

    def settle(self, line, results):
        """Waits until it is known which of a key's messages were taken: those before the first error, if there is one."""
        for result in results:
            error = result.exception()
            if error:
                self.queue.resume(line[-1].key)
                return error
            self.confirm(line.pop().identity)
        return None


class Run(chaos.Run):
    WORKERS = 2
    SPEED = WORKERS * CONCURRENCY / DELAY
    IDLE = LEASE + 5

    def __init__(self, options, folder):
        super().__init__(options, folder)
        url = urlsplit(options.url)
        self.proxy = Proxy(url.hostname, url.port)
        self.queue = Queue(url.netloc, f"chaos-{os.getpid()}-{options.seed}")
        lines, self.sent, self.duplicates = traffic(options, self.rng)
        shares = [lines[number :: options.publishers] for number in range(options.publishers)]
        self.publishers = [Publisher(self.queue, share, self.ahead) for share in shares]
        self.counts |= {"cuts": 0, "cuts_during_work": 0, "connections_cut": 0}
        self.counts |= {"freezes": 0, "freezes_during_work": 0, "freezes_noticed": 0}
        self.applied["unknown"] = 0

    def ahead(self):
        """Whether enough is published. The subscription does not tell what it holds."""
        published = sum(len(publisher.published) for publisher in self.publishers)
        return published - self.book.entries() // 2 > AHEAD * self.options.keys

    def worker(self, log, *more):
        endpoint = f"http://127.0.0.1:{self.proxy.port}"
        return ledger.Worker(
            self.program,
            self.queue.source(endpoint),
            self.book,
            self.queue.sink(endpoint),
            log,
            *("--prefetch", str(PREFETCH), "--concurrency", str(CONCURRENCY)),
            *("--delay-before", str(DELAY)),
            *more,
        )

    def plan(self):
        return [(self.cut, self.options.cuts), (self.freeze, self.options.freezes)]

    def cut(self):
        """Resets the workers' connections, and waits until one connects again: workers of which none has ended meanwhile."""
        self.busy_worker()
        accepted, unfinished = self.proxy.accepted, self.unfinished()
        cut = self.proxy.cut()
        self.counts["cuts"] += 1
        self.counts["cuts_during_work"] += unfinished and cut > 0
        self.counts["connections_cut"] += cut

        def again():
            self.supervise()
            return self.proxy.accepted > accepted

        ledger.until("a worker to connect again", again, seconds=math.inf)

    def in_flight(self):
        """Whether a worker holds messages."""
        self.supervise()
        ends = ("settled", "lease_lost", "unknown")
        return any(worker.count("received") > sum(worker.count(end) for end in ends) for worker in self.workers)

    def lost(self):
        """How many leases workers have lost."""
        return sum(self.applied[name] + sum(worker.count(name) for worker in self.workers) for name in LOST)

    def freeze(self):
        """Stops the emulator until all leases that it gave have ended."""
        ledger.until("messages in flight", self.in_flight, seconds=math.inf)
        lost = self.lost()
        self.counts["freezes_during_work"] += self.unfinished()
        chaos.freeze(self.options.emulator_pid, LEASE + 2)
        self.counts["freezes"] += 1
        # That it stood still is nobody's fault.
        self.progress = (self.progress[0], time.monotonic())
        self.counts["freezes_noticed"] += self.lost() > lost

    def lines_in_order(self):
        """Each key's transfers in the order in which they were sent; none where messages are given back."""
        options = self.options
        for place in range(0 if options.stops else options.keys):
            yield [f"transfer-{number}" for number in range(place, options.transfers, options.keys)]

    def verdict(self):
        # The last workers got nothing for longer than a lease lasts, so nobody holds a message.
        left = self.queue.drained(self.queue.subscription, ACK_DEADLINE + 1)
        letters = [(letter.data.decode(), letter.attributes.get(REASON)) for letter in self.queue.drained(self.queue.dead, 2)]
        dead = {body for body, _ in letters}
        expected = {poison(number)[1] for number in range(self.options.poison)}
        findings = {
            "out_of_order": self.out_of_order(self.lines_in_order()),
            "left_in_subscription": len(left),
            "poison_not_set_aside": len(expected - dead),
            "wrongly_set_aside": len(dead - expected),
            "set_aside_without_reason": sum(not reason for _, reason in letters),
            "cuts_missing": self.options.cuts - self.counts["cuts_during_work"],
            "freezes_missing": self.options.freezes - self.counts["freezes_during_work"],
            "freezes_not_noticed": self.options.freezes - self.counts["freezes_noticed"],
        }
        return findings, {"keys": self.options.keys, "duplicates_sent": self.duplicates, "dead_letters": len(letters)}


if __name__ == "__main__":
    chaos.main(arguments(), Run)
