"""RabbitMQ's part of the chaos tests: the queue, and a transfer as a message. Needs pika."""

from urllib.parse import urlencode

import pika

import ledger

GROUP_HEADER = "x-group"


class Queue:
    """A queue with its dead-letter queue."""

    def __init__(self, url, name, kind="quorum"):
        self.url, self.name, self.dead = url, name, f"{name}.dead"
        # A broker that deletes what it delivered too often would hide what is lost. RabbitMQ 4 has a limit of 20 unless
        # told otherwise; 3 has none, and takes the -1 by which 4 has none for a limit below zero: it deletes all that
        # comes back.
        arguments = {"x-queue-type": kind, **({"x-delivery-limit": 1_000_000} if kind == "quorum" else {})}
        with self.connect() as connection:
            channel = connection.channel()
            for queue in (self.name, self.dead):
                channel.queue_declare(queue, durable=True, arguments=arguments)

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
