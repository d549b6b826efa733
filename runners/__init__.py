"""Where and how it runs: the command line, jobs, Ray actors, the torch engine, and the files that results go to."""
