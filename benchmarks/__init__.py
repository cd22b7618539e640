"""Speed, memory and results over seeds, as data with a report. Each benchmark also checks that its timed code is right."""
