"""The commands: each parses its options, checks, calls the library and prints."""
