"""Frozen hidden states to scores. Knows upstreams only as Upstream and Hidden."""
