"""What a run needs, computed before anything is loaded: layout, memory, hardware."""
