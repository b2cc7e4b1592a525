"""Corpora: one folder each, made by its prepare.py; common.py has what they share."""
