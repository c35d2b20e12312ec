"""What validation and test find: scores of rows and of tasks, their means and intervals, and reports of them."""
