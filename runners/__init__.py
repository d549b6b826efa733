"""Where and how it runs: command line, Ray, engines, results."""
