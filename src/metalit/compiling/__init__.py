"""Pure functions as compiled programs: traced, given to the compiler with a bound on the time, kept on disk."""
