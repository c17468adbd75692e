"""What a run needs, worked out before anything is loaded: layout, memory, hardware."""
