"""The farm: the daemon on a farm machine, which runs environments, each in a worker process of its own."""
