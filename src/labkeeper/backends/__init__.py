"""Ways to run a server; one module for each. Does what the core decides, and reports what it sees."""
