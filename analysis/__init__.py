"""What it means: result sets as polars frames, claims, comparisons, gates."""
