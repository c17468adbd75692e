"""Problems, prompts and tokenizers: text becomes token ids here, once."""
