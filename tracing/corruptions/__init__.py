"""Corruptions of a prompt: other words or pictures, noise, and ablation; each keeps the prompt's length."""
