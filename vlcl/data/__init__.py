"""Shards to batches: shard.py (tars), manifest.py (row ids), order.py (which row when), decode.py (one sample), none of
which imports torch; stream.py (batches for a rank).
"""
