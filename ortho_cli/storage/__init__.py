"""Bytes on disk: reads files from strangers, and writes files so that nothing is lost."""
