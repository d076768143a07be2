"""Heat maps, curves and pictures with overlays, laid out by matplotlib."""
