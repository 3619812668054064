"""How a server fares when more is asked of it than it can do."""
