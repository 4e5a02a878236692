//! RabbitMQ for onlyonce: a source with manual acks and a sink with publisher confirms.
