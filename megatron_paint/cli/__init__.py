"""What a user types: parse, check, call, print."""
