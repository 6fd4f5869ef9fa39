"""From Kafka to Redis."""
