"""What a run leaves in its folder and prints while it runs."""
