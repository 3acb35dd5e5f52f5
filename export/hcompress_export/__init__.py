"""Make bundles: freeze a schedule, cut step graphs out of one trace, write them with one weight file."""
