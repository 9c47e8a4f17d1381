"""What a run leaves: masks, videos, cut-outs, annotations, reports, and the run folder itself."""
