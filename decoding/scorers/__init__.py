"""Scorers: what gives a text numbers. Requests name them by `ScorerSpec`; `decoding.search` asks them."""
