"""What one run of a model shows by itself: answers in its middle layers, what attention brings, what gradients point at."""
