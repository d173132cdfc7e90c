"""The slave's side: the daemon that keeps environments running, each in a process of its own."""
