"""State in Redis: the packed row, the names of keys, the commit and the bulk read."""
