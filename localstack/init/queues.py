"""Queues to begin with, in the SQS that AWS_ENDPOINT_URL names. LocalStack's image runs this file when it is ready, and
`localstack/localstack init` does so, too; what is there already stays as it is.
"""

import json
import os

import boto3

ENDPOINT = os.environ.get("AWS_ENDPOINT_URL", "http://localhost:4566")

sqs = boto3.client(
    "sqs",
    endpoint_url=ENDPOINT,
    region_name="us-east-1",
    aws_access_key_id="test",
    aws_secret_access_key="test",
)


def create(name, **attributes):
    """Creates a queue; gives its ARN, by which a redrive policy names it."""
    if name.endswith(".fifo"):
        attributes["FifoQueue"] = "true"
    url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
    return sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]


for queue, dead in [("orders.fifo", "orders-dead.fifo"), ("jobs", "jobs-dead")]:
    # As often as SQS allows: it is the worker that decides what goes to the dead-letter queue, with the reason.
    redrive = {"deadLetterTargetArn": create(dead), "maxReceiveCount": 1000}
    create(queue, VisibilityTimeout="30", RedrivePolicy=json.dumps(redrive))
