"""What every process is started with: settings, log lines, the way to Redis and Kafka. Imports no other room."""
