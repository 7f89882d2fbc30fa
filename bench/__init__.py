"""Side by side: what dpshm's board costs and how fresh it is, against what it replaces. See bench/README.md."""
