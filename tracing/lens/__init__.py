"""Logit lens: what each layer would answer."""
