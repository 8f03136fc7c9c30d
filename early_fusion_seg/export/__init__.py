"""Export: a trained model as a file that runs without this package, with its preprocessing, metadata and parity."""
