"""Serving: contexts opened once, conversations about them, and an OpenAI-compatible server around both.

``app`` and ``handlers`` need the extra ``serve``; the rest is what a chat in a terminal uses, too.
"""
