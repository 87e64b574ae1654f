"""The way to the Hub and back: client, publishing, restoring, model cards."""
