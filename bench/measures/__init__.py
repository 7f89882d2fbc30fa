"""One file a figure: a function that measures one peer once. `bench.comparison` puts the rounds together."""
