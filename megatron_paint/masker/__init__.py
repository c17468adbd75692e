"""The overlap masker: anchors, overlap, reveal. Text in, text out."""
