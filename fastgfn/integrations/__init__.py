"""Adapters to other packages, each imported where it is used.

grammars.py      grammars of llguidance and xgrammar
"""
