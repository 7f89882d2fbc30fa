"""Compares cost and freshness of dpshm's board with those of other designs. See bench/README.md."""
