"""What one run shows by itself: answers in middle layers, what attention brings, what gradients point at."""
