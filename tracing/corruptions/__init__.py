"""What a trace destroys: words, the picture, or their embeddings; each kind keeps the prompt's length."""
