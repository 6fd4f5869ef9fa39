"""Training sets: features as of the time of each label, from the archive and what Kafka still has."""
