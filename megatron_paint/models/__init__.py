"""Model families: their shapes and their checkpoint mappings."""
