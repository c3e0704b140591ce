"""Answers, not only tensors: RULER's tasks asked of the wrapped model, and of any operator that can serve decoding."""
