"""What result sets say: leaderboard, claims over the normalisation families, report; reads tables, never measures."""
