"""What happens once an episode: sampling, extraction, clustering, back translation."""
