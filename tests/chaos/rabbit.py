"""RabbitMQ's part of the chaos tests: the queue, and a transfer as a message. Needs pika."""

from urllib.parse import urlencode

import pika

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
