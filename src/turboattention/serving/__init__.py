"""Servers under test: the same requests to two endpoints, compared; nothing here changes a server."""
