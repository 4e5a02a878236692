#!/usr/bin/env python3
"""Kills workers and freezes the emulator past every lease while transfers go through an SQS FIFO queue, and audits what
became of them: each transfer once in the ledger, in the order of its group, none missing, nothing left in the queue. Exit
code 1 if not.

Needs boto3, and an emulator whose leases and groups are as on AWS, with its process, to freeze it:

    sqs.py --endpoint http://127.0.0.1:4566 --emulator-pid 1234 --ledger target/debug/ledger
"""

import json
import math
import os
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

import chaos
import ledger

KEY = "idempotency-key"
# The lease, in seconds: what a killed worker held comes back after it.
VISIBILITY = 4
# What the workers are slowed down to, so that there is always work left to be killed in.
PREFETCH = 100
CONCURRENCY = 32
DELAY = 0.01
# How many of a group's messages are published ahead, so that the publishers live through the freezes, too.
AHEAD = 10


def arguments():
    parser = chaos.run_arguments(__doc__, transfers=20_000, kills=30)
    parser.add_argument("--endpoint", required=True, help="the emulator's")
    parser.add_argument("--emulator-pid", type=int, help="its process; needed unless --freezes is 0")
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--freezes", type=int, default=5)
    options = parser.parse_args()
    if options.freezes and options.emulator_pid is None:
        parser.error(f"--freezes {options.freezes} needs --emulator-pid; --freezes 0 leaves them out")
    return options


class Queue:
    """A FIFO queue with its dead-letter queue."""

    def __init__(self, endpoint, name):
        self.client = boto3.client("sqs", endpoint_url=endpoint)
        # Each request once: who sends decides what is sent again.
        once = Config(connect_timeout=2, read_timeout=2, retries={"total_max_attempts": 1})
        self.sender = boto3.client("sqs", endpoint_url=endpoint, config=once)
        self.dead = self._create(f"{name}-dead.fifo")
        # As often as SQS allows: nobody but the worker sets messages aside.
        redrive = {"deadLetterTargetArn": self._attribute(self.dead, "QueueArn"), "maxReceiveCount": 1000}
        self.url = self._create(f"{name}.fifo", RedrivePolicy=json.dumps(redrive))

    def _create(self, name, **attributes):
        attributes |= {"FifoQueue": "true", "VisibilityTimeout": str(VISIBILITY)}
        return self.client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]

    def _attribute(self, url, name):
        return self.client.get_queue_attributes(QueueUrl=url, AttributeNames=[name])["Attributes"][name]

    def in_flight(self):
        return int(self._attribute(self.url, "ApproximateNumberOfMessagesNotVisible"))

    def waiting(self):
        return int(self._attribute(self.url, "ApproximateNumberOfMessages"))

    def send(self, messages):
        """Sends up to ten, and returns the places of those that were taken."""
        entries = [{"Id": str(place), **message} for place, message in enumerate(messages)]
        answer = self.sender.send_message_batch(QueueUrl=self.url, Entries=entries)
        return [int(entry["Id"]) for entry in answer.get("Successful", [])]

    def drained(self):
        """Takes every dead letter out: each one's payload and reason."""
        letters = []
        while True:
            answer = self.client.receive_message(
                QueueUrl=self.dead, MaxNumberOfMessages=10, MessageAttributeNames=["All"]
            )
            if not answer.get("Messages"):
                return letters
            for letter in answer["Messages"]:
                reason = letter.get("MessageAttributes", {}).get("onlyonce-reason", {})
                letters.append((letter["Body"], reason.get("StringValue")))
                self.client.delete_message(QueueUrl=self.dead, ReceiptHandle=letter["ReceiptHandle"])

    def delete(self):
        for url in (self.url, self.dead):
            self.client.delete_queue(QueueUrl=url)


def message(identity, body, group, dedup=None):
    return {
        "MessageBody": body,
        "MessageGroupId": f"group-{group}",
        "MessageDeduplicationId": dedup or identity,
        "MessageAttributes": {KEY: {"DataType": "String", "StringValue": identity}},
    }


def poison(number):
    """What can be read, and never be applied."""
    identity = f"poison-{number}"
    return identity, json.dumps({"transfer_id": identity, "from": "account-1", "to": "account-2", "amount": 0})


def traffic(options, rng):
    """Each group's messages in their order, the transfers by id, and how many duplicates SQS will not drop. A duplicate comes
    later than its first. Half of them have its deduplication id, so that SQS drops them; the others have their own, as if they
    came after the five minutes for which SQS remembers."""
    lines = [[] for _ in range(options.groups)]
    sent = {}
    duplicates = 0
    for number in range(options.transfers):
        identity, body = ledger.transfer(number, rng)
        sent[identity] = body
        group = number % options.groups
        lines[group].append((number, message(identity, body, group)))
        if rng.randrange(100) < options.duplicates:
            duplicates += 1
            dedup = f"{identity}-again" if duplicates % 2 else identity
            later = number + rng.randrange(10 * options.groups)
            lines[group].append((later, message(identity, body, group, dedup)))
    for number in range(options.poison):
        group = rng.randrange(options.groups)
        lines[group].append((rng.randrange(options.transfers), message(*poison(number), group)))
    for line in lines:
        line.sort(key=lambda entry: entry[0])
    return [[entry for _, entry in line] for line in lines], sent, (duplicates + 1) // 2


class Publisher(chaos.Publisher):
    """Publishes some groups' messages. No batch has two of the same group, and a group's next one is not sent before the
    last was taken: else what is sent again could be overtaken."""

    ERRORS = (BotoCoreError, ClientError)

    def __init__(self, queue, lines, backlog):
        super().__init__(sum(map(len, lines)))
        self.queue, self.backlog = queue, backlog
        self.lines = [line[::-1] for line in lines if line]

    def publish(self):
        while not self.done():
            if self.must_wait() or self.queue.waiting() > self.backlog:
                time.sleep(0.05)
                continue
            batch, others = self.lines[:10], self.lines[10:]
            for place in self.queue.send([line[-1] for line in batch]):
                taken = batch[place].pop()
                self.confirm(taken["MessageAttributes"][KEY]["StringValue"])
            self.lines = others + [line for line in batch if line]


class Run(chaos.Run):
    WORKERS = 2
    SPEED = WORKERS * CONCURRENCY / DELAY
    IDLE = VISIBILITY + 4

    def __init__(self, options, folder):
        super().__init__(options, folder)
        self.queue = Queue(options.endpoint, f"chaos-{os.getpid()}-{options.seed}")
        lines, self.sent, self.duplicates = traffic(options, self.rng)
        shares = [lines[number :: options.publishers] for number in range(options.publishers)]
        self.publishers = [Publisher(self.queue, share, AHEAD * options.groups) for share in shares]
        self.counts |= {"freezes": 0, "freezes_during_work": 0}

    def worker(self, log, *more):
        return ledger.Worker(
            self.program,
            self.queue.url,
            self.book,
            self.queue.dead,
            log,
            *("--prefetch", str(PREFETCH), "--concurrency", str(CONCURRENCY)),
            *("--delay-before", str(DELAY)),
            *more,
        )

    def plan(self):
        return [(self.freeze, self.options.freezes)]

    def freeze(self):
        """Stops the emulator until all leases that it gave have ended."""

        def in_flight():
            self.supervise()
            return self.queue.in_flight()

        ledger.until("messages in flight", in_flight, seconds=math.inf)
        self.counts["freezes_during_work"] += self.unfinished()
        chaos.freeze(self.options.emulator_pid, VISIBILITY + 2)
        self.counts["freezes"] += 1

    def groups(self):
        """Each group's transfers in the order in which they were sent."""
        options = self.options
        for group in range(options.groups):
            yield [f"transfer-{number}" for number in range(group, options.transfers, options.groups)]

    def verdict(self):
        # A freeze shows in leases that workers found to be lost or, if they had done with them, in what came again.
        lost = any(self.applied[name] for name in ("cancelled", "fenced", "lease_lost"))
        again = self.applied["duplicates"] > self.duplicates
        letters = self.queue.drained()
        dead = {body for body, _ in letters}
        expected = {poison(number)[1] for number in range(self.options.poison)}
        findings = {
            "out_of_order": self.out_of_order(self.groups()),
            "left_in_queue": self.queue.waiting() + self.queue.in_flight(),
            "poison_not_set_aside": len(expected - dead),
            "wrongly_set_aside": len(dead - expected),
            "set_aside_without_reason": sum(not reason for _, reason in letters),
            "freezes_missing": self.options.freezes - self.counts["freezes_during_work"],
            "freezes_left_no_trace": int(self.options.freezes > 0 and not (lost or again)),
        }
        return findings, {"groups": self.options.groups, "duplicates_sent": self.duplicates, "dead_letters": len(letters)}


if __name__ == "__main__":
    # For the workers, too. boto3 calls the region otherwise than Rust's SDK does.
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    chaos.main(arguments(), Run)
