"""RabbitMQ's part of the chaos tests: the queue, and transfers as messages. Needs pika."""

from urllib.parse import urlencode

import pika

import chaos
import ledger

GROUP_HEADER = "x-group"


class Queue:
    """A queue with its dead-letter queue.

    Without a `limit` RabbitMQ 4 gives up on what a quorum queue took back 21 times. With `dead_letters` it then goes to the
    dead-letter queue, else it is deleted."""

    def __init__(self, url, name, kind="quorum", limit=None, single=False, dead_letters=False):
        self.url, self.name, self.dead = url, name, f"{name}.dead"
        arguments = {"x-queue-type": kind}
        more = {}
        if kind == "quorum" and limit is not None:
            more["x-delivery-limit"] = limit
        if single:
            more["x-single-active-consumer"] = True
        if dead_letters:
            more |= {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self.dead}
        with self.connect() as connection:
            channel = connection.channel()
            channel.queue_declare(self.dead, durable=True, arguments=arguments)
            channel.queue_declare(self.name, durable=True, arguments=arguments | more)

    def connect(self):
        parameters = pika.URLParameters(self.url)
        parameters.heartbeat = 10
        parameters.blocked_connection_timeout = 30
        return pika.BlockingConnection(parameters)

    def of(self, queue, **parameters):
        """The URL of one of the two queues, for the worker."""
        return f"{self.url}?{urlencode({'queue': queue, **parameters})}"

    def depth(self, queue):
        with self.connect() as connection:
            return connection.channel().queue_declare(queue, passive=True).method.message_count

    def drained(self, queue):
        """Takes every message out."""
        bodies = []
        with self.connect() as connection:
            channel = connection.channel()
            while True:
                method, _, body = channel.basic_get(queue, auto_ack=True)
                if method is None:
                    return bodies
                bodies.append(body)

    def messages(self):
        """Takes every message out of the queue, in its order: its id and its body. Faster than to ask for each."""
        messages = []
        with self.connect() as connection:
            channel = connection.channel()
            for method, properties, body in channel.consume(self.name, auto_ack=True, inactivity_timeout=3):
                if method is None:
                    return messages
                messages.append((properties.message_id, body))

    def delete(self):
        with self.connect() as connection:
            channel = connection.channel()
            for queue in (self.name, self.dead):
                channel.queue_delete(queue)


def transfer(number, rng, group=None):
    """A transfer's id, payload and properties."""
    identity, body = ledger.transfer(number, rng)
    headers = {GROUP_HEADER: group} if group else None
    properties = pika.BasicProperties(message_id=identity, delivery_mode=2, headers=headers)
    return identity, body.encode(), properties


def traffic(options, rng, single=False):
    """All messages, each publisher's in its order, the transfers by id, and the number of duplicates, each of which comes later
    than its first. Half of the transfers belong to a group, if there are groups. With a `single` consumer the order counts for
    those without a group, too."""
    lines = [[] for _ in range(options.publishers)]
    sent = {}
    duplicates = 0
    for number in range(options.transfers):
        grouped = options.groups and number % 2 == 0
        message = transfer(number, rng, f"group-{number % options.groups}" if grouped else None)
        identity, body, _ = message
        sent[identity] = body
        lines[number % options.publishers].append((number, message))
        if rng.randrange(100) < options.duplicates:
            duplicates += 1
            # Where the order counts, it must not come before its first: another publisher may be ahead.
            ordered = single or grouped
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


def settled(queues, poison_messages):
    """Whether nothing but the poison is left in these queues: findings, each of which must be zero, and the number of dead letters."""
    dead = [body for queue in queues for body in queue.drained(queue.dead)]
    expected = {poison(number)[0] for number in range(poison_messages)}
    findings = {
        "left_in_queue": sum(queue.depth(queue.name) for queue in queues),
        "poison_not_set_aside": len(expected - set(dead)),
        "wrongly_set_aside": len(set(dead) - expected),
    }
    return findings, len(dead)
