"""Commits to the table: parts of rows, rewritten files, and the transaction that makes them visible."""
