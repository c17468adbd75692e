"""Settings: their classes, their files and the checks between them."""
