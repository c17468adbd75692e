"""What a process needs while it runs: heartbeat, stop requests, worker processes, files that are complete or absent."""
