"""What happened: written down as it happens, told to whoever follows, and posted to a webhook."""
