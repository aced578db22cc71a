"""Speed of fastq beside its peers; from the root: `python -m benchmarks.run --help`."""
