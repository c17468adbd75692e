"""The overlap masker: anchors, overlap and reveal. It works on text alone and uses no model."""
