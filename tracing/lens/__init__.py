"""The logit lens: which answer the output head would give after each layer."""
