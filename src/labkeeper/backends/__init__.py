"""Ways to run a server, one module each: they do what the core decides and report what they see."""
