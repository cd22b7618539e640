"""Speed and memory of the library, as data with a report; each benchmark checks that what it times is also right."""
