"""Wrong answers predicted from attention and probability."""
