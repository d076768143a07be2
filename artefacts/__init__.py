"""What every result shares: files, averages, statistics and drawing."""
