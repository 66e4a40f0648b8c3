"""Side-by-side measurements with peers; run by `make bench`."""
