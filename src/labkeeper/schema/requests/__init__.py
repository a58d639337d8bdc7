"""Request bodies: the one place where input is validated."""
