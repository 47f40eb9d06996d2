"""Between text and tokens: chat templates, tokenizers, and tokens back to text."""
